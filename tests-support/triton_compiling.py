"""Compiling kernels for a GPU that is not there: what Triton's interpreter runs may not compile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.bool: "*i1",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


@contextmanager
def kernels_are_compiled() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Within it kernels are compiled to Triton's intermediate code where they would be launched.

    Nothing runs, so outputs stay as they are. Collected are the kernels' names, with what they were
    given by name. Types and shapes are checked by then; the rest takes seconds. For triton 3.6.
    Skips the test where there is no triton.
    """
    jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed")
    launched: list[tuple[str, dict[str, Any]]] = []

    def door(kernel: Any, _grid: object) -> Any:
        def compiled(*given: Any, **named: Any) -> None:
            launched.append((kernel.fn.__name__, named))
            _compile(kernel, given, named)

        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit.JITFunction, "__getitem__", door)
        yield launched


def _compile(kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    arguments = dict(zip(kernel.arg_names, given, strict=False)) | {
        name: value for name, value in named.items() if name in kernel.arg_names
    }
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    fixed |= {name for name, value in arguments.items() if value is None}
    signature = {
        name: "constexpr" if name in fixed else _type(arguments[name]) for name in kernel.arg_names
    }
    constants = {name: arguments[name] for name in fixed}
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options(
        {name: x for name, x in named.items() if name not in kernel.arg_names and x is not None}
    )
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, constants, {})
    functions = backend.get_codegen_implementation(options)
    source.make_ir(target, options, functions, backend.get_module_map(), context)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
