"""Sequence-parallel attention on torch.distributed (not there yet)."""

from dilated_ring.__about__ import __version__

__all__ = ["__version__"]
