"""How rows travel, and why: a pure function of what all ranks agree on."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from dilated_core.extending import Choice, choose
from dilated_ring._routes import Problem, received_rows
from dilated_ring._trade import make_trade, obstacle

Strategy = Literal["auto", "gather", "heads", "ring"]
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
    "gather" does, for it has two exchanges in a row. Else "gather", unless the rows that arrive,
    which are kept for the backward, would take more memory than the rank's own queries, keys,
    values and outputs: then "ring".

    Raises:
        ValueError: a strategy is given that cannot serve the call.
    """
    obstacles = {"heads": obstacle(problem)}
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
        return {"gather": once}, {"heads": once, "ring": once}
    rank = problem.world_size - 1  # when causal, none receives more
    gathered = 2 * received_rows(problem, rank)
    if not gathered:
        alone = "no row travels"
        return {"gather": alone}, {"heads": alone, "ring": alone}
    slow = ""
    if can_trade:
        traded = make_trade(problem, rank).vectors
        moves = f"it moves {traded:,} vectors where gather moves {gathered:,}"
        if 2 * traded <= gathered:
            return {"heads": moves}, {"gather": moves, "ring": moves}
        slow = f"{moves}, in two exchanges"
    held = 2 * problem.shard * (problem.heads + problem.kv_heads)
    relation = "more" if gathered > held else "no more"
    fits = (
        f"gather receives {gathered:,} vectors, {relation} than the {held:,} of the rank's own "
        "queries, keys, values and outputs"
    )
    best, other = ("ring", "gather") if gathered > held else ("gather", "ring")
    return {best: fits}, {"heads": slow, other: fits}
