"""Learning-rate schedules over the progress of a run."""

import math

from dilated_factory.configs.models import TrainConfig


def learning_rate_factor(config: TrainConfig, step: int, progress: float) -> float:
    """The share of the peak learning rate that a step has: a ramp, then the schedule's fall.

    Args:
        config: of the run.
        step: steps behind this one.
        progress: share of the run behind this step, in steps or in time, from 0 to 1.
    """
    ramp, start = 1.0, config.warmup
    if config.warmup_steps is not None:
        # Of a run by the clock nobody knows the steps, so it falls from its beginning.
        start = config.warmup_steps / config.steps if config.steps else 0.0
        ramp = step / config.warmup_steps if config.warmup_steps else 1.0
    elif progress < start:
        ramp = progress / start
    # Never zero, so that the first step learns.
    return min(max(ramp, 0.05), 1.0) * _fall(config, max(progress - start, 0.0) / (1 - start))


def _fall(config: TrainConfig, done: float) -> float:
    """From 1 to 0 over what follows the warm-up."""
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * min(done, 1.0))) / 2
    length = config.decay if config.schedule == "wsd" else 1.0
    return min(max((1 - done) / length, 0.0), 1.0)
