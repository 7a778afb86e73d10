"""All ranks compare what they were called with before anything is exchanged.

One all-reduce of three numbers tells every rank whether all are well and alike; only if not, the
details are gathered, and every rank raises the same error.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import torch
import torch.distributed as dist
from torch import Tensor

import dilated_core
from dilated_ring.__about__ import __version__
from dilated_ring._errors import RankMismatchError
from dilated_ring._faults import Call
from dilated_ring._topology import Ring, device_of

Validate = Literal["first", "always", "off"]
Fact = str | int | float | bool | None | Sequence[int]


def check_validate(validate: str) -> None:
    """Raise unless it is one of the three words."""
    if validate not in get_args(Validate):
        raise ValueError(f"validate must be one of {get_args(Validate)}. Got {validate!r}.")


def agree(
    call: Call,
    facts: Mapping[str, Fact],
    error: Exception | None = None,
    validate: Validate = "always",
    rest: Mapping[str, Fact] | None = None,
) -> None:
    """Raise the same error on every rank unless all are well and called alike.

    Args:
        call: the call in which to compare, before its first exchange.
        facts: what decides which rows travel, by name; the name of the call is added.
        error: what is wrong with the arguments of this rank, if anything is.
        validate: compare `facts`, and the `rest` in each call ("always") or in the first of the
            group ("first"); or nothing ("off").
            A rank cannot decide by what it knows alone, or it would compare with nobody; so it is
            the number of the call that decides, not whether the facts are new.
        rest: what must be the same on all ranks beside them; versions are added.

    Raises:
        RankMismatchError: ranks differ, or arguments are invalid on some ranks only.
        Exception: `error` itself, if it is the same on all ranks, or where nothing is compared.
    """
    if validate == "off":
        if error is not None:
            call.refuse(error)
        return
    compared: dict[str, Fact] = {"call": call.name, **facts}
    if rest is not None and (validate == "always" or not call.line.agreed):
        compared |= {**rest, **_VERSIONS}
    record = json.dumps(
        {
            "error": error and f"{type(error).__name__}: {error}",
            "facts": {name: _text(fact) for name, fact in compared.items()},
        }
    )
    call.step = "comparison of arguments"
    if not _alike(call, record, error is not None):
        records = [json.loads(text) for text in _gather_texts(call, record)]
        _raise_mismatch(call, records, error)
    if rest is not None:
        call.line.agreed += 1


def problem_of(check: Callable[..., object], *arguments: object) -> Exception | None:
    """What a check finds wrong with the arguments of this rank."""
    try:
        check(*arguments)
    except (TypeError, ValueError) as error:
        return error
    return None


def refuse_alike(ring: Ring | None, like: object, name: str, error: Exception) -> NoReturn:
    """Raise what is wrong with the arguments of this rank, also where the others compare theirs.

    Args:
        ring: the ranks; None where there is one.
        like: a tensor of this rank's, if it is one.
        name: of the call.
        error: what is wrong.
    """
    if ring is not None:
        with Call(ring.group, device_of(ring.group, like), name) as call:
            agree(call, {}, error)
    raise error


_VERSIONS = {
    "version of torch": torch.__version__,
    "version of dilated-core": dilated_core.__version__,
    "version of dilated-ring": __version__,
}


def _text(fact: Fact) -> str:
    return (
        str(tuple(fact)) if isinstance(fact, Sequence) and not isinstance(fact, str) else str(fact)
    )


def _alike(call: Call, record: str, failed: bool) -> bool:
    digest = hashlib.sha256(record.encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    # The largest of n and -n are n and -n on every rank only if all ranks have the same n.
    status = torch.tensor([int(failed), number, -number], device=call.device)
    _largest(call, status)
    worst, most, negated_least = status.tolist()
    return not worst and most == -negated_least


def _gather_texts(call: Call, text: str) -> list[str]:
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=call.device)
    size = torch.tensor([len(data)], device=call.device)
    _largest(call, size)
    padded = data.new_zeros(int(size))
    padded[: len(data)] = data
    gathered = [torch.empty_like(padded) for _ in call.line.ranks]
    call.wait(dist.all_gather(gathered, padded, group=call.group, async_op=True))
    return [bytes(part.tolist()).rstrip(b"\0").decode() for part in gathered]


def _largest(call: Call, numbers: Tensor) -> None:
    group, most = call.group, dist.ReduceOp.MAX
    if call.device.type == "cuda":
        call.wait(dist.all_reduce(numbers, most, group=group, async_op=True))
        return
    # On gloo a fourth of the time of an all-reduce among four ranks.
    first = call.line.ranks[0]
    call.wait(dist.reduce(numbers, first, most, group=group, async_op=True))
    call.wait(dist.broadcast(numbers, first, group=group, async_op=True))


def _raise_mismatch(call: Call, records: list[dict[str, Any]], error: Exception | None) -> None:
    ranks = call.line.ranks
    errors = [record["error"] for record in records]
    if error is not None and len(set(errors)) == 1:
        call.refused = error
        raise error
    if any(errors):
        invalid = {rank: text for rank, text in zip(ranks, errors, strict=True) if text}
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in invalid.items())
        raise RankMismatchError(
            f"the arguments are invalid on some ranks. Got {listed}",
            ranks=tuple(invalid),
            step=call.where,
        ) from error
    differing: dict[str, dict[str, list[int]]] = {}
    calls = {record["facts"]["call"] for record in records}
    for name in dict.fromkeys(name for record in records for name in record["facts"]):
        holders: dict[str, list[int]] = {}
        for rank, record in zip(ranks, records, strict=True):
            # Where ranks are in different calls, what only one of them compares tells nothing.
            if name in record["facts"] or len(calls) == 1:
                holders.setdefault(record["facts"].get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            differing[name] = holders
    listed = "; ".join(f"{name}: {_listed(holders)}" for name, holders in differing.items())
    others = {
        rank
        for holders in differing.values()
        for value in list(holders.values())[1:]
        for rank in value
    }
    raise RankMismatchError(
        f"all ranks must be called alike. Got {listed}.", ranks=sorted(others), step=call.where
    )


def _listed(holders: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(
        f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        for value, ranks in holders.items()
    )
