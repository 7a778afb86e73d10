"""Which queries a rank lends to ranks that have less to do: pure integers.

A rank that helps attends the queries that it is lent to its own keys, so that no key travels for
them; outputs come back. The owner attends them to all other keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dilated_core.extending import remembered
from dilated_core.interfaces import PackedRows
from dilated_ring._routes import Problem, Route

# To count them all takes memory and time that grow with the square of the ranks.
MOST_RANKS = 64
# Where shards of queries can be cut: in many ranks each has a smaller part of the pairs.
_CUTS = 128


class Loan(NamedTuple):
    """Queries that one rank lends to another, the last ones of its shard.

    Attributes:
        owner: whose queries they are.
        helper: who attends them to its own keys.
        queries: their positions.
    """

    owner: int
    helper: int
    queries: range


class Loans(NamedTuple):
    """All loans of a call.

    Attributes:
        loans: by owner and helper.
        alone: pairs of a query and a key that each rank attends without them.
        shared: the same with them.
    """

    loans: tuple[Loan, ...]
    alone: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def keys_each(self) -> float:
        """Pairs that move, for each query row that is lent."""
        moved = sum(max(0, a - b) for a, b in zip(self.alone, self.shared, strict=True))
        return moved / max(1, sum(len(loan.queries) for loan in self.loans))

    def rows_helped(self, rank: int) -> int:
        """Query rows that a rank is lent."""
        return sum(len(loan.queries) for loan in self.loans if loan.helper == rank)


def balance(work: Sequence[int]) -> float:
    """The mean over the largest."""
    return sum(work) / len(work) / max(work) if any(work) else 1.0


def cannot_lend(problem: Problem) -> str | None:
    """Why the pairs cannot be counted, or None if they can."""
    if getattr(problem.pattern.spans, "pair_counts", None) is None:
        return "the pattern cannot count what its queries see"
    if problem.world_size > MOST_RANKS:
        return f"what each rank sees is counted for at most {MOST_RANKS} ranks"
    if problem.length**2 * problem.heads >= 2**56:
        return "there are too many pairs of queries and keys to count"
    return None


@remembered(64)
def find_loans(problem: Problem) -> Loans:
    """Even out the pairs that ranks attend: those with most of them lend to those with fewest."""
    ranks = range(problem.world_size)
    if not problem.shard:
        return Loans((), *((0,) * len(ranks),) * 2)
    spans = problem.pattern.spans
    count = getattr(spans, "pair_counts", None)
    assert count is not None  # as cannot_lend says
    grain = getattr(spans, "grain", 1)
    parts = max(4, _CUTS // len(ranks))
    cuts = sorted({problem.shard * part // parts // grain * grain for part in range(parts)})
    edges = [problem.span(rank).start + cut for rank in ranks for cut in cuts]
    with unset_fake_temporarily():  # a dry run counts too
        pairs = count(
            torch.tensor([*edges, problem.length]),
            torch.arange(problem.world_size + 1) * problem.shard,
            problem.heads,
            is_causal=problem.is_causal,
        ).view(len(ranks), len(cuts), len(ranks))
        # Pairs of the last rows of a shard, from each cut on, with each rank's keys.
        lendable = pairs.flip(1).cumsum(1).flip(1).tolist()
        alone = pairs.sum((1, 2)).tolist()
    shared, mean = list(alone), sum(alone) // len(alone)
    found: list[Loan] = []
    for owner in sorted(ranks, key=lambda rank: (-alone[rank], rank)):
        for helper in sorted(ranks, key=lambda rank: (shared[rank], rank)):
            room = min(shared[owner] - mean, mean - shared[helper])
            if room * 50 <= mean:
                continue  # a message costs more than so few pairs
            sizes = [each[helper] for each in lendable[owner]]
            cut = min(range(len(cuts)), key=lambda cut: (abs(sizes[cut] - room), -cut))
            if sizes[cut] and sizes[cut] < 2 * room:
                span = problem.span(owner)
                found.append(Loan(owner, helper, range(span.start + cuts[cut], span.stop)))
                shared[owner] -= sizes[cut]
                shared[helper] += sizes[cut]
    return Loans(tuple(sorted(found)), tuple(alone), tuple(shared))


class Helped(NamedTuple):
    """Queries that this rank is lent.

    Attributes:
        queries: their positions.
        rows: where they are among all that arrive.
        packed: this rank's keys that they see.
    """

    queries: range
    rows: slice
    packed: PackedRows


class Lent(NamedTuple):
    """Queries that this rank lends.

    Attributes:
        own: their rows in the shard.
        rows: where they are among all that leave.
    """

    own: slice
    rows: slice


class Rest(NamedTuple):
    """Queries of this rank, the first ones, and the arrived keys that they see.

    Attributes:
        queries: their positions.
        packed: the rows of keys, by rank.
        keys: where they are among all that arrive.
    """

    queries: range
    packed: list[PackedRows]
    keys: slice


@dataclass(frozen=True, eq=False)
class Ledger:
    """The loans as one rank takes part in them.

    Attributes:
        helped: what it is lent, by owner.
        lent: what it lends, by helper.
        rests: what its other queries attend of other ranks, those that see the same ones at once.
        received, sent: query rows from, and to, each rank.
        route: keys for the queries that are not lent.
        heads: query heads.
    """

    helped: tuple[Helped, ...]
    lent: tuple[Lent, ...]
    rests: tuple[Rest, ...]
    received: list[int]
    sent: list[int]
    route: Route
    heads: int

    @property
    def vectors(self) -> int:
        """Vectors of head_dim that arrive before the attention: queries, keys and values."""
        return 2 * self.route.rows_received + sum(self.received) * self.heads


@remembered(64)
def make_ledger(problem: Problem, rank: int) -> Ledger:
    """The loans of a rank, and the keys that travel beside them."""
    loans = find_loans(problem).loans
    helped = [loan for loan in loans if loan.helper == rank]
    lent = [loan for loan in loans if loan.owner == rank]
    received, sent = [0] * problem.world_size, [0] * problem.world_size
    for loan in helped:
        received[loan.owner] = len(loan.queries)
    for loan in lent:
        sent[loan.helper] = len(loan.queries)
    own = problem.span(rank)
    route = _route(problem, rank, loans)
    return Ledger(
        tuple(Helped(loan.queries, rows, problem.rows(loan.queries, rank))
              for loan, rows in zip(helped, _slices(helped), strict=True)),
        tuple(Lent(slice(loan.queries.start - own.start, len(own)), rows)
              for loan, rows in zip(lent, _slices(lent), strict=True)),
        tuple(_rests(problem, rank, loans, route)), received, sent, route, problem.heads,
    )  # fmt: skip


def _rests(problem: Problem, rank: int, loans: Sequence[Loan], route: Route) -> Iterator[Rest]:
    queries = [_rest(loans, problem, rank, source) for source in route.sources]
    pairs = zip(queries, route.received, strict=True)
    first = 0
    for span, each in groupby(pairs, lambda pair: pair[0]):
        packed = [rows for _, rows in each]
        count = sum(rows.count for rows in packed)
        yield Rest(span, packed, slice(first, first + count))
        first += count


def _slices(loans: Sequence[Loan]) -> Iterator[slice]:
    ends = [0]
    for loan in loans:
        ends.append(ends[-1] + len(loan.queries))
    return (slice(*edges) for edges in pairwise(ends))


def _rest(loans: Sequence[Loan], problem: Problem, owner: int, helper: int) -> range:
    """The queries of one rank that attend the keys of another themselves."""
    own = problem.span(owner)
    for loan in loans:
        if (loan.owner, loan.helper) == (owner, helper):
            return range(own.start, loan.queries.start)
    return own


def _route(problem: Problem, rank: int, loans: Sequence[Loan]) -> Route:
    def sees(reader: int, source: int) -> PackedRows | None:
        queries = _rest(loans, problem, reader, source)
        if not queries or reader == source or source not in problem.sources(reader):
            return None
        rows = problem.rows(queries, source)
        return rows if rows.count else None

    ranks = range(problem.world_size)
    received = {other: rows for other in ranks if (rows := sees(rank, other))}
    sent = {other: rows for other in ranks if (rows := sees(other, rank))}
    return Route(tuple(received), tuple(received.values()), tuple(sent), tuple(sent.values()))
