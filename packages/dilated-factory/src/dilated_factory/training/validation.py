"""Which held-out tokens a run looks at while it trains."""

import torch
from torch import Tensor

from dilated_factory.errors import CorpusError


def validation_starts(length: int, context: int, max_tokens: int, multiple: int) -> Tensor:
    """Where windows of context + 1 held-out tokens start, spread evenly: int64.

    Args:
        length: tokens that are held out.
        context: inputs of a window.
        max_tokens: about how many tokens are predicted; one window at least.
        multiple: of what number there must be windows.

    Raises:
        CorpusError: not one window fits.
    """
    if length < context + 1:
        raise CorpusError(
            f"held-out data must hold at least context + 1 = {context + 1} tokens to validate on. "
            f"Got {length}."
        )
    count = -(-max(1, max_tokens // context) // multiple) * multiple
    return torch.linspace(0, length - context - 1, count, dtype=torch.float64).to(torch.int64)
