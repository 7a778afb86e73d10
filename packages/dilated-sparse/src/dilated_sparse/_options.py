"""What one attention call is asked to compute."""

from dataclasses import dataclass

from torch import Tensor

from dilated_sparse._layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Options:
    """Everything about a call but its tensors q, k, v.

    The positions, (N,) and (M,) int64, key the dropout mask where the rows are not a sequence of
    their own; only the torch backend reads them.
    """

    layout: BlockLayout
    is_causal: bool
    scale: float
    key_padding_mask: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None

    @property
    def query_start(self) -> int:
        """Position of the first query: when causal, the queries end where the keys end."""
        return self.layout.key_length - self.layout.length if self.is_causal else 0
