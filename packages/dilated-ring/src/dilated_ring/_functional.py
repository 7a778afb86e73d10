"""The public function: check on all ranks, pick a strategy, compute."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_core.extending import Scores, autocast, check_call, pick, remembered, uncompiled
from dilated_core.interfaces import AttentionPattern, BufferSource, SpanCall
from dilated_ring._agreement import Fact, Validate, agree, check_validate
from dilated_ring._attention import Job, Pass, attend
from dilated_ring._documents import summary, whole_pattern
from dilated_ring._exchange import Rows
from dilated_ring._faults import Call
from dilated_ring._heads import HeadsJob
from dilated_ring._lending import LendJob
from dilated_ring._loans import cannot_lend, make_ledger
from dilated_ring._nodes import NodeRows
from dilated_ring._routes import Problem, gather_routes, ring_routes
from dilated_ring._strategy import STRATEGIES, Strategy, check_strategy, choose_strategy
from dilated_ring._topology import Ring, find_ring
from dilated_ring._trade import make_trade, obstacle

_OBSTACLES: dict[str, Callable[[Problem], str | None]] = {"heads": obstacle, "lend": cannot_lend}


class _Given(NamedTuple):
    """The arguments of a call, as they were given.

    Attributes:
        tensors: query, key, value.
        options: what `check_call` checks beside them.
        pattern, strategy, buffers, cu_seqlens: as in `ring_attention`.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]
    pattern: AttentionPattern
    strategy: Strategy
    buffers: BufferSource | None
    cu_seqlens: Tensor | None


