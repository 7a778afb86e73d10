"""The public function: check on all ranks, pick a strategy, compute."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh

from dilated_core.extending import autocast, check_padding_mask, check_tensors
from dilated_core.interfaces import AttentionPattern, BufferSource, SpanCall
from dilated_ring._agreement import Fact, Validate, agree, check_validate
from dilated_ring._attention import Job, Pass, attend
from dilated_ring._exchange import Rows
from dilated_ring._faults import Call
from dilated_ring._heads import HeadsJob
from dilated_ring._nodes import NodeRows
from dilated_ring._routes import Problem, gather_routes, ring_routes
from dilated_ring._strategy import check_strategy, choose_strategy
from dilated_ring._topology import Ring, find_ring
from dilated_ring._trade import Trade, obstacle


class _Options(NamedTuple):
    """The arguments of a call that are not tensors."""

    pattern: AttentionPattern
    is_causal: bool
    scale: float | None
    dropout_p: float
    enable_gqa: bool
    return_lse: bool
    strategy: str
    buffers: BufferSource | None


# Collectives that run beside other work cannot be traced. This is torch.compiler.disable without
# the import of torch's compiler, which takes a second.
@_disable_dynamo
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: AttentionPattern,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    strategy: str = "auto",
    validate: Validate = "first",
    buffers: BufferSource | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a sequence that is spread over the ranks of a group, exact, with gradients.

    Rank p of P has the rows from p * n up to (p + 1) * n; each gets its rows of what one rank
    would compute for the whole sequence. Only rows that a pattern sees across ranks travel. Every
    rank must make the call, and every rank must run its backward.

    Args:
        query: (B, n, H, D), this rank's rows, as many on each; any dtype of `dilated_attention`.
        key: (B, n, H_kv, D).
        value: (B, n, H_kv, D).
        pattern: which keys a query sees, by positions in the whole sequence.
        group: the ranks: a process group, a mesh of one dimension, or of two (nodes, ranks of a
            node), where "gather" moves a row between nodes once for each node; all ranks when
            None. Without a group of at least two ranks, the pattern's own function computes.
        is_causal: hide the keys after each query.
        scale: factor on the scores; 1 / sqrt(D) when None.
        key_padding_mask: (B, n) bool, True = ignore; given on all ranks or on none.
        dropout_p: probability of dropping an attention weight, in [0, 1), on every call. The mask
            is that of one rank with the random state of rank 0.
        enable_gqa: allow H to be a multiple of H_kv.
        return_lse: also return the log-sum-exp.
        strategy: how rows travel: "gather" (all in one exchange), "heads" (ranks trade rows for
            heads, and back), "ring" (an exchange for each distance between ranks, two in memory
            at a time) or "auto"; see `choose_strategy`.
        validate: compare the arguments of all ranks in the "first" call of a group, "always" or
            never ("off").
        buffers: where messages live, e.g. a memory pool; torch when None.

    Returns:
        out (B, n, H, D) in query's dtype; with return_lse also lse (B, H, n), natural log,
        float32 or wider. A query that sees no key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
        RankMismatchError: the arguments differ by rank; the same on every rank.
        RingError: a rank failed, died or stalled; on every rank that is left.
    """
    check_validate(validate)
    options = _Options(
        pattern, is_causal, scale, dropout_p, enable_gqa, return_lse, strategy, buffers
    )
    ring = find_ring(group)
    if ring is None:
        _check(None, query, key, value, key_padding_mask, options)
        return pattern.spans.attend_whole(
            query, key, value,
            is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask,
            dropout_p=dropout_p, enable_gqa=enable_gqa, return_lse=return_lse,
        )  # fmt: skip
    seed = _agree(ring, query, key, value, key_padding_mask, options, validate)
    query, key, value = autocast(query, key, value)
    job = _job(ring, query, key, value, options, seed)
    out, lse = attend(job, query, key, value, key_padding_mask)
    return (out, lse) if return_lse else out


