"""Configurations of attention, told apart by `kind`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from dilated_core import DilatedPattern
from dilated_factory.configs.base import KIND, FrozenConfig
from dilated_factory.configs.layouts import LayoutConfig

Size = Annotated[int, Field(ge=1)]
HeadOffsets = Annotated[
    Literal["interleaved", "blocked"],
    Field(description="which rows a head keeps: the paper's (h mod r) or torchscale's in blocks"),
]
HeadGroups = Annotated[
    Literal["shared", "split"],
    Field(description="whether each head uses every branch, or groups of heads one branch each"),
]
CountPadding = Annotated[
    bool,
    Field(description="torchscale's zero keys in short segments count in the softmax, not causal"),
]
Dropout = Annotated[
    float, Field(ge=0, lt=1, description="chance that a weight of attention is left out, training")
]
DilatedBackend = Literal["reference", "torch", "triton"]
SparseBackend = Literal["reference", "torch", "flex", "triton"]
Strategy = Literal["auto", "gather", "heads", "lend", "ring"]
Validate = Literal["first", "always", "off"]
DtypeName = Literal["float16", "bfloat16", "float32", "float64"]


class AttentionConfig(FrozenConfig):
    """Base of what a `Registry` can build; a subclass gives `kind` a literal and a default.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.

    Examples:
        >>> from typing import Literal
        >>> class WindowConfig(AttentionConfig):
        ...     kind: Literal["window"] = "window"
        ...     size: int
        >>> WindowConfig(size=64).kind
        'window'
    """

    kind: Annotated[str, KIND]


class PatternFields(FrozenConfig):
    """The fields of a `dilated_core.DilatedPattern`."""

    segment_lengths: tuple[Size, ...] = Field(description="of each branch, in positions")
    dilation_rates: tuple[Size, ...] = Field(
        description="of each branch: of how many positions one is kept"
    )
    head_offsets: HeadOffsets = "interleaved"
    head_groups: HeadGroups = "shared"
    count_padding: CountPadding = False

    @model_validator(mode="after")
    def _is_a_pattern(self) -> Self:
        _ = self.pattern  # raises its own message
        return self

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern."""
        return DilatedPattern(
            self.segment_lengths,
            self.dilation_rates,
            head_offsets=self.head_offsets,
            head_groups=self.head_groups,
            count_padding=self.count_padding,
        )


class _Scores(FrozenConfig):
    """What all attention between heads has."""

    scale: float | None = Field(default=None, description="of scores; None means 1 / sqrt(D)")
    dropout: Dropout = 0.0


class _LayoutField(FrozenConfig):
    layout: LayoutConfig = Field(description="which keys each query sees, in blocks")


class _Ring(FrozenConfig):
    """How ranks exchange; the group itself is given when the module is created."""

    strategy: Strategy = Field(
        default="auto", description="how rows travel between ranks; auto counts bytes and work"
    )
    validate_ranks: Validate = Field(
        default="first", description="which calls compare arguments across ranks"
    )