# Collectives that run beside other work cannot be traced.
@uncompiled
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AttentionPattern,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    strategy: Strategy = "auto",
    validate: Validate = "first",
    buffers: BufferSource | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a sequence that is spread over the ranks of a group, exact, with gradients.

    Rank p of P has the rows from p * n up to (p + 1) * n; each gets its rows of what one rank
    would compute for the whole sequence. Only rows that a pattern sees across ranks travel. Every
    rank must make the call, and every rank must run its backward.

    Shapes: batch B, rows of this rank n, heads H, key and value heads H_kv, width of a head D,
    packed sequences S.

    Args:
        query: (B, n, H, D), this rank's rows, as many on each; any dtype of `dilated_attention`.
        key: (B, n, H_kv, D).
        value: (B, n, H_kv, D).
        pattern: which keys a query sees, by positions in the whole sequence.
        group: the ranks: a process group, a mesh of one dimension, or of two ("nodes", ranks of a
            node), where "gather" moves a row between nodes once for each node; all ranks when
            None. Without a group of at least two ranks, the pattern's own function computes.
        cu_seqlens: (S + 1,) int32 or int64, on any device, the same on all ranks: 0, then the end
            of each of S documents in the whole sequence, which may lie across ranks. A dilated
            pattern begins anew in each, as in `dilated_attention_varlen`. B must be 1; rows behind
            the last end are padding. Its numbers are read on the host.
        is_causal: hide the keys after each query.
        scale: factor on the scores; 1 / sqrt(D) when None.
        key_padding_mask: (B, n) bool, True = ignore; given on all ranks or on none.
        dropout_p: probability of dropping an attention weight, in [0, 1), on every call. The mask
            is that of one rank with the random state of rank 0.
        enable_gqa: allow H to be a multiple of H_kv.
        return_lse: also return the log-sum-exp.
        strategy: how rows travel: "gather" (all in one exchange), "heads" (ranks trade rows for
            heads, and back), "ring" (an exchange for each distance between ranks, two in memory
            at a time), "lend" (as "gather", but ranks with less to do attend queries of others to
            their own keys) or "auto": in a mesh of two dimensions "gather"; else "heads" where it
            moves at most half of what "gather" does; else "lend" where ranks would be uneven and
            it pays; else "gather", or "ring" where the rows that arrive would take more memory
            than query, key, value and output of the rank.
        validate: compare what decides which rows travel in each forward and backward, and all else
            in the "first" call of a group or "always"; or nothing ("off"), which is for ranks
            that cannot differ: rows that do not fit then end processes, or are wrong.
        buffers: where messages live, e.g. a memory pool; torch when None.

    Returns:
        out (B, n, H, D) in query's dtype; with return_lse also lse (B, H, n), natural log,
        float32 or wider. A query that sees no key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
        RankMismatchError: the arguments differ by rank; the same on every rank.
        RingError: a rank failed, died or stalled; on every rank that is left.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> rows, padding = shard_sequence(torch.randn(1, 60, 4, 16), multiple_of=16)
        >>> pattern = DilatedPattern([16, 64], [1, 4])
        >>> ring_attention(rows, rows, rows, pattern, key_padding_mask=padding).shape
        torch.Size([1, 64, 4, 16])
    """
    check_validate(validate)
    options: dict[str, Any] = {
        "is_causal": is_causal, "scale": scale, "key_padding_mask": key_padding_mask,
        "dropout_p": dropout_p, "enable_gqa": enable_gqa, "return_lse": return_lse,
    }  # fmt: skip
    given = _Given((query, key, value), options, pattern, strategy, buffers, cu_seqlens)
    ring = find_ring(group)
    if ring is None:
        _check_ways(given)
        check_call(query, key, value, **options)
        whole = whole_pattern(pattern, query, cu_seqlens, query.shape[1])
        return whole.spans.attend_whole(query, key, value, **options)
    scores, agreed = _agree(ring, given, validate)
    query, key, value = autocast(query, key, value)
    job = _job(ring, query, key, value, given, scores, agreed)
    out, lse = attend(job, query, key, value, key_padding_mask)
    return (out, lse) if return_lse else out


def _check_ways(given: _Given) -> None:
    """Raise unless what ring adds to a call is valid."""
    check_strategy(given.strategy)
    if not isinstance(given.pattern, AttentionPattern):
        raise TypeError(f"pattern must be an AttentionPattern. Got {type(given.pattern).__name__}.")
    if given.buffers is not None and not isinstance(given.buffers, BufferSource):
        raise TypeError(
            f"buffers must be a BufferSource or None. Got {type(given.buffers).__name__}."
        )


def _check(ring: Ring, given: _Given) -> Scores:
    """Raise unless the arguments of this rank are valid."""
    _check_ways(given)
    scores = check_call(*given.tensors, **given.options)
    query, key, _ = given.tensors
    n = query.shape[1]
    if n != key.shape[1]:
        raise ValueError(f"key must have query's length {n}. Got {key.shape[1]}.")
    pattern = whole_pattern(given.pattern, query, given.cu_seqlens, n * ring.world_size)
    pattern.spans.check(n * ring.world_size, n, query.shape[2])
    if given.strategy in _OBSTACLES:
        problem = _problem(ring, query, key, pattern, scores)
        name: str = given.strategy
        obstacles = {name: _OBSTACLES[name](problem)}
        pick("strategy", name, STRATEGIES, {}, obstacles)
    return scores


def _agree(ring: Ring, given: _Given, validate: Validate) -> tuple[Scores, int | None]:
    """Raise the same error on all ranks unless they are called alike; add the common seed.

    Returns:
        What to do with the scores, and the number of this call among those that were compared.
    """
    scores, error = None, None
    try:
        scores = _check(ring, given)
    except (TypeError, ValueError) as found:
        error = found
    query = given.tensors[0]
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    with Call(ring.group, device, "forward", ring.parts) as call:
        agree(call, _facts(ring, given), error, validate, _rest(given))
        assert scores is not None
        # All ranks draw, so that their random states stay alike where they were.
        scores = scores.seeded(device)
        if scores.seed is not None:
            call.step = "seed of dropout"
            first = dist.get_global_rank(ring.group, 0)
            work = dist.broadcast(scores.seed, first, group=ring.group, async_op=True)
            assert work is not None
            call.wait(work)
        return scores, None if validate == "off" else call.line.agreed


def _facts(ring: Ring, given: _Given) -> Mapping[str, Fact]:
    """What decides which rows travel."""
    facts: dict[str, Fact] = {}
    for name, tensor in zip(("query", "key", "value"), given.tensors, strict=True):
        if isinstance(tensor, Tensor):
            facts[f"shape of {name}"] = tuple(tensor.shape)
            facts[f"dtype of {name}"] = str(tensor.dtype)
            facts[f"gradient of {name}"] = torch.is_grad_enabled() and tensor.requires_grad
            facts["autocast"] = _autocast_of(tensor.device.type)
    if isinstance(given.pattern, AttentionPattern):
        facts["pattern"] = given.pattern.code
    masked = given.options["key_padding_mask"] is not None
    facts["key_padding_mask"] = "given" if masked else "none"
    facts["cu_seqlens"] = summary(given.cu_seqlens)
    facts["ranks of a node"] = ring.node_size
    for name in ("is_causal", "dropout_p"):
        facts[name] = given.options[name]
    return facts | {"strategy": given.strategy}


def _autocast_of(device: str) -> str:
    on = device != "meta" and torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)) if on else "off"


def _rest(given: _Given) -> Mapping[str, Fact]:
    """What must be the same on all ranks beside that."""
    return {name: given.options[name] for name in ("scale", "enable_gqa")}


def _problem(
    ring: Ring, query: Tensor, key: Tensor, pattern: AttentionPattern, scores: Scores
) -> Problem:
    _, length, heads, _ = query.shape
    return Problem(pattern, length, ring.world_size, heads, key.shape[2], scores.is_causal)


def _job(
    ring: Ring, query: Tensor, key: Tensor, value: Tensor, given: _Given, scores: Scores,
    agreed: int | None,
) -> Pass:  # fmt: skip
    length, buffers = query.shape[1] * ring.world_size, given.buffers
    pattern = whole_pattern(given.pattern, query, given.cu_seqlens, length)
    problem = _problem(ring, query, key, pattern, scores)
    strategy = given.strategy
    if strategy == "auto":
        strategy = _chosen(problem, ring.node_size is not None)
    call = SpanCall(
        problem.span(ring.rank), problem.length, scores.is_causal, scores.scale,
        scores.dropout_p, scores.seed,
    )  # fmt: skip
    kind = given.pattern.code, strategy  # documents change from call to call
    if strategy == "heads":
        return HeadsJob(call, ring, make_trade(problem, ring.rank), buffers, kind, agreed)
    if strategy == "lend":
        ledger = make_ledger(problem, ring.rank)
        return LendJob(pattern.spans, call, ring, ledger, buffers, kind, agreed)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    keeps = trains and strategy == "gather"
    rounds = _rounds(problem, ring.rank, ring.node_size, strategy)
    return Job(pattern.spans, call, ring, rounds, keeps, buffers, kind, agreed)


# By numbers, not by the ring: a cache that held process groups would keep them for ever.
@remembered(64)
def _rounds(
    problem: Problem, rank: int, node_size: int | None, strategy: Strategy
) -> tuple[Rows | NodeRows, ...]:
    routes = gather_routes if strategy == "gather" else ring_routes
    found = routes(problem, rank)
    if found and strategy == "gather" and node_size is not None:
        return (NodeRows(problem, rank, node_size),)
    return tuple(Rows(route, problem.world_size) for route in found)


@remembered(64)
def _chosen(problem: Problem, in_nodes: bool) -> Strategy:
    return choose_strategy(problem, in_nodes=in_nodes).strategy
