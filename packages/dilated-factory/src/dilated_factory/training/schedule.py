"""Learning-rate schedule over the progress of a run."""


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up over the first ``warmup`` share of the run, then linear decay to zero.

    ``progress`` is the share of the run behind this step, in steps or in time, from 0 to 1.
    """
    if progress < warmup:
        # Never zero, so that the first step learns.
        return max(progress / warmup, 0.05)
    return max((1 - progress) / (1 - warmup), 0.0)
