"""The prepared folders that a run reads: opened together, and shown to belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from titans_pretrain.config import DataConfig
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.mirror import open_source
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.errors import DataError

TOKENIZER = ("sha256", "vocab_size", "bos", "eos", "pad")


def load_sources(data: DataConfig, known: Sequence[str] = ()) -> dict[str, Manifest]:
    """The manifest of each source, in the config's order.

    `known`: their hashes, where another process of the run has read them. Raises DataError for a
    folder that is not whole, sources of several tokenizers, or two with the same content.
    """
    manifests = {
        name: open_source(source.path, data.cache, known[i] if known else "")
        for i, (name, source) in enumerate(data.sources.items())
    }
    first, reference = next(iter(manifests.items()))
    seen: dict[str, str] = {}
    for name, manifest in manifests.items():
        require_same_tokenizer(f"data.sources.{first}", reference, f"data.sources.{name}", manifest)
        other = seen.setdefault(manifest.hash, name)
        if other != name:
            raise DataError(
                f"data.sources.{other} and data.sources.{name} hold the same tokens: "
                f"{manifests[other].folder} and {manifest.folder} have one hash, "
                f"{manifest.hash[:16]}...",
                "each source has a content of its own",
                "leave one out and give the other both weights",
            )
    return manifests


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """The tokenizer of a run's data: its first source's, which is that of all."""
    source = next(iter(data.sources.values()))
    if source.stream:
        return Tokenizer.load(str(source.tokenizer))
    return open_source(source.path, data.cache).tokenizer()


def validation_sets(
    data: DataConfig, sources: Mapping[str, Manifest] | None = None
) -> dict[str, Manifest]:
    """Name -> manifest whose validation split is read: the folders of `data.validation`, or, where
    it names none, the sources.

    `sources`: their manifests, where they are open already. Raises DataError for a folder that is
    not whole, one with another tokenizer, or one without a validation document.
    """
    sources = sources or load_sources(data)
    folders = {Path(data.sources[name].path).resolve(): m for name, m in sources.items()}
    first, reference = next(iter(sources.items()))
    found = dict(sources)
    if data.validation:
        found = {
            name: folders.get(Path(one.path).resolve()) or open_source(one.path, data.cache)
            for name, one in data.validation.items()
        }
    for name, manifest in found.items():
        where = f"data.{'validation' if data.validation else 'sources'}.{name}"
        require_same_tokenizer(f"data.sources.{first}", reference, where, manifest)
        if not manifest.splits["validation"].documents:
            raise DataError(
                f"{where} ({manifest.folder}): the validation split is empty",
                "each validation set holds at least one document",
                "prepare the folder with more documents or a larger --validation; or name the sets "
                "to read in data.validation; or set validation.every=0",
            )
    return found


def require_same_tokenizer(first: str, reference: Manifest, second: str, other: Manifest) -> None:
    """Raises DataError where the two folders' tokens come from different tokenizers."""
    a, b = reference.header["tokenizer"], other.header["tokenizer"]
    wrong = [key for key in TOKENIZER if a[key] != b[key]]
    if wrong:
        raise DataError(
            f"{first} ({reference.folder}): tokenizer {_told(a, wrong)}; "
            f"{second} ({other.folder}): {_told(b, wrong)}",
            "all data of a run comes from one tokenizer",
            f"prepare one of them anew: titans-pretrain prepare TEXT --tokenizer "
            f"{reference.folder}/tokenizer.model --out {other.folder}",
        )


def _told(header: Mapping[str, object], keys: list[str]) -> str:
    return ", ".join(f"{key} {str(header[key])[:16]}" for key in keys)
