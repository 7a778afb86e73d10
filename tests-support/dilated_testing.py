"""What the tests of several packages share: random attention problems and relative errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over the finite entries; infinities must agree exactly.

    Gradients that cancel to exactly zero (a softmax over one key) leave rounding noise of inputs
    of order 1, so a root mean square below 1e-4 counts as 1e-4.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    assert torch.equal(actual.isinf(), expected.isinf()), "infinities differ"
    assert not actual.isnan().any(), "NaN"
    finite = ~expected.isinf()
    assert torch.equal(actual[~finite], expected[~finite]), "infinities differ in sign"
    difference = torch.linalg.vector_norm((actual - expected)[finite])
    norm = torch.linalg.vector_norm(expected[finite])
    return (difference / norm.clamp(min=1e-4 * max(1, expected.numel()) ** 0.5)).item()


# No factor of one's own, and every kind that the option allows: zero, negative, tiny and huge.
SCALES = [None, None, None, None, 0.0, -0.4, 1e-30, -1e-30, 1e4, -1e4]


def poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same maker of tensors, but what it leaves to be written is NaN or -1."""

    def made(*arguments: Any) -> Any:
        found = make(*arguments)
        for x in found if isinstance(found, tuple) else (found,):
            x.fill_(torch.nan if x.is_floating_point() else -1)
        return found

    return made


def stretch(scale: float | None, head_dim: int) -> float:
    """What queries are to be multiplied by so that their scores have the size of default ones.

    Greater scores would be lost in their own rounding, and smaller ones in any.
    """
    return 1.0 if not scale else head_dim**-0.5 / abs(scale)


@dataclass
class Problem:
    """One call of dilated attention with everything that can be chosen about it."""

    pattern: DilatedPattern
    batch: int
    length: int
    key_length: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    padding: float
    dropout_p: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None

    def tensors(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v that require gradients: the same numbers for every dtype and device."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.length, self.heads)] + 2 * [(self.key_length, self.kv_heads)]
        query, key, value = (
            torch.randn(self.batch, n, h, self.head_dim, dtype=torch.float64, generator=generator)
            for n, h in shapes
        )
        query *= stretch(self.scale, self.head_dim)
        query, key, value = (x.to(device, dtype).requires_grad_() for x in (query, key, value))
        return query, key, value

    def mask(self, device: str = "cpu") -> Tensor | None:
        """A random key padding mask, or None."""
        if not self.padding:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = torch.rand(self.batch, self.key_length, generator=generator)
        return (drawn < self.padding).to(device)

    def run(
        self,
        backend: str | None,
        tensors: tuple[Tensor, Tensor, Tensor],
        *,
        lse_gradient: bool = True,
        attention: Callable[..., Any] = dilated_attention,
    ) -> dict[str, Tensor]:
        """Outputs and, for a random upstream gradient, the gradients: to unstretched queries."""
        torch.manual_seed(self.seed)
        out, lse = attention(
            *tensors,
            self.pattern,
            is_causal=self.is_causal,
            scale=self.scale,
            key_padding_mask=self.mask(str(tensors[0].device)),
            dropout_p=self.dropout_p,
            enable_gqa=True,
            return_lse=True,
            backend=backend,
            **self.options,
        )
        generator = torch.Generator().manual_seed(self.seed + 2)
        upstream = [
            torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device, x.dtype)
            for x in (out, lse)
        ]
        upstream[1] = upstream[1].masked_fill(lse == -torch.inf, 0.0)
        outputs = [out, lse] if lse_gradient else [out]
        dq, *grads = torch.autograd.grad(outputs, tensors, upstream[: len(outputs)])
        dq = dq * stretch(self.scale, self.head_dim)
        names = ("out", "lse", "dq", "dk", "dv")
        return dict(zip(names, (out, lse, dq, *grads), strict=True))


@st.composite
def nested_patterns(draw: st.DrawFn, least_branches: int = 1) -> DilatedPattern:
    """A small pattern of doubling rates, each branch's segments whole ones of the one before."""
    branches = draw(st.integers(least_branches, 4))
    first = draw(st.integers(1, 2))
    rates = [first * 2**k for k in range(branches)]
    lengths = [rates[-1] * draw(st.integers(1, 2))]
    for _ in rates[1:]:
        lengths.append(lengths[-1] * draw(st.integers(2, 3)))
    offsets = draw(st.sampled_from(["interleaved", "blocked"]))
    return DilatedPattern(lengths, rates, head_offsets=offsets)


@st.composite
def patterns(draw: st.DrawFn, max_segment: int = 23, max_rate: int = 7) -> DilatedPattern:
    """Any small pattern: rates that do not divide segments, above them, repeated, unordered.

    One in four nests with doubling rates, for which there are schedules of their own.
    """
    if draw(st.integers(0, 3)) == 0:
        return draw(nested_patterns())
    branches = draw(st.integers(1, 4))
    return DilatedPattern(
        draw(st.lists(st.integers(1, max_segment), min_size=branches, max_size=branches)),
        draw(st.lists(st.integers(1, max_rate), min_size=branches, max_size=branches)),
        head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
        head_groups=draw(st.sampled_from(["shared", "shared", "split"])),
        count_padding=draw(st.booleans()),
    )


@st.composite
def problems(
    draw: st.DrawFn, *, max_length: int = 47, dropout: bool = True, cross: bool = True
) -> Problem:
    """Any small problem over the full cross product of options."""
    pattern = draw(patterns())
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    if pattern.head_groups == "split" and heads < len(pattern.segment_lengths):
        kv_heads = heads = len(pattern.segment_lengths)
    is_causal = draw(st.booleans())
    key_length = draw(st.integers(0, max_length))
    length = key_length
    if cross and draw(st.booleans()):
        length = draw(st.integers(0, key_length if is_causal else max_length))
    return Problem(
        pattern,
        batch=draw(st.integers(0, 3)),
        length=length,
        key_length=key_length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 3, 8])),
        is_causal=is_causal,
        padding=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.4])) if dropout else 0.0,
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from(SCALES)),
    )
