"""Reading, overriding and checking a configuration; errors name keys by their path."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from titans_pretrain.config.hardware import HardwareConfig
from titans_pretrain.config.run import RunConfig
from titans_pretrain.config.site import SiteConfig
from titans_pretrain.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads `path` (YAML), applies `a.b=c` overrides and validates. Raises ConfigError."""
    tree = _read(path)
    for override in overrides or []:
        apply_override(tree, override)
    return parse_config(tree, str(path))


def load_site(path: str | Path) -> SiteConfig:
    """Reads what a cluster is like (YAML) and validates it. Raises ConfigError."""
    return _load(path, SiteConfig)


def load_hardware(path: str | Path) -> HardwareConfig:
    """Reads what a GPU and its machines can do (YAML) and validates it. Raises ConfigError."""
    return _load(path, HardwareConfig)


Kind = TypeVar("Kind", bound=BaseModel)


def _load(path: str | Path, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate(_read(path))
    except ValidationError as e:
        raise _explain(e, str(path), kind) from None


def _read(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"config {path}: {e.strerror}", "a config is a YAML file", "give its path"
        ) from e
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"config {path}: {e}", "the file is YAML", "mend the line named") from e
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config {path} holds {type(tree).__name__}",
            "a config is a mapping of sections",
            "see configs/ for examples",
        )
    return tree


def parse_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Validates a tree of plain values. Raises ConfigError naming every wrong key by its path."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        raise _explain(e, where) from None


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the leaf that `a.b=c` names in a tree of plain values. Raises ConfigError."""
    key, sep, value = override.partition("=")
    if not sep or not key:
        raise ConfigError(
            f"argument {override!r}", "an override is written a.b=c", "e.g. optim.lr=3e-4"
        )
    node = tree
    *parents, leaf = key.split(".")
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(
                f"argument {override!r}: {name} is a value, not a section",
                "an override names a leaf of the config tree",
                "see the resolved config of a run for the tree",
            )
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(
            f"argument {override!r}: {e}", "the right side is a YAML value", "quote it"
        ) from e


def _explain(
    error: ValidationError, where: str, section: type[BaseModel] = RunConfig
) -> ConfigError:
    problems, rules, remedies = [], [], []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            close = _nearest_key(item["loc"], section)
            problems.append(f"{path}={item['input']!r}: no such key")
            rules.append("every key is known")
            remedies.append(f"did you mean {close}?" if close else f"remove {path}")
        elif item["type"] == "missing":
            problems.append(f"{path}: missing")
            rules.append("what has no default is given")
            remedies.append(f"set {path} in the file or on the command line")
        elif item["type"] == "value_error":
            found, rule, remedy = [*str(item["ctx"]["error"]).split("; ", 2), "", ""][:3]
            problems.append(found)
            rules.append(rule)
            remedies.append(remedy)
        else:
            problems.append(f"{path}={item['input']!r}")
            rules.append(item["msg"][0].lower() + item["msg"][1:])
            remedies.append(f"change {path}")
    return ConfigError(
        f"config {where}: " + "; ".join(problems),
        "; ".join(dict.fromkeys(rules)),
        "; ".join(remedies),
    )


ANY = "*"  # in a known key: any name


def _nearest_key(loc: tuple[int | str, ...], section: type[BaseModel]) -> str | None:
    """The known dotted key nearest to a mistyped one: a sibling first, else anywhere."""
    everything = list(_keys(section, ()))
    wrong = tuple(str(p) for p in loc)
    siblings = [
        k
        for k in everything
        if len(k) == len(wrong) and all(a in (ANY, b) for a, b in zip(k[:-1], wrong[:-1]))
    ]
    near = difflib.get_close_matches(wrong[-1], [k[-1] for k in siblings], n=1, cutoff=0.5)
    if near:
        return ".".join((*wrong[:-1], near[0]))
    by_leaf = {k[-1]: k for k in reversed(everything) if ANY not in k}
    near = difflib.get_close_matches(wrong[-1], list(by_leaf), n=1, cutoff=0.6)
    return ".".join(by_leaf[near[0]]) if near else None


def _keys(section: type[BaseModel], prefix: tuple[str, ...]) -> typing.Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        kind = field.annotation
        if _is_section(kind):
            yield from _keys(kind, (*prefix, name))
        if typing.get_origin(kind) is dict and _is_section(entry := typing.get_args(kind)[1]):
            yield from _keys(entry, (*prefix, name, ANY))


def _is_section(kind: Any) -> typing.TypeGuard[type[BaseModel]]:
    return (
        isinstance(kind, type)
        and not isinstance(kind, types.GenericAlias)
        and issubclass(kind, BaseModel)
    )
