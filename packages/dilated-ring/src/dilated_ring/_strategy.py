"""How rows travel, and why: a pure function of what all ranks agree on."""

from dataclasses import dataclass
from typing import Literal, get_args

from dilated_ring._routes import Problem, received_rows
from dilated_ring._trade import Trade, obstacle

Strategy = Literal["gather", "heads", "ring"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class StrategyChoice:
    """How rows travel in a call.

    Attributes:
        strategy: its name.
        reason: why it was picked.
        rejected: for every other strategy, why it was not.
    """

    strategy: Strategy
    reason: str
    rejected: tuple[tuple[Strategy, str], ...]


def check_strategy(strategy: str) -> None:
    """Raise unless it is "auto" or the name of a strategy."""
    if strategy not in ("auto", *STRATEGIES):
        known = ", ".join(map(repr, ("auto", *STRATEGIES)))
        raise ValueError(f"strategy must be one of {known}. Got {strategy!r}.")


def choose_strategy(problem: Problem) -> StrategyChoice:
    """Pick how rows travel, by bytes and memory; alike on all ranks.

    "heads" where it can be and moves at most half of what "gather" does, for it has two exchanges
    in a row. Else "gather", unless the rows that arrive, which are kept for the backward, would
    take more memory than the rank's own queries, keys, values and outputs: then "ring".
    """
    rank = problem.world_size - 1  # when causal, none receives more
    gathered = 2 * received_rows(problem, rank)
    if not gathered:
        alone = "no row travels"
        return StrategyChoice("gather", alone, (("heads", alone), ("ring", alone)))
    held = 2 * problem.shard * (problem.heads + problem.kv_heads)
    relation = "more" if gathered > held else "no more"
    fits = (
        f"gather receives {gathered:,} vectors, {relation} than the {held:,} of the rank's own "
        "queries, keys, values and outputs"
    )
    impossible = obstacle(problem)
    if impossible is None:
        traded = Trade(problem, rank).vectors
        if 2 * traded <= gathered:
            reason = f"it moves {traded:,} vectors where gather moves {gathered:,}"
            return StrategyChoice("heads", reason, (("gather", reason), ("ring", reason)))
        impossible = (
            f"it moves {traded:,} vectors where gather moves {gathered:,}, in two exchanges"
        )
    if gathered > held:
        return StrategyChoice("ring", fits, (("gather", fits), ("heads", impossible)))
    return StrategyChoice("gather", fits, (("heads", impossible), ("ring", fits)))
