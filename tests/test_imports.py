"""Which room may know which: the imports of the package, read from its source.

An import below `if TYPE_CHECKING` binds nothing at run time and is left out, except for engines,
which are named in their own places alone.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "titans_pretrain"

# Room -> the modules of the package that it may import, as prefixes; its own room always.
ARROWS = {
    "errors": (),
    "arguments": (),
    "config": ("errors",),
    "data": ("config", "errors"),
    "memory": (),
    "model": ("config", "errors", "memory"),
    "parallel": ("config", "errors", "data.batch", "memory.onto", "phases"),
    "phases": (),
    "importing": (),
    "cut": ("config", "model.counts", "parallel.layout"),
    "run": ("config", "errors", "parallel.layout", "phases"),
    "launch": ("arguments", "config", "errors", "run", "parallel.layout", "estimate"),
    "measure": (
        *("config", "errors", "data", "memory", "model", "parallel", "run", "launch"),
        *("phases", "feed", "step", "watch", "estimate", "importing"),
    ),
    "estimate": (
        *("arguments", "config", "errors", "cut", "memory.sizes"),
        *("model.counts", "model.saved", "model.shapes"),
        *("parallel.layout", "parallel.legal", "parallel.plan", "parallel.wavefront"),
        "measure.hardware",  # for --measure alone: it needs torch
    ),
    "evaluate": ("config", "errors", "data", "model", "run"),
    "verify_plain": ("config", "data.batch", "model", "run.optim"),  # what layouts are held against
}
# Engine -> where it may be imported (files or folders).
ENGINES = {
    "megatron": ("parallel/megatron.py",),
    "deepspeed": (
        "parallel/zero.py",
        "parallel/compat.py",
    ),  # compat: keeps its builds from starting
    "webdataset": ("data/",),
    "sentencepiece": ("data/tokens.py",),
    "tensorboard": ("run/metrics.py",),
    "torch.utils.tensorboard": ("run/metrics.py",),
    "triton": ("memory/kernels/",),
    "pydantic": ("config/",),
    "matplotlib": ("run/", "estimate/plot.py"),
    "zstandard": ("data/",),
    "pyarrow": ("data/parquet.py",),
}
# What knows nothing of other ranks: one process computes a model as it stands.
ALONE = ("model", "memory")
# The memory knows torch and what Python brings.
MEMORY_OUTSIDE = {"torch", "triton"} | set(sys.stdlib_module_names)


def imports(source: str, module: str, *, typing: bool = True) -> set[str]:
    """Absolute names that the source imports: modules, and names taken from packages. `typing`
    False leaves out what stands below `if TYPE_CHECKING`."""
    tree = ast.parse(source)
    ignored: set[ast.AST] = set()
    if not typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                ignored |= {inner for child in node.body for inner in ast.walk(child)}
    found = set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def attributes(source: str) -> set[str]:
    """Dotted names that the source takes from names, e.g. "torch.distributed"."""
    return {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(files: dict[str, str]) -> list[str]:
    """What breaks the rules, in words; `files` maps paths below the package to sources."""
    wrong = []
    for path, source in sorted(files.items()):
        parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
        module = ".".join(["titans_pretrain", *parts])
        everything = imports(source, module)
        for engine, places in ENGINES.items():
            if any(_within(name, engine) for name in everything) and not path.startswith(places):
                wrong.append(f"{path} imports {engine}, which lives in {' '.join(places)}")
        if parts[0] in ALONE:
            used = everything | attributes(source)
            if any(_within(name, "torch.distributed") for name in used):
                wrong.append(f"{path} uses torch.distributed: {' and '.join(ALONE)} know one rank")
        if parts[0] == "memory":
            outside = {n.split(".")[0] for n in everything} - {"titans_pretrain"} - MEMORY_OUTSIDE
            wrong += [f"{path} imports {name}; the memory imports torch alone" for name in outside]
        ours = [
            name.removeprefix("titans_pretrain.")
            for name in imports(source, module, typing=False)
            if _within(name, "titans_pretrain")
        ]
        for name in ours:
            room = name.split(".")[0]
            allowed = (*ARROWS[parts[0]], parts[0]) if parts[0] in ARROWS else (room,)
            if not any(_within(name, prefix) for prefix in allowed):
                wrong.append(f"{path} imports titans_pretrain.{name}")
            if room == "train" and path != "cli.py":
                wrong.append(f"{path} imports train, which only the command line does")
            if room == "cli" and path != "__main__.py":
                wrong.append(f"{path} imports the command line")
    return wrong


def test_the_package_keeps_to_its_arrows():
    files = {str(p.relative_to(ROOT)): p.read_text() for p in ROOT.rglob("*.py")}
    assert len(files) > 30
    assert violations(files) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("memory/rules.py", "from titans_pretrain.config import MemoryConfig"),
        ("memory/rules.py", "import numpy"),
        ("memory/rules.py", "def f():\n    import torch, deepspeed"),
        ("model/titans.py", "from titans_pretrain.parallel import world"),
        ("model/titans.py", "from ..parallel.world import World"),
        ("model/titans.py", "from titans_pretrain import parallel"),
        ("model/titans.py", "import megatron.core"),
        ("model/titans.py", "import torch.distributed as dist"),
        ("model/titans.py", "def f():\n    from torch.distributed import all_reduce"),
        ("memory/layer.py", "from torch import distributed"),
        ("memory/layer.py", "import torch\ntorch.distributed.barrier()"),
        ("parallel/tensor.py", "import megatron.core"),
        ("estimate/pace.py", "from titans_pretrain.parallel import tensor"),
        ("data/stream.py", "from titans_pretrain.run import folder"),
        ("parallel/pipeline.py", "import deepspeed"),
        ("parallel/plan.py", "from titans_pretrain.model.titans import TitansLM"),
        ("run/console.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("run/console.py", "from titans_pretrain.parallel.world import World"),
        ("step.py", "import titans_pretrain.train"),
        ("step.py", "from pydantic import BaseModel"),
        ("config/run.py", "from titans_pretrain.data import order"),
        ("train.py", "from titans_pretrain.cli import main"),
        ("train.py", "if TYPE_CHECKING:\n    import sentencepiece"),
    ],
)
def test_each_rule_is_held(path, source):
    assert violations({path: source}) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("memory/kernels/fused.py", "import torch, triton, math"),
        ("parallel/world.py", "import torch.distributed as dist\ntorch.distributed.barrier()"),
        ("memory/layer.py", "from titans_pretrain.memory.state import MemoryState\nimport torch"),
        ("model/titans.py", "from titans_pretrain.memory import layer"),
        ("run/dcp.py", "from titans_pretrain.parallel.layout import Fragment"),
        ("run/x.py", "if TYPE_CHECKING:\n    from titans_pretrain.parallel.world import World"),
        ("train.py", "from titans_pretrain.parallel import world\nimport titans_pretrain.run.lock"),
        ("cli.py", "from titans_pretrain.train import run_training"),
        ("parallel/megatron.py", "from megatron.core import tensor_parallel"),
        ("data/inspect.py", "from .manifest import load_manifest"),
    ],
)
def test_and_allows_what_it_should(path, source):
    assert violations({path: source}) == []


def test_no_rank_imports_torch_s_compiler_as_it_starts():
    """It takes longer to import than all else together; megatron-core would, for layers unused."""
    code = (
        "import sys, titans_pretrain.train as _\n"
        "import deepspeed.runtime.zero.muon.muon_optimizer  # by deepspeed.initialize\n"
        "from titans_pretrain.parallel.world import prepare_cuda\n"
        "prepare_cuda(deterministic=True, watched=True)\n"
        "print(any(name.startswith('torch._inductor') for name in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["False"], out.stderr


def test_arithmetic_of_layouts_and_models_needs_no_torch():
    modules = "parallel.layout parallel.wavefront parallel.plan model.saved model.shapes cut"
    code = "\n".join(f"import titans_pretrain.{name}" for name in modules.split())
    code += "\nimport sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["False"], out.stderr