class _Multihead(FrozenConfig):
    """The projections around attention between heads."""

    embed_dim: int = Field(gt=0, description="width of inputs and outputs")
    num_heads: int = Field(gt=0, description="heads of the queries")
    num_kv_heads: int | None = Field(default=None, gt=0, description="None means num_heads")
    bias: bool = Field(default=True, description="biases in the projections")
    layer_norm: bool = Field(
        default=True, description="a norm over all heads before the output projection"
    )
    layer_norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of that norm")
    gamma_init: float = Field(
        default=1.0,
        gt=0,
        description="gain of the first weights of the value and output projection",
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for whole, part in (("embed_dim", "num_heads"), ("num_heads", "num_kv_heads")):
            numerator, denominator = getattr(self, whole), getattr(self, part)
            if denominator is not None and numerator % denominator:
                raise ValueError(
                    f"{whole} must be divisible by {part}. Got {numerator} and {denominator}."
                )
        return self


class DilatedConfig(AttentionConfig, PatternFields, _Scores):
    """`dilated_core.DilatedAttention`.

    Examples:
        >>> config = DilatedConfig(segment_lengths=(64, 256), dilation_rates=(1, 4))
        >>> create_attention(config, default_registry()).pattern
        DilatedPattern([64, 256], [1, 4])
    """

    kind: Annotated[Literal["dilated"], KIND] = "dilated"
    backend: DilatedBackend | None = Field(
        default=None, description="None: the fastest that serves"
    )


class RingConfig(AttentionConfig, PatternFields, _Scores, _Ring):
    """`dilated_ring.RingDilatedAttention`.

    Examples:
        >>> config = RingConfig(segment_lengths=(64, 256), dilation_rates=(1, 4))
        >>> type(create_attention(config, default_registry())).__name__
        'RingDilatedAttention'
    """

    kind: Annotated[Literal["ring"], KIND] = "ring"


class BlockSparseConfig(AttentionConfig, _LayoutField, _Scores):
    """`dilated_sparse.BlockSparseAttention`, its layout built for the length of each call.

    Examples:
        >>> window = {"kind": "sliding_window", "window": 64}
        >>> type(create_attention(BlockSparseConfig(layout=window), default_registry())).__name__
        'LayoutAttention'
    """

    kind: Annotated[Literal["block_sparse"], KIND] = "block_sparse"
    backend: SparseBackend | None = Field(default=None, description="None: the fastest that serves")


class BlockSparseDilatedConfig(AttentionConfig, PatternFields, _LayoutField, _Scores):
    """`dilated_sparse.BlockSparseDilatedAttention`, its layout built for the length of a call.

    Examples:
        >>> window = {"kind": "sliding_window", "window": 64}
        >>> config = BlockSparseDilatedConfig(
        ...     segment_lengths=(64, 256), dilation_rates=(1, 4), layout=window
        ... )
        >>> type(create_attention(config, default_registry())).__name__
        'LayoutAttention'
    """

    kind: Annotated[Literal["block_sparse_dilated"], KIND] = "block_sparse_dilated"
    backend: DilatedBackend | None = Field(  # flex gives no lse, which the union needs
        default=None, description="None: the fastest that serves"
    )


class BlockSparseRingConfig(AttentionConfig, _LayoutField, _Scores, _Ring):
    """`dilated_ring.ring_attention` over a block layout.

    Examples:
        >>> window = {"kind": "sliding_window", "window": 64}
        >>> BlockSparseRingConfig(layout=window).kind
        'block_sparse_ring'
    """

    kind: Annotated[Literal["block_sparse_ring"], KIND] = "block_sparse_ring"


class BlockSparseRingDistributedConfig(AttentionConfig, _LayoutField, _Scores, _Ring):
    """`block_sparse_ring` on a mesh of two dimensions: dense in a node, sparse across nodes.

    Examples:
        >>> window = {"kind": "sliding_window", "window": 64}
        >>> BlockSparseRingDistributedConfig(layout=window).kind
        'block_sparse_ring_distributed'
    """

    kind: Annotated[Literal["block_sparse_ring_distributed"], KIND] = (
        "block_sparse_ring_distributed"
    )


class AutoConfig(AttentionConfig, _Scores):
    """A request: `Selection` picks the kind and backend that serve it at the least cost.

    At least one of a dilated pattern and a layout is given; with both, a query sees the union.

    Examples:
        >>> request = AutoConfig(
        ...     length=4096,
        ...     heads=8,
        ...     head_dim=64,
        ...     segment_lengths=(64, 4096),
        ...     dilation_rates=(1, 16),
        ... )
        >>> type(create_attention(request, default_registry())).__name__
        'DilatedAttention'
    """

    kind: Annotated[Literal["auto"], KIND] = "auto"
    length: Size = Field(description="of the sequences, in positions")
    heads: Size = Field(description="heads of the queries")
    kv_heads: Size | None = Field(default=None, description="None means heads")
    head_dim: Size = Field(description="width of a head")
    is_causal: bool = Field(default=False, description="whether queries see no later keys")
    segment_lengths: tuple[Size, ...] | None = Field(
        default=None, description="of each branch, in positions; None means no pattern"
    )
    dilation_rates: tuple[Size, ...] | None = Field(
        default=None, description="of each branch; given with segment_lengths"
    )
    head_offsets: HeadOffsets = "interleaved"
    head_groups: HeadGroups = "shared"
    count_padding: CountPadding = False
    layout: LayoutConfig | None = Field(default=None, description="None means no layout")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where it will be called")
    dtype: DtypeName = Field(default="float32", description="of queries, keys and values")
    world: Size = Field(default=1, description="ranks that a sequence is spread over")
    nodes: Size = Field(default=1, description="machines that these ranks are on")
    backend: DilatedBackend | None = Field(default=None, description="None lets the cost decide")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.segment_lengths is None) != (self.dilation_rates is None):
            raise ValueError(
                "segment_lengths and dilation_rates must be given together. "
                f"Got {self.segment_lengths} and {self.dilation_rates}."
            )
        pattern = self.pattern
        if pattern is None and self.layout is None:
            raise ValueError(
                "segment_lengths and dilation_rates, or layout, or all are required. Got none."
            )
        if pattern is not None:
            pattern.branch_heads(self.heads)
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"heads must be divisible by kv_heads. Got {self.heads} and {self.kv_heads}."
            )
        if self.world % self.nodes:
            raise ValueError(
                f"world must be a multiple of nodes. Got {self.world} and {self.nodes}."
            )
        return self

    @property
    def pattern(self) -> DilatedPattern | None:
        """The dilated pattern, if there is one."""
        if self.segment_lengths is None or self.dilation_rates is None:
            return None
        return DilatedPattern(
            self.segment_lengths,
            self.dilation_rates,
            head_offsets=self.head_offsets,
            head_groups=self.head_groups,
            count_padding=self.count_padding,
        )


