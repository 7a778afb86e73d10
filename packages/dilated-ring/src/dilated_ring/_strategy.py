"""How rows travel, and why: a pure function of what all ranks agree on."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from dilated_core.extending import Choice, choose
from dilated_ring._loans import balance, cannot_lend, find_loans, make_ledger
from dilated_ring._routes import Problem, hops, received_rows
from dilated_ring._trade import make_trade, obstacle

Strategy = Literal["auto", "gather", "heads", "lend", "ring"]
# Of the mean work of the ranks and the largest.
_EVEN = 0.9
# A query that is lent travels, and so do results and gradients: five vectors in all.
_KEYS_EACH = 256
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)[1:]


@dataclass(frozen=True)
class StrategyChoice(Choice):
    """How rows travel in a call: a `Choice`, whose name is `strategy` as well."""

    @property
    def strategy(self) -> Strategy:
        """Its name; never "auto"."""
        return cast(Strategy, self.name)


def check_strategy(strategy: object) -> None:
    """Raise unless it is "auto" or the name of a strategy."""
    if strategy not in get_args(Strategy):
        known = ", ".join(map(repr, get_args(Strategy)))
        raise ValueError(f"strategy must be one of {known}. Got {strategy!r}.")


def choose_strategy(
    problem: Problem, strategy: Strategy = "auto", *, in_nodes: bool = False
) -> StrategyChoice:
    """Pick how rows travel, by bytes and memory; alike on all ranks.

    In a mesh of nodes "gather". Else "heads" where it can be and moves at most half of what
    "gather" does, for it has two exchanges in a row. Else "lend" where the ranks would be busy less
    than nine tenths as long as the busiest, it changes that, and each query that moves sees keys
    enough to pay for its way. Else "gather", unless the rows that arrive,
    which are kept for the backward, would take more memory than the rank's own queries, keys,
    values and outputs: then "ring".

    Raises:
        ValueError: a strategy is given that cannot serve the call.
    """
    obstacles = {"heads": obstacle(problem), "lend": cannot_lend(problem)}
    given: str | None = strategy
    reasons, others = dict[str, str](), dict[str, str]()
    if strategy == "auto":
        given = None
        reasons, others = _preference(problem, in_nodes, can_trade=obstacles["heads"] is None)
        others = {name: why for name, why in others.items() if obstacles.get(name) is None}
    return choose(StrategyChoice, "strategy", given, STRATEGIES, reasons, obstacles, others)


def _preference(
    problem: Problem, in_nodes: bool, *, can_trade: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """The strategy to take, with the reason, and the others, with what speaks against each."""
    if in_nodes:
        once = "a row crosses between nodes once for each node"
        return {"gather": once}, dict.fromkeys(("heads", "lend", "ring"), once)
    rank = problem.world_size - 1  # when causal, none receives more
    gathered = 2 * received_rows(problem, rank)
    if not gathered and not hops(problem):
        alone = "no row travels"
        return {"gather": alone}, dict.fromkeys(("heads", "lend", "ring"), alone)
    slow = ""
    if can_trade:
        traded = make_trade(problem, rank).vectors
        moves = f"it moves {traded:,} vectors where gather moves {gathered:,}"
        if 2 * traded <= gathered:
            return {"heads": moves}, dict.fromkeys(("gather", "lend", "ring"), moves)
        slow = f"{moves}, in two exchanges"
    held = 2 * problem.shard * (problem.heads + problem.kv_heads)
    pays, even = _lending(problem, held)
    if pays:
        return {"lend": even}, {"heads": slow, "gather": even, "ring": even}
    relation = "more" if gathered > held else "no more"
    fits = (
        f"gather receives {gathered:,} vectors, {relation} than the {held:,} of the rank's own "
        "queries, keys, values and outputs"
    )
    best, other = ("ring", "gather") if gathered > held else ("gather", "ring")
    return {best: fits}, {"heads": slow, "lend": even, other: fits}


def _lending(problem: Problem, held: int) -> tuple[bool, str]:
    """Whether to lend queries, and why, or why not."""
    if problem.shard < _KEYS_EACH:
        return False, f"no query sees {_KEYS_EACH} keys of another rank"
    why = cannot_lend(problem)
    if why is not None:
        return False, why
    found = find_loans(problem)
    alone, shared = balance(found.alone), balance(found.shared)
    works = (
        f"the ranks' mean work is {alone:.2f} of the largest, and {shared:.2f} with queries lent"
    )
    if alone >= _EVEN or shared < _EVEN:
        return False, works
    ranks = range(problem.world_size)
    keys = found.keys_each / problem.heads
    if keys < _KEYS_EACH:
        return False, f"{works}, each of which sees {keys:.0f} keys where it is lent"
    arriving = problem.heads * max(found.rows_helped(rank) for rank in ranks)
    if arriving <= held:
        ledgers = (make_ledger(problem, rank) for rank in ranks)
        arriving = max(ledger.vectors for ledger in ledgers)
    if arriving > held:
        return False, f"{works}, but a rank would receive {arriving:,} vectors, and has {held:,}"
    return True, works
