"""The state that `LongNetForCausalLM` decodes with, behind transformers' cache."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from dilated_core.interfaces import DecodingState
from dilated_factory.models.longnet import LongNetLM

# What the installed version calls a model's cache: `cache`, in older ones `past_key_values`.
CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)


class _StateOfLayer(CacheLayerMixin):
    """A `DilatedKVCache` as a layer of transformers' cache.

    Attributes:
        state: what is kept.
        columns: columns of input ids seen, padding included, which is what transformers counts.
    """

    # Rows that the start of a segment wrote over do not come back.
    is_croppable = False
    is_sliding = False

    def __init__(self, state: DecodingState) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # it has no types
        self.state, self.columns, self.is_initialized = state, 0, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first call takes the memory."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """There are no keys of all positions to hand out."""
        raise NotImplementedError("a LongNetCache serves LongNetForCausalLM alone.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns with the new ones, and where they begin."""
        return self.columns + int(query_length), 0

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self.columns

    def get_max_length(self) -> int:
        """There is no end."""
        return -1

    get_max_cache_shape = get_max_length  # in older versions

    def reset(self) -> None:
        """Forget everything."""
        self.state.reset()
        self.columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of beams."""
        self.state.reorder(beam_idx.to(self.state.lengths.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = torch.arange(len(self.state.lengths), device=self.state.lengths.device)
        self.state.reorder(rows.repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Take back the last -tokens columns, all of real tokens, or all after the first tokens.

        Raises:
            ValueError: rows that are needed again are no longer held.
        """
        # Before crops were counted from the end, 0 took back all.
        after = self.columns + tokens if tokens < 0 or CACHE == "cache" else tokens
        gone = self.columns - min(after, self.columns)
        if gone:
            self.state.truncate(self.state.lengths - gone)
            self.columns -= gone


class LongNetCache(Cache):
    """State of constant size behind transformers' cache: what `LongNetForCausalLM` decodes with.

    Args:
        model: the `LongNetForCausalLM`, or the `LongNetLM` in it.
    """

    def __init__(self, model: nn.Module) -> None:
        longnet = model if isinstance(model, LongNetLM) else model.longnet
        assert isinstance(longnet, LongNetLM)
        self.of_layers = [_StateOfLayer(state) for state in longnet.new_caches()]
        super().__init__(layers=list(self.of_layers))

    @property
    def states(self) -> list[DecodingState]:
        """The state of each layer."""
        return [layer.state for layer in self.of_layers]

    @property
    def nbytes(self) -> int:
        """Bytes held, however long the context is."""
        return sum(state.nbytes for state in self.states)
