"""megatron.core on a machine without CUDA.

megatron.core 0.16.1 refers to CUDA in four ways: `torch.cuda.f(...)`, the strings "cuda" and "torch.cuda.FloatTensor",
`tensor.cuda()` and `pin_memory=True`. On CPU an import hook rewrites exactly these in the syntax tree of each megatron.core
module. So torch itself stays untouched, no list of modules or lines is needed, and the import order does not matter:

    torch.cuda.f(...)            ->  _CpuCuda.f(...)
    "cuda", "torch.cuda.XTensor" ->  "cpu", "torch.XTensor"
    x.cuda(...)                  ->  x.to("cpu")
    pin_memory=True              ->  pin_memory=False

Where Transformer Engine or apex is installed, megatron.core would take their layers and optimizers, which need a GPU. So they
cannot be imported after `install`.

Nothing here runs on CUDA.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_PREFIX = "megatron.core"
_STAND_IN = "__etr_cpu_cuda__"
_NEED_A_GPU = ("transformer_engine", "apex")


class _NoStream:
    """Streams and events on a device that runs everything in program order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *_exc: Any) -> None:
        pass

    def record_event(self, *_args: Any) -> _NoStream:
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *_args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing


class _CpuCuda:
    """Replaces `torch.cuda` inside megatron.core. Names that are not defined here raise AttributeError."""

    Stream = Event = stream = _NoStream
    nvtx = types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None)
    amp = torch.amp
    FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False

    @staticmethod
    def current_stream(*_args: Any) -> _NoStream:
        return _NoStream()

    default_stream = current_stream

    @staticmethod
    def synchronize(*_args: Any) -> None:
        pass

    empty_cache = set_device = synchronize

    @staticmethod
    def device_count() -> int:
        return 0

    @staticmethod
    def device(*_args: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    @staticmethod
    def memory_stats(*_args: Any) -> dict[str, int]:
        return collections.defaultdict(int)

    manual_seed = staticmethod(torch.manual_seed)

    @staticmethod
    def get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    random = types.SimpleNamespace(get_rng_state=get_rng_state)


def _is_torch_cuda(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    )


class _Rewrite(ast.NodeTransformer):
    """The four substitutions of the module docstring; keeps positions, so that tracebacks show the original lines."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if _is_torch_cuda(node) and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Name(id=_STAND_IN, ctx=ast.Load()), node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            move = ast.Attribute(value=node.func.value, attr="to", ctx=ast.Load())
            new = ast.Call(func=move, args=[ast.Constant(value="cpu")], keywords=[])
            return ast.fix_missing_locations(ast.copy_location(new, node))
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg == "pin_memory" and isinstance(node.value, ast.Constant):
            node.value = ast.copy_location(ast.Constant(value=False), node.value)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value == "cuda":
            return ast.copy_location(ast.Constant(value="cpu"), node)
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            return ast.copy_location(ast.Constant(value=node.value.replace("torch.cuda.", "torch.")), node)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    """Rewrites before compiling. Caches bytecode next to Python's own, under a name that no other program reads: otherwise
    rewriting would add two seconds to each process's startup."""

    _SUFFIX = f".etr_cpu_{zlib.crc32(Path(__file__).read_bytes()):08x}.pyc"  # a changed rewriter gets a new file

    # To the stubs it is static in one base class and not in the other; `importlib` calls it with `self`.
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> types.CodeType:  # type: ignore[override]
        if b"cuda" not in data and b"pin_memory" not in data:
            return super().source_to_code(data, path, _optimize=_optimize)
        return compile(_Rewrite().visit(ast.parse(data, path)), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        return super().get_data(self._own(path))

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        super().set_data(self._own(path), data, _mode=_mode)

    def _own(self, path: str) -> str:
        return path.removesuffix(".pyc") + self._SUFFIX if path.endswith(".pyc") else path

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__[_STAND_IN] = _CpuCuda
        super().exec_module(module)
        if module.__name__ == _PREFIX + ".jit":
            # Before other modules import the decorator: torch.compile would spend a minute in a C++ compiler on elementwise
            # helpers that run for microseconds.
            module.disable_jit_fuser()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PREFIX and not fullname.startswith(_PREFIX + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Replaces megatron.core's version: it uses torch.cuda's lazy-call queue, which is never run without CUDA."""
    torch.set_rng_state(new_state)


def install() -> None:
    """Install the import hook and hide packages that need a GPU, once per process, and import megatron.core.

    Raises RuntimeError if megatron.core was already imported: its modules would keep their CUDA calls.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _PREFIX in sys.modules:
        raise RuntimeError("megatron.core was imported before etr_megatron.platform.prepare_megatron()")
    sys.meta_path.insert(0, _Finder())
    for package in _NEED_A_GPU:
        sys.modules[package] = None  # type: ignore[assignment]  # an import raises ModuleNotFoundError, `find_spec` returns None
    import megatron.core.tensor_parallel.random

    megatron.core.tensor_parallel.random._set_cuda_rng_state = _set_rng_state
