"""Modules and shards: what a model needs to train on a sequence that no rank has whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ring_module_programs as programs
from dilated_core import DilatedAttention, DilatedPattern
from dilated_ring import (
    RankMismatchError,
    RingDilatedAttention,
    RingMultiheadDilatedAttention,
    local_positions,
    plan,
    ring_attention,
    shard_sequence,
    shared_loss,
    unshard_sequence,
)
from dilated_ring._sharding import digest
from dilated_testing import relative_error
from process_ranks import GetRanks, World, worlds

PATTERN = programs.PATTERN


@pytest.fixture
def expected():
    """Output and gradients of the layer of one process."""
    layer = programs.reference_layer()
    x, grad = programs.inputs(37)
    x.requires_grad_()
    out, _ = layer(x, is_causal=True)
    (out * grad).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out, "x": x.grad, **grads}


@pytest.mark.parametrize("world", worlds(1, 2, 4))
def test_a_layer_trains_as_on_one_process(ranks: GetRanks, world: World, expected) -> None:
    """37 positions divide among no ranks, so the last shards are padded."""
    for found in ranks(world).run(programs.train_layer, 37):
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-10, name


@pytest.mark.parametrize("world", worlds(4))
@pytest.mark.parametrize("ring_size", [2, 4])
def test_rings_of_neighbours(ranks: GetRanks, world: World, expected, ring_size: int) -> None:
    for found in ranks(world).run(programs.train_layer, 37, ring_size):
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-10, name


@pytest.mark.slow
@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_a_wrapped_layer_trains_alike(ranks: GetRanks, world: World, expected, how: str) -> None:
    for found in ranks(world).run(programs.train_layer, 37, None, how, timeout=240):
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-10, name


@pytest.mark.parametrize("world", worlds(2, 3))
def test_a_ring_cannot_be_larger_than_the_world(ranks: GetRanks, world: World) -> None:
    expected = f"ring_size must be at most world_size ({world.size}). Got 8."
    assert ranks(world).run(programs.too_large_ring) == [expected] * world.size


@pytest.mark.parametrize("world", worlds(2))
def test_a_ring_of_one_has_its_sequence_alone(ranks: GetRanks, world: World) -> None:
    assert all(ranks(world).run(programs.ring_of_one))


def test_without_a_group_the_world_is_one_process() -> None:
    with pytest.raises(ValueError, match=r"^ring_size must be at most world_size \(1\). Got 8.$"):
        RingDilatedAttention(PATTERN, ring_size=8)
    x = torch.randn(2, 11, 5)
    rows, mask = shard_sequence(x)
    assert torch.equal(rows, x)
    assert mask is None
    assert torch.equal(unshard_sequence(x, length=7), x[:, :7])
    assert local_positions(3).tolist() == [0, 1, 2]
    heads = torch.randn(2, 11, 6, 8)
    actual = RingDilatedAttention(PATTERN)(heads, heads, heads, is_causal=True)
    assert torch.equal(actual, DilatedAttention(PATTERN)(heads, heads, heads, is_causal=True))


@pytest.mark.parametrize("world", worlds(1, 3))
@pytest.mark.parametrize(("length", "multiple_of"), [(12, 1), (13, 1), (13, 5), (2, 1), (0, 1)])
def test_shards_are_contiguous_padded_and_masked(
    ranks: GetRanks, world: World, length: int, multiple_of: int
) -> None:
    found = ranks(world).run(programs.shards, length, multiple_of)
    n = found[0][0].shape[1]
    assert n % multiple_of == 0
    assert 0 <= n * world.size - length < world.size * multiple_of
    x = torch.arange(2 * length).view(2, length)
    padding = n * world.size - length
    padded = torch.cat([x, x.new_zeros(2, padding)], 1)
    for rank, (rows, mask, whole) in enumerate(found):
        here = slice(rank * n, rank * n + n)
        assert torch.equal(rows, padded[:, here])
        assert torch.equal(whole, x)
        if padding:
            assert mask.tolist() == [[p >= length for p in range(here.start, here.stop)]] * 2
        else:
            assert mask is None


@pytest.mark.parametrize("world", worlds(2, 3, 4))
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("another sequence", "digest of x: "),
        ("one bit", "digest of x: "),
        ("floats", "digest of x: "),
        ("another mask", "digest of key_padding_mask: "),
        ("another length", "shape of x: "),
    ],
)
def test_ranks_that_hold_different_sequences_are_told_when_these_are_cut(
    ranks: GetRanks, world: World, what: str, named: str
) -> None:
    outcomes = ranks(world).outcomes(programs.sampled, what)
    errors = {str(outcome.error) for outcome in outcomes}
    assert all(isinstance(outcome.error, RankMismatchError) for outcome in outcomes)
    assert len(errors) == 1
    assert f"Got {named}" in errors.pop()
    assert outcomes[0].error.ranks[-1] == world.size - 1
    rows = ranks(world).run(programs.sampled, "the same")
    assert torch.cat(rows, 1)[:, :8].tolist() == [[*range(8)]]


@pytest.mark.parametrize("world", worlds(2))
def test_a_comparison_can_be_left_out(ranks: GetRanks, world: World) -> None:
    first, second = ranks(world).run(programs.sampled, "not compared")
    assert second[0, 0] != first[0, 0] + 4


@pytest.mark.parametrize("world", worlds(3, 4))
def test_a_rank_outside_of_a_new_group_is_told_so(ranks: GetRanks, world: World) -> None:
    for rank, said in enumerate(ranks(world).run(programs.outside)):
        assert (f"group must hold this process, rank {rank}" in said) == (rank > 1)


@pytest.mark.parametrize("world", worlds(1, 2, 4))
@pytest.mark.parametrize("how", ["all ranks", "world", "ring of one", "ring", "group"])
def test_a_module_goes_through_a_file(ranks: GetRanks, world: World, how: str) -> None:
    for said, off in ranks(world).run(programs.through_a_file, how):
        assert ("which cannot hold its group of ranks" in said) == (how == "group")
        assert off == 0


@pytest.mark.parametrize("world", worlds(1, 2, 3, 4))
@pytest.mark.parametrize("holders", ["last", "all", "none"])
def test_a_loss_that_one_rank_has_is_the_loss_of_all(
    ranks: GetRanks, world: World, holders: str
) -> None:
    """The mean of shares and of their gradients is what one process has."""
    x = torch.randn(1, 12, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x.requires_grad_()
    out = RingDilatedAttention(PATTERN)(x, x, x, is_causal=True)
    n = 12 // world.size
    parts = [out[:, rank * n : rank * n + n].square() for rank in range(world.size)]
    if holders == "last":
        true = parts[-1][:, -1].sum() / 3
    else:  # each has as many targets as its number says
        total = sum(range(1, world.size + 1))
        true = sum(part.sum() * (rank + 1) for rank, part in enumerate(parts)) / total
    (expected,) = torch.autograd.grad(true, x)
    found = ranks(world).run(programs.share_loss, x.detach(), holders)
    if holders == "none":
        assert all(share == 0 and not grad.any() for share, grad in found)
        return
    mean = sum(share for share, _ in found) / world.size
    assert mean == pytest.approx(true.item(), rel=1e-12)
    # Each rank has the gradient to its rows, of the sum over ranks of the shares.
    grad = torch.cat([grad for _, grad in found], 1) / world.size
    assert relative_error(grad, expected) < 1e-12


@pytest.mark.parametrize("world", worlds(1, 2, 3, 4))
@pytest.mark.parametrize("length", [12, 13])
def test_padding_of_targets_is_no_target(ranks: GetRanks, world: World, length: int) -> None:
    """The recipe of the README gives the loss of one process where the length does not divide."""
    generator = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(7, (2, length), generator=generator) for _ in "tl")
    labels[0, :5] = -100
    table, hidden = programs.recipe_model(tokens, None)
    logits = (hidden @ table.T).flatten(0, 1)
    true = torch.nn.functional.cross_entropy(logits, labels.flatten())
    (expected,) = torch.autograd.grad(true, table)
    found = ranks(world).run(programs.loss_of_recipe, tokens, labels)
    assert sum(loss for loss, _ in found) / world.size == pytest.approx(true.item(), rel=1e-12)
    mean = torch.stack([grad for _, grad in found]).mean(0)
    assert relative_error(mean, expected) < 1e-12


def test_a_shared_loss_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"loss must have shape \(\). Got \(3,\)"):
        shared_loss(torch.ones(3), torch.ones(2))
    rows = torch.full((2,), torch.nan, requires_grad=True)
    shared_loss(None, rows).backward()
    assert rows.grad.tolist() == [0, 0]


@pytest.mark.parametrize("world", worlds(4))
def test_a_mesh_of_data_and_sequence_is_not_taken_for_one_of_nodes(
    ranks: GetRanks, world: World
) -> None:
    group = ranks(world)
    for said in group.run(programs.whole_mesh, ("data", "sequence")):
        assert "one dimension of a mesh, as mesh['sequence']" in said
        assert "Got dimensions ('data', 'sequence')." in said
    for names in (None, ("nodes", "ranks")):
        assert group.run(programs.whole_mesh, names) == [""] * 4


def test_a_digest_tells_any_bit_anywhere() -> None:
    x = torch.randint(0, 9, (3, 5000), generator=torch.Generator().manual_seed(0))
    seen = {
        digest(x),
        digest(x.T),
        digest(x.roll(1, 1)),
        digest(x.flip(1)),
        digest(x.to(torch.int32)),
    }
    for place in (0, 4095, 4096, 14999):
        for change in (1, -1, 1 << 62):
            other = x.clone()
            other.view(-1)[place] += change
            seen.add(digest(other))
    assert len(seen) == 5 + 12
    assert digest(x.T.T) == digest(x)
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64):
        y = torch.zeros(7, dtype=dtype)
        assert digest(y) != digest(y.index_fill(0, torch.tensor(6), 1))


@pytest.mark.parametrize("world", worlds(3))
def test_positions_count_through_the_ranks(ranks: GetRanks, world: World) -> None:
    found = ranks(world).run(programs.positions, 5)
    assert [position for rank in found for position in rank] == list(range(15))


@pytest.mark.parametrize("world", worlds(1, 3))
def test_positions_begin_anew_in_each_document(ranks: GetRanks, world: World) -> None:
    ends = [0, 4, 4, 7]
    found = ranks(world).run(programs.positions, 12 // world.size, ends)
    expected = [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert [position for rank in found for position in rank] == expected


@pytest.mark.parametrize("world", worlds(1, 2, 3))
@pytest.mark.parametrize("ring_size", [None, 1])
def test_a_module_attends_documents(ranks: GetRanks, world: World, ring_size: int | None) -> None:
    assert max(ranks(world).run(programs.attend_documents, ring_size)) < 1e-10


@pytest.mark.parametrize(("world", "mesh"), [
    *((pytest.param(*world.values, False, marks=world.marks)) for world in worlds(2)),
    *((pytest.param(*world.values, True, marks=world.marks)) for world in worlds(4)),
])  # fmt: skip
@pytest.mark.parametrize("how", ["gather", "ring", "refused", "broken"])
def test_a_group_that_is_destroyed_is_kept_by_nothing(
    ranks: GetRanks, world: World, mesh: bool, how: str
) -> None:
    assert ranks(world).run(programs.destroy_groups, mesh, how) == [([], 0)] * world.size


@pytest.mark.parametrize("world", worlds(2, 4))
@pytest.mark.parametrize("strategy", ["gather", "lend", "ring"])
def test_buffers_are_given_back_and_not_used_after(
    ranks: GetRanks, world: World, strategy: str
) -> None:
    for lent, all_back, same in ranks(world).run(programs.use_buffers, strategy):
        assert lent > 0
        assert all_back
        assert same


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RingDilatedAttention([4]), "pattern must be an AttentionPattern"),
        (lambda: RingDilatedAttention(PATTERN, dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: RingDilatedAttention(PATTERN, dropout="a"), "dropout must be a float. Got 'a'"),
        (lambda: RingDilatedAttention(PATTERN, dropout=True), "dropout must be a float. Got True"),
        (lambda: RingDilatedAttention(PATTERN, scale="x"), "scale must be a float or None"),
        (lambda: RingDilatedAttention(PATTERN, strategy="fast"), "strategy must be one of"),
        (lambda: RingDilatedAttention(PATTERN, validate="maybe"), "validate must be one of"),
        (lambda: RingDilatedAttention(PATTERN, ring_size=0), "ring_size must be positive"),
        (lambda: RingDilatedAttention(PATTERN, ring_size=2.0), "ring_size must be an int"),
        (lambda: shard_sequence(torch.ones(2, 3), multiple_of=0), "multiple_of must be positive"),
        (lambda: shard_sequence(torch.ones(2, 3), validate="first"), "validate must be 'always'"),
        (lambda: shard_sequence(torch.ones(2, 3), dim=0), "dim must not be the batch dimension"),
        (lambda: shard_sequence(torch.ones(2, 3), dim=-2), "dim must not be the batch dimension"),
        (lambda: shard_sequence([[1, 2]]), "x must be a Tensor. Got list"),
        (lambda: shard_sequence(torch.ones(2)), "dim must be one of the 1 dimensions of x. Got 1"),
        (lambda: shard_sequence(torch.ones(2, 3), dim=1.0), "dim must be an int. Got 1.0"),
        (
            lambda: shard_sequence(torch.ones(2, 3), key_padding_mask=torch.zeros(2, 3)),
            "key_padding_mask must be a bool Tensor. Got torch.float32",
        ),
        (
            lambda: shard_sequence(torch.ones(2, 3), key_padding_mask=[1]),
            "key_padding_mask must be a bool Tensor. Got list",
        ),
        (lambda: shard_sequence(torch.ones(2, 3), fill=None), "fill must be a number. Got None"),
        (lambda: unshard_sequence([1]), "x must be a Tensor. Got list"),
        (lambda: unshard_sequence(torch.ones(2, 3), dim=2), "dim must be one of the 2 dimensions"),
        (lambda: unshard_sequence(torch.ones(2, 3), length=2.0), "length must be an int. Got 2.0"),
        (lambda: local_positions("a"), "length must be an int. Got 'a'"),
        (lambda: local_positions(-1), "length must not be negative. Got -1"),
        (
            lambda: local_positions(4, cu_seqlens=torch.tensor([0, 5])),
            r"cu_seqlens must rise from 0 to at most the rows of all ranks \(4\). Got \[0, 5\]",
        ),
        (lambda: shared_loss(3.0, torch.ones(2)), "loss must be a Tensor or None. Got float"),
        (lambda: shared_loss(None, None), "rows must be a Tensor of floating point. Got NoneType"),
        (
            lambda: shared_loss(None, torch.ones(2, dtype=torch.int64)),
            "rows must be a Tensor of floating point. Got torch.int64",
        ),
        (lambda: shared_loss(None, torch.ones(2), weight=-1), "weight must be finite and not neg"),
        (
            lambda: shared_loss(None, torch.ones(2), weight=torch.tensor(torch.nan)),
            "weight must be finite and not negative. Got nan",
        ),
        (
            lambda: shared_loss(None, torch.ones(2), weight=torch.ones(2)),
            r"weight must be a number or a Tensor of one. Got tensor\(\[1., 1.\]\)",
        ),
        (lambda: unshard_sequence(torch.ones(2, 3), length=4), "length must be between 0 and 3"),
        (lambda: local_positions(3, group=7), "group must be a ProcessGroup"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (torch.tensor([0.0, 4.0]), "cu_seqlens must be int32 or int64. Got torch.float32."),
        (torch.tensor([[0, 4]]), r"cu_seqlens must have shape \(documents \+ 1,\). Got \(1, 2\)"),
        (torch.tensor([1, 4]), r"must rise from 0 to at most .* \(4\). Got \[1, 4\]"),
        (torch.tensor([0, 3, 2, 4]), r"must rise from 0 .* Got \[0, 3, 2, 4\]"),
        (torch.tensor([0, 5]), r"must rise from 0 .* Got \[0, 5\]"),
        (torch.tensor([], dtype=torch.int64), r"must rise from 0 .* Got \[\]"),
        (torch.arange(99), "must rise from 0 .* Got 99 numbers from 0 to 98"),
        (4, "cu_seqlens must be a Tensor or a sequence of ints. Got int"),
    ],
)
def test_bad_documents_are_named(ends, message) -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        ring_attention(x, x, x, PATTERN, cu_seqlens=ends)


def test_documents_are_of_one_sequence_and_of_a_dilated_pattern() -> None:
    x, ends = torch.randn(2, 4, 2, 8), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"query must have shape \(1, .* Got \(2, 4, 2, 8\)"):
        ring_attention(x, x, x, PATTERN, cu_seqlens=ends)
    other = programs.FaultyPattern(PATTERN, "attend_span", "exception")
    with pytest.raises(ValueError, match=r"None unless pattern is a DilatedPattern.*FaultyPattern"):
        ring_attention(x[:1], x[:1], x[:1], other, cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"batch must be 1 with cu_seqlens. Got 2"):
        plan(PATTERN, length=4, world_size=2, heads=2, head_dim=8, batch=2, cu_seqlens=[0, 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fast"}, "strategy must be one of"),
        ({"validate": "maybe"}, "validate must be one of"),
        ({"is_causal": 1}, "is_causal must be a bool"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"buffers": 3}, "buffers must be a BufferSource"),
    ],
)
def test_bad_options_are_named(options, message) -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        ring_attention(x, x, x, DilatedPattern([4], [1]), **options)


NO_COMPILER = """
import sys
import torch
from dilated_core import DilatedPattern
from dilated_ring import RingMultiheadDilatedAttention, ring_attention, shard_sequence
from dilated_ring import shared_loss, unshard_sequence
store, rank, world = sys.argv[1], *map(int, sys.argv[2:])
init = torch.distributed.init_process_group
init("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
pattern = DilatedPattern([8, 64], [1, 2])
rows = shard_sequence(torch.ones(1, 8 * world, 2, 8)).rows.requires_grad_()
for strategy in ("auto", "gather", "heads", "lend", "ring"):
    ring_attention(rows, rows, rows, pattern, is_causal=True, strategy=strategy).sum().backward()
ends = torch.tensor([0, 3, 8 * world])
ring_attention(rows, rows, rows, pattern, cu_seqlens=ends).sum().backward()
out, _ = RingMultiheadDilatedAttention(16, 2, pattern, dropout=0.1)(rows.flatten(2))
shared_loss(unshard_sequence(out).sum(), out).backward()
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_call_imports_the_compiler_nor_does_its_backward(
    tmp_path: Path, world_size: int
) -> None:
    """Seconds of each process; and each ends well."""
    numpy = "ignore:Failed to initialize NumPy:UserWarning"  # which torch does not require
    command = [sys.executable, "-Werror", "-W", numpy, "-c", NO_COMPILER, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank), str(world_size)]) for rank in range(world_size)]
    assert [process.wait(60) for process in ranks] == [0] * world_size


def test_the_layers_print_their_arguments() -> None:
    layer = RingMultiheadDilatedAttention(48, 6, PATTERN, dropout=0.1, strategy="ring")
    assert "dropout=0.1" in repr(layer)
    assert "strategy='ring'" in repr(layer)
    assert "validate='off'" in repr(RingDilatedAttention(PATTERN, validate="off"))
    assert list(layer.buffers()) == []
