"""A torch citizen: compile, opcheck, autocast, checkpointing, meta tensors, threads, no inputs."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dilated_core import MultiheadDilatedAttention
from dilated_sparse import BlockLayout, BlockSparseAttention, block_sparse_attention, layouts
from dilated_sparse._operators import TORCH
from dilated_testing import relative_error
from sparse_problems import NAMES, Problem

LAYOUT = layouts.bigbird(23, block_size=4, window_blocks=1, global_blocks=1, random_blocks=1)

# torch.compile itself warns of its own deprecations; ours would still be errors elsewhere.
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


@compiling
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}, {"is_causal": True, "padding": 0.3}])
def test_compile_fullgraph_equals_eager(options):
    torch.compiler.reset()
    case = Problem(LAYOUT, kv_heads=1, **options)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    eager = case.run(None, case.tensors())
    actual = case.run(None, case.tensors(), attention=compiled)
    if case.dropout_p:
        # The compiler draws its own seed; what must hold is that backward uses forward's.
        assert actual["dq"].isfinite().all()
        return
    for name in NAMES:
        assert relative_error(actual[name], eager[name]) < 1e-10, name


@compiling
def test_compile_a_module_for_any_batch():
    torch.compiler.reset()
    layer = MultiheadDilatedAttention(48, 6, None, attention=BlockSparseAttention(LAYOUT))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (2, 3, 7):
        x = torch.randn(batch, 23, 48)
        torch.testing.assert_close(compiled(x, is_causal=True)[0], layer(x, is_causal=True)[0])
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@compiling
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_a_module_whose_layout_was_never_called(dynamic):
    # functools.cached_property takes a lock in Python 3.11, which torch.compile cannot.
    torch.compiler.reset()
    layer = BlockSparseAttention(layouts.sliding_window(23, 7, block_size=8))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    q, k, v = torch.randn(3, 2, 23, 2, 16, dtype=torch.float64)
    assert relative_error(compiled(q, k, v), layer(q, k, v)) < 1e-12


@compiling
@pytest.mark.parametrize("rows", [1, 3])
def test_compile_a_layout_of_heads_and_batch_rows_with_free_sizes(rows):
    # torch.compile (2.13) says that a free size of 5 is not in (1, 5).
    torch.compiler.reset()
    layout = layouts.random_blocks(23, 1, heads=5, block_size=8)
    layer = BlockSparseAttention(BlockLayout.stack([layout] * rows))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v = torch.randn(3, 3, 23, 5, 16, dtype=torch.float64)
    assert relative_error(compiled(q, k, v), layer(q, k, v)) < 1e-12


@compiling
def test_compile_a_layout_of_batch_rows_that_was_never_called():
    torch.compiler.reset()
    layout = BlockLayout.stack([layouts.sliding_window(23, w, block_size=8) for w in (5, 11)])
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 23, 2, 16, dtype=torch.float64)
    actual = compiled(q, k, v, layout)
    for i, row in enumerate(layout.rows):
        one = block_sparse_attention(*(x[i : i + 1] for x in (q, k, v)), row)
        assert relative_error(actual[i : i + 1], one) < 1e-12


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_a_module_for_other_lengths_than_its_layouts(backend):
    # Traced, the cut of a layout failed: torch 2.11 folds the constant that is viewed as int64
    # ("size(-1) must be divisible by 8 to view Byte as Long"), 2.13 has no constant for its sizes.
    torch.compiler.reset()
    layer = BlockSparseAttention(layouts.sliding_window(23, 7, block_size=8))
    compiled = torch.compile(layer, backend=backend)
    for length in (23, 17, 11, 17, 31):
        inputs = torch.randn(3, 2, length, 2, 16, dtype=torch.float64)
        upstream = torch.randn(2, length, 2, 16, dtype=torch.float64)
        grads = []
        for attend in (compiled, layer):
            q, k, v = (x.clone().requires_grad_() for x in inputs)
            out = attend(q, k, v, is_causal=True)
            grads.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
        for actual, expected in zip(*grads, strict=True):
            assert relative_error(actual, expected) < 1e-10


@compiling
def test_compile_decoding_of_free_lengths():
    torch.compiler.reset()
    layer = MultiheadDilatedAttention(48, 6, None, attention=BlockSparseAttention(LAYOUT)).eval()
    compiled = torch.compile(layer, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 23, 48)
    cache, outs, start = layer.attention.new_cache(), [], 0
    with torch.no_grad():
        for count in (5, 1, 1, 9, 7):
            outs.append(compiled(x[:, start : start + count], cache=cache, is_causal=True)[0])
            start += count
        assert relative_error(torch.cat(outs, 1), layer(x, is_causal=True)[0]) < 1e-5


@pytest.mark.parametrize("length", [23, 17])
def test_training_goes_on_from_what_inference_mode_made(length):
    with torch.inference_mode():
        layout = layouts.sliding_window(23, 6, block_size=8)
        row = BlockLayout.stack([layout]).rows[0]
        layer = BlockSparseAttention(BlockLayout.stack([row, row]).causal())
        x = torch.randn(2, length, 2, 16, dtype=torch.float64)
        expected = layer(x, x, x)  # the layout that was cut for it is kept
    x = x.clone().requires_grad_()
    out = layer(x, x, x)
    assert relative_error(out, expected) < 1e-12
    out.sum().backward()
    assert x.grad.isfinite().all()


@compiling
def test_operators_pass_opcheck():
    q, k, v = Problem(LAYOUT).tensors()
    rest = (
        torch.rand(2, 23) < 0.3, torch.tensor(5),
        LAYOUT.run_offsets, LAYOUT.run_columns, LAYOUT.run_counts, LAYOUT.run_masks, LAYOUT.table,
        LAYOUT.block_size, LAYOUT.heads, False, 0.3, 0.25,
    )  # fmt: skip
    torch.library.opcheck(TORCH.forward, (q, k, v, *rest))
    detached = [x.detach() for x in (q, k, v, *TORCH.forward(q, k, v, *rest))]
    for grad_lse in (None, torch.randn_like(detached[4])):
        arguments = (torch.randn_like(detached[3]), grad_lse, *detached, *rest)
        torch.library.opcheck(TORCH.backward, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    q, k, v = Problem(LAYOUT).tensors(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = block_sparse_attention(q, k, v, LAYOUT)
    assert out.dtype == dtype
    assert torch.equal(out, block_sparse_attention(*(x.to(dtype) for x in (q, k, v)), LAYOUT))
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in grads)


def test_meta_tensors_have_shapes():
    q = torch.randn(2, 23, 6, 8, device="meta")
    k = torch.randn(2, 23, 2, 8, device="meta")
    out, lse = block_sparse_attention(q, k, k, LAYOUT, enable_gqa=True, return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == (q.shape, "meta", (2, 6, 23))


def test_activation_checkpointing_gives_the_same_gradients():
    layer = BlockSparseAttention(LAYOUT, dropout=0.3)
    q, k, v = Problem(LAYOUT).tensors()
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False)
        else:
            out = layer(q, k, v)
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(out, (q, k, v), torch.randn_like(out)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_layout_may_be_forgotten_before_the_backward():
    q, k, v = Problem(LAYOUT).tensors()
    layout = layouts.sliding_window(23, 3, block_size=4)
    expected = torch.autograd.grad(block_sparse_attention(q, k, v, layout).sum(), q)[0]
    out = block_sparse_attention(q, k, v, layouts.sliding_window(23, 3, block_size=4)).sum()
    assert torch.equal(torch.autograd.grad(out, q)[0], expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("batch", "length"), [(0, 23), (2, 0), (0, 0)])
def test_empty_inputs_give_empty_outputs(batch, length, backend):
    x = torch.randn(batch, length, 3, 5, requires_grad=True)
    layout = layouts.sliding_window(length, 3, block_size=4)
    out, lse = block_sparse_attention(x, x, x, layout, return_lse=True, backend=backend)
    assert (out.shape, lse.shape) == (x.shape, (batch, 3, length))
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_threads_agree():
    cases = [Problem(layouts.sliding_window(n, 3, block_size=4)) for n in range(1, 25)]
    expected = [case.run("torch", case.tensors())["dk"] for case in cases]

    def attend(case):
        return block_sparse_attention(*case.tensors(), case.layout)

    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(attend, cases))
    for case, out in zip(cases, actual, strict=True):
        assert torch.equal(out, attend(case))
    assert len(expected) == len(actual)


def test_gradients_only_where_they_are_wanted():
    tensors = Problem(LAYOUT).tensors()
    for wanted in tensors:
        inputs = [x if x is wanted else x.detach() for x in tensors]
        (grad,) = torch.autograd.grad(block_sparse_attention(*inputs, LAYOUT).sum(), wanted)
        assert grad.shape == wanted.shape


NO_COMPILER = """
import sys
import torch
from dilated_core import DilatedPattern
from dilated_sparse import BlockSparseDilatedAttention, BlockSparseKVCache
from dilated_sparse import block_sparse_attention, layouts, select
x = torch.randn(1, 16, 2, 8, requires_grad=True)
layout = layouts.sliding_window(16, 3, block_size=4)
block_sparse_attention(x, x, x, layout, is_causal=True, dropout_p=0.1).sum().backward()
chosen = select.top_k_blocks(x, x, 2, block_size=4)
block_sparse_attention(x, x, x, chosen, key_padding_mask=torch.ones(1, 16) == 0).sum().backward()
BlockSparseDilatedAttention(DilatedPattern([8], [2]), layout)(x, x, x).sum().backward()
with torch.no_grad():
    BlockSparseKVCache(layout).attend(x, x, x)
assert "torch._dynamo" not in sys.modules
"""


def test_no_call_imports_the_compiler_nor_does_its_backward():
    numpy = "ignore:Failed to initialize NumPy:UserWarning"  # which torch does not require
    command = [sys.executable, "-Werror", "-W", numpy, "-c", NO_COMPILER]
    subprocess.run(command, check=True, timeout=60)