def _check(
    ring: Ring | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    options: _Options,
) -> None:
    """Raise unless the arguments of this rank are valid."""
    for name in ("is_causal", "enable_gqa", "return_lse"):
        if not isinstance(flag := getattr(options, name), bool):
            raise TypeError(f"{name} must be a bool. Got {flag!r}.")
    check_strategy(options.strategy)
    if not isinstance(options.pattern, AttentionPattern):
        raise TypeError(
            f"pattern must be an AttentionPattern. Got {type(options.pattern).__name__}."
        )
    if options.buffers is not None and not isinstance(options.buffers, BufferSource):
        raise TypeError(
            f"buffers must be a BufferSource or None. Got {type(options.buffers).__name__}."
        )
    check_tensors(query, key, value, enable_gqa=options.enable_gqa, dims=4)
    check_padding_mask(key_padding_mask, key.shape[0], key.shape[1], query.device)
    _number("dropout_p", options.dropout_p)
    if not 0.0 <= options.dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1). Got {options.dropout_p}.")
    if options.scale is not None:
        _number("scale", options.scale)
        if not math.isfinite(options.scale):
            raise ValueError(f"scale must be finite. Got {options.scale}.")
    if ring is None:
        return
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"key must have query's length {query.shape[1]}. Got {key.shape[1]}.")
    n = query.shape[1]
    options.pattern.spans.check(n * ring.world_size, n, query.shape[2])
    if options.strategy == "heads":
        reason = obstacle(_problem(ring, query, key, options))
        if reason is not None:
            raise ValueError(f"strategy must be able to serve the call. Got 'heads', but {reason}.")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a float. Got {value!r}.")


def _agree(
    ring: Ring,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    options: _Options,
    validate: Validate,
) -> Tensor | None:
    """Raise the same error on all ranks unless they are called alike; return the common seed."""
    error: Exception | None = None
    try:
        _check(ring, query, key, value, key_padding_mask, options)
    except (TypeError, ValueError) as found:
        error = found
    facts = _facts(ring, query, key, value, key_padding_mask, options)
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    with Call(ring.group, device, "arguments", ring.parts) as call:
        agree(call, facts, error, validate)
        if not options.dropout_p:
            return None
        # All ranks draw, so that their random states stay alike where they were.
        seed = torch.randint(2**62, (), device=device)
        call.step = "seed of dropout"
        first = dist.get_global_rank(ring.group, 0)
        work = dist.broadcast(seed, first, group=ring.group, async_op=True)
        assert work is not None
        call.wait(work)
        return seed


def _facts(
    ring: Ring,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    options: _Options,
) -> Mapping[str, Fact]:
    """What must be the same on all ranks."""
    facts: dict[str, Fact] = {}
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, Tensor):
            facts[f"shape of {name}"] = tuple(tensor.shape)
            facts[f"dtype of {name}"] = str(tensor.dtype)
            facts[f"gradient of {name}"] = torch.is_grad_enabled() and tensor.requires_grad
    if isinstance(options.pattern, AttentionPattern):
        facts["pattern"] = options.pattern.code
    facts["key_padding_mask"] = "none" if key_padding_mask is None else "given"
    facts["ranks of a node"] = ring.nodes.size if ring.nodes else None
    for name in ("is_causal", "scale", "dropout_p", "enable_gqa", "strategy"):
        facts[name] = getattr(options, name)
    return facts


def _problem(ring: Ring, query: Tensor, key: Tensor, options: _Options) -> Problem:
    _, length, heads, _ = query.shape
    return Problem(options.pattern, length, ring.world_size, heads, key.shape[2], options.is_causal)


def _job(
    ring: Ring, query: Tensor, key: Tensor, value: Tensor, options: _Options, seed: Tensor | None
) -> Pass:
    problem = _problem(ring, query, key, options)
    strategy = options.strategy
    if strategy == "auto":
        strategy = "gather" if ring.nodes else _chosen(problem)
    call = SpanCall(
        problem.span(ring.rank),
        problem.length,
        options.is_causal,
        query.shape[3] ** -0.5 if options.scale is None else float(options.scale),
        float(options.dropout_p),
        seed,
    )
    kind = options.pattern.code, strategy
    if strategy == "heads":
        return HeadsJob(call, ring, _trade(problem, ring.rank), options.buffers, kind)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    keeps = trains and strategy == "gather"
    rounds = _rounds(problem, ring, strategy)
    return Job(options.pattern.spans, call, ring, rounds, keeps, options.buffers, kind)


@lru_cache(maxsize=64)
def _rounds(problem: Problem, ring: Ring, strategy: str) -> tuple[Rows | NodeRows, ...]:
    routes = gather_routes if strategy == "gather" else ring_routes
    found = routes(problem, ring.rank)
    if found and strategy == "gather" and ring.nodes:
        return (NodeRows(problem, ring.rank, ring.nodes),)
    return tuple(Rows(route, problem.world_size) for route in found)


@lru_cache(maxsize=64)
def _trade(problem: Problem, rank: int) -> Trade:
    return Trade(problem, rank)


@lru_cache(maxsize=64)
def _chosen(problem: Problem) -> str:
    return choose_strategy(problem).strategy
