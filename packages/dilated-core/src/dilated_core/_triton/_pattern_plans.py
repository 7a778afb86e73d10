"""The plans of dilated patterns: kept for equal sequences, made at each call for packed ones."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core._branches import Branches
from dilated_core._caches import on_clear, remembered
from dilated_core._triton._driving import Config, Pair, Pass, Sizes
from dilated_core._triton._plan import BlockSizes, PlanCache, TilePlan, current_stream
from dilated_core._triton._strips import StepShape, work
from dilated_core._triton._tables import (
    Request,
    Template,
    Tiles,
    exact_tables,
    narrowed,
    tables,
    template_of,
)

_cache = PlanCache()


@on_clear
def _clear() -> None:
    _cache.clear()


class PatternTiling(NamedTuple):
    """The plans of a dilated pattern, for equal sequences or for packed ones."""

    pattern: Branches
    cu_seqlens: Tensor | None

    def cache(self) -> tuple[PlanCache, object] | None:
        """One for all patterns; the plans of packed sequences are made at each call."""
        return (_cache, self.pattern.code) if self.cu_seqlens is None else None

    def choose(self, which: Pass, sizes: Sizes, pair: Pair) -> Config:
        """Short tiles where they are the quicker ones."""
        return pair.short if sizes.is_causal else _by_work(pair, self.pattern, sizes.heads)

    def plan(self, sizes: Sizes, by_key: bool, blocks: BlockSizes) -> TilePlan:
        """The plan over query tiles, or over key tiles."""
        queries = (sizes.first_query, sizes.first_query + sizes.length)
        keys = (sizes.first_key, sizes.first_key + sizes.key_length)
        request = Request(
            self.pattern, sizes.heads, sizes.kv_heads if by_key else sizes.heads, by_key,
            keys if by_key else queries, queries if by_key else keys, sizes.is_causal, blocks,
        )  # fmt: skip
        if self.cu_seqlens is None:
            return plan(_canonical(request), sizes.device)
        return packed_plan(request, self.cu_seqlens)


@remembered(1024)
def _by_work(pair: Pair, pattern: Branches, heads: int) -> Config:
    tall, short = (
        work(pattern, heads, StepShape(c.rows, c.columns, is_causal=False))
        for c in (pair.tall, pair.short)
    )
    return pair.short if short < pair.gain * tall else pair.tall


def _canonical(request: Request) -> Request:
    """One request for plans that are alike, so that they share a cache entry."""
    alike = request.heads == request.kv_heads and not request.is_causal
    if request.by_key and alike and not request.pattern.count_padding:
        return request._replace(by_key=False)
    return request


def plan(request: Request, device: torch.device) -> TilePlan:
    """The plan of a batch of equal sequences; cached, and built without a host sync after that."""

    def build() -> TilePlan:
        template = template_of(request, device)
        return exact_tables(request, template)

    return _cache.plan(request, device, build)


def packed_plan(request: Request, cu_seqlens: Tensor) -> TilePlan:
    """The plan of packed sequences, built on the device from their lengths at every call.

    `request` is that of one sequence as long as all of them together.
    """
    template = _cached_template(request, cu_seqlens.device)
    ends = cu_seqlens.to(torch.int64)
    lengths = ends[1:] - ends[:-1]
    sequences, total = lengths.shape[0], request.rows[1]
    classes = template.first.shape[0]
    counts = torch.searchsorted(template.lowest, lengths.expand(classes, -1).contiguous())
    bound = int(template.density * total + sequences * template.excess) + 1
    cumulative = counts.cumsum(1)
    slots = torch.arange(bound, device=ends.device).expand(classes, -1).contiguous()
    sequence = torch.searchsorted(cumulative, slots, right=True)
    real = sequence < sequences
    sequence = sequence.clamp(max=sequences - 1)
    before = (cumulative - counts).gather(1, sequence)
    local = torch.where(real, slots - before, 0)
    first, step, most = (x.gather(1, local) for x in (template.first, template.step, template.rows))
    length = lengths[sequence]
    rows = torch.minimum((length - first + step - 1) // step, most).clamp(min=0)
    tiles = Tiles(
        first, step, torch.where(real, rows, 0), template.recipe.gather(1, local), sequence
    )
    return narrowed(tables(request, template, tiles, length, exact=False))


def _cached_template(request: Request, device: torch.device) -> Template:
    def build() -> Template:
        found = template_of(request, device)
        # Shorter sequences cut runs shorter and need no other masks, but for their zero keys.
        whole = exact_tables(request, found)
        mask = 2 if request.zero_keys else max(1, whole.mask)
        return replace(found, mask=mask, stream=current_stream(device))

    found = _cache.value(("packed", request, device), device, build)
    assert isinstance(found, Template)
    return found
