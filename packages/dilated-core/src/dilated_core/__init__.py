"""Dilated attention for PyTorch: exact, linear in length, with exact gradients."""

from dilated_core.__about__ import __version__
from dilated_core._attend import Backend, select_backend
from dilated_core._branches import Branch, validate_segment_dilation_match
from dilated_core._cache import DilatedKVCache
from dilated_core._caches import clear_caches
from dilated_core._choice import BackendChoice
from dilated_core._functional import (
    dilated_attention,
    dilated_attention_varlen,
    reference_attention,
)
from dilated_core._modules import DilatedAttention, MultiheadDilatedAttention
from dilated_core._partial import Partial, merge
from dilated_core._pattern import DilatedPattern

__all__ = [
    "Backend",
    "BackendChoice",
    "Branch",
    "DilatedAttention",
    "DilatedKVCache",
    "DilatedPattern",
    "MultiheadDilatedAttention",
    "Partial",
    "__version__",
    "clear_caches",
    "dilated_attention",
    "dilated_attention_varlen",
    "merge",
    "reference_attention",
    "select_backend",
    "validate_segment_dilation_match",
]