def _take_registered(
    value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
) -> Any:
    """Let kinds in that a registry knows beside the project's own (see `Registry.parse`)."""
    if isinstance(value, AttentionConfig):
        return value
    kinds: Mapping[str, type[AttentionConfig]] = (info.context or {}).get("kinds", {})
    if isinstance(value, Mapping) and value.get("kind") in kinds:
        return kinds[value["kind"]].model_validate(value, context=info.context)
    return handler(value)


if TYPE_CHECKING:
    # Any subclass: third parties register theirs.
    HeadAttentionConfig = AttentionConfig
else:
    # Attention between projected heads, as MultiheadDilatedAttention(attention=...) takes it.
    HeadAttentionConfig = Annotated[
        SerializeAsAny[
            Annotated[
                DilatedConfig
                | RingConfig
                | BlockSparseConfig
                | BlockSparseDilatedConfig
                | BlockSparseRingConfig
                | BlockSparseRingDistributedConfig
                | AutoConfig,
                Field(discriminator="kind"),
            ]
        ],
        WrapValidator(_take_registered),
    ]


class MultiheadConfig(AttentionConfig, _Multihead):
    """`dilated_core.MultiheadDilatedAttention` around any attention between heads.

    Examples:
        >>> inner = DilatedConfig(segment_lengths=(64, 256), dilation_rates=(1, 4))
        >>> layer = create_attention(
        ...     MultiheadConfig(embed_dim=32, num_heads=4, attention=inner), default_registry()
        ... )
        >>> layer(torch.randn(1, 100, 32))[0].shape
        torch.Size([1, 100, 32])
    """

    kind: Annotated[Literal["dilated_multihead"], KIND] = "dilated_multihead"
    attention: HeadAttentionConfig = Field(description="what runs between the projections")


class RingMultiheadConfig(AttentionConfig, PatternFields, _Multihead, _Ring):
    """`dilated_ring.RingMultiheadDilatedAttention`.

    Examples:
        >>> config = RingMultiheadConfig(
        ...     embed_dim=32, num_heads=4, segment_lengths=(64, 256), dilation_rates=(1, 4)
        ... )
        >>> type(create_attention(config, default_registry())).__name__
        'RingMultiheadDilatedAttention'
    """

    kind: Annotated[Literal["ring_multihead"], KIND] = "ring_multihead"
    dropout: Dropout = 0.0
