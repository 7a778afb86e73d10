"""What one attention call is asked to compute."""

from typing import NamedTuple

from torch import Tensor

from dilated_core.extending import Scores
from dilated_sparse._blocks import Layout


class BlockCall(NamedTuple):
    """A checked call of block-sparse attention, beside its tensors.

    Attributes:
        layout: which keys a query sees.
        scores: what to do with the scores.
        positions: (N,) and (M,) int64, of the queries and keys, which key the dropout mask where
            the rows are not a sequence of their own; only the torch backend reads them.
    """

    layout: Layout
    scores: Scores
    positions: tuple[Tensor, Tensor] | None = None

    @property
    def query_start(self) -> int:
        """Position of the first query: when causal, the queries end where the keys end."""
        return self.layout.key_length - self.layout.length if self.scores.is_causal else 0
