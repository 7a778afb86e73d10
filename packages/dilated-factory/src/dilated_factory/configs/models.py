"""Validated configuration of models and training: frozen data that round-trips through JSON."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dilated_core import DilatedPattern
from dilated_factory.configs.attention import HeadGroups, HeadOffsets
from dilated_factory.configs.base import KIND, FrozenConfig, describe_invalid, parse_config
from dilated_factory.configs.pattern import default_pattern

__all__ = [
    "FrozenConfig",
    "LongNetConfig",
    "LongNetEncoderConfig",
    "TrainConfig",
    "describe_invalid",
    "parse_config",
]

Positions = Literal["rotary", "xpos", "learned", "sinusoidal", "none"]
Activation = Literal["gelu", "relu", "swish"]
Dtype = Literal["float32", "bfloat16"]

# Past this, the factors of xPos leave the range of float32: (2/7) ** (100 / 2) is 6e-28.
XPOS_MAX_SPAN = 100
# With a base of 10,000 a model learns little from thousands of positions back: docs/claim.md.
_FAR_CONTEXT, _FAR_BASE = 8192, 5e6


class StackConfig(FrozenConfig):
    """Shape of a stack of LongNet layers; what language model and encoder have in common.

    Lengths are in tokens. Without segment lengths and dilation rates the pattern is
    `default_pattern(context)`; a configuration in a file carries its own.
    """

    embed_dim: int = Field(default=128, ge=1, description="width of the model")
    num_heads: int = Field(default=4, ge=1, description="attention heads")
    num_layers: int = Field(default=3, ge=1, description="blocks")
    ffn_dim: int | None = Field(
        default=None, ge=1, description="width of the feed-forward layer; none means 4 * embed_dim"
    )
    segment_lengths: tuple[int, ...] = Field(
        default=(), description="of each branch; none means those of `default_pattern(context)`"
    )
    dilation_rates: tuple[int, ...] = Field(
        default=(), description="of each branch; given with segment_lengths"
    )
    head_offsets: HeadOffsets = Field(default="interleaved", description="which rows a head keeps")
    head_groups: HeadGroups = Field(
        default="shared", description="whether each head uses every branch, or groups one each"
    )
    count_padding: bool = Field(default=False, description="torchscale's habit, not causal only")
    context: int = Field(default=8192, ge=1, description="length that the model is trained at")
    positions: Positions = Field(default="rotary", description="position embedding")
    rotary_base: float | None = Field(
        default=None,
        gt=1,
        description="base of the rotary angles; none means 10,000, from a context of 8192 on "
        "5,000,000",
    )
    xpos_scale_base: int = Field(default=512, ge=1, description="distance over which xPos decays")
    embedding_norm: bool = Field(default=False, description="a norm before the first layer")
    activation: Activation = Field(default="gelu", description="of the feed-forward layers")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout rate")
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="chance to skip the last layer's parts; others less"
    )
    layer_norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of all norms")
    float32_gelu: bool = Field(
        default=False, description="activations in float32 even in float64, torchscale's habit"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        # The configuration is still being made; files and copies carry what stands in it.
        if self.rotary_base is None:
            far = self.positions == "rotary" and self.context >= _FAR_CONTEXT
            object.__setattr__(self, "rotary_base", _FAR_BASE if far else 10000.0)
        if not (self.segment_lengths or self.dilation_rates):
            default = default_pattern(self.context)
            object.__setattr__(self, "segment_lengths", default.segment_lengths)
            object.__setattr__(self, "dilation_rates", default.dilation_rates)
        if not (self.segment_lengths and self.dilation_rates):
            raise ValueError(
                "segment_lengths and dilation_rates must be given together. Got "
                f"segment_lengths={self.segment_lengths}, dilation_rates={self.dilation_rates}."
            )
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                "embed_dim must be a multiple of 2 * num_heads, so that every head has an even "
                f"width to rotate. Got embed_dim={self.embed_dim}, num_heads={self.num_heads}."
            )
        self.pattern.branch_heads(self.num_heads)  # raises its own message about all of these
        if self.context < min(self.segment_lengths):
            raise ValueError(
                "context must not be shorter than the smallest segment. "
                f"Got context={self.context}, segment_lengths={self.segment_lengths}."
            )
        if self.positions == "xpos" and self.context > XPOS_MAX_SPAN * self.xpos_scale_base:
            raise ValueError(
                f"xpos_scale_base must be at least context / {XPOS_MAX_SPAN}. "
                f"Got xpos_scale_base={self.xpos_scale_base}, context={self.context}."
            )
        return self

    @property
    def pattern(self) -> DilatedPattern:
        """The dilated-attention pattern of every layer."""
        return DilatedPattern(
            self.segment_lengths,
            self.dilation_rates,
            head_offsets=self.head_offsets,
            head_groups=self.head_groups,
            count_padding=self.count_padding,
        )

    @property
    def angle_base(self) -> float:
        """The base of the rotary angles."""
        assert self.rotary_base is not None  # as the configuration was made
        return self.rotary_base

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer."""
        return 4 * self.embed_dim if self.ffn_dim is None else self.ffn_dim


class LongNetConfig(StackConfig):
    """Shape of a LongNet language model; with the default vocabulary of 256 a token is a byte.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.

    Examples:
        >>> config = LongNetConfig(embed_dim=64, num_layers=2, context=4096)
        >>> config.segment_lengths, config.dilation_rates
        ((64, 129, 1024, 4096), (1, 1, 4, 16))
    """

    kind: Annotated[Literal["longnet"], KIND] = "longnet"
    vocab_size: int = Field(
        default=256,
        ge=1,
        description="different tokens; of a tokenizer all, and up to a multiple of 64",
    )
    scale_embedding: bool = Field(default=True, description="embedding times sqrt(embed_dim)")
    tie_embeddings: bool = Field(default=True, description="one weight for embedding and head")


class LongNetEncoderConfig(StackConfig):
    """Shape of a LongNet encoder, which sees both directions.

    Without a ``vocab_size`` it takes embeddings instead of tokens.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.

    Examples:
        >>> LongNetEncoderConfig(embed_dim=32, num_heads=4, num_layers=2, vocab_size=100).kind
        'longnet_encoder'
    """

    kind: Annotated[Literal["longnet_encoder"], KIND] = "longnet_encoder"
    vocab_size: int | None = Field(
        default=None, ge=1, description="different tokens; none means embeddings are given"
    )
    scale_embedding: bool = Field(default=True, description="times sqrt(embed_dim)")
    head: bool = Field(default=False, description="logits over the vocabulary, not states")
    final_norm: bool = Field(default=True, description="a norm after the last layer")

    @model_validator(mode="after")
    def _head_has_a_vocabulary(self) -> Self:
        if self.head and self.vocab_size is None:
            raise ValueError("vocab_size must be given with head=True. Got None.")
        return self


class Parent(FrozenConfig):
    """Where a run began that goes on from another."""

    run: str = Field(description="its folder")
    step: int = Field(ge=0, description="of the checkpoint")


# Fields of a TrainConfig by which files are read, and held out; they belong to its paths.
FILES = ("include", "exclude", "text_field", "raw", "broken")
READING = (*FILES, "validation", "validation_fraction", "split")


class TrainConfig(FrozenConfig):
    """Everything that decides a loss curve: model, corpus, batches, optimizer, duration, seed.

    Exactly one of ``steps`` and ``minutes`` is given. With ``steps`` a run is reproducible step by
    step; with ``minutes`` the learning rate follows the clock, so the number of steps depends on
    the machine.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.

    Examples:
        >>> TrainConfig(steps=100, batch_size=8).optimizer
        'muon'
    """

    kind: Annotated[Literal["train"], KIND] = "train"
    model: LongNetConfig = Field(default=LongNetConfig(), description="shape of the model")
    paths: tuple[str, ...] = Field(
        default=(), description="files and folders; none means the standard library of Python"
    )
    include: tuple[str, ...] = Field(
        default=(), description="glob of names of files to read; none means all"
    )
    exclude: tuple[str, ...] = Field(default=(), description="glob of names that are not read")
    text_field: str | None = Field(
        default=None,
        description="field of JSON lines, Parquet and Arrow that is a document; none means text",
    )
    raw: bool = Field(
        default=False, description="bytes of every file as it is, compressed and binary ones too"
    )
    broken: Literal["error", "skip"] = Field(
        default="error", description="what a damaged file is; an error keeps what is read"
    )
    validation: tuple[str, ...] = Field(
        default=(), description="file or folder that is held out instead of a share"
    )
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of the files that is held out"
    )
    split: Literal["file", "document"] = Field(
        default="file", description="what is held out whole; a document is a row here"
    )
    tokenizer: str | None = Field(
        default=None, description="tokenizer.json, or the folder of one; none means bytes"
    )
    documents: Literal["joined", "separate"] = Field(
        default="joined", description="whether documents that share a window see each other"
    )
    steps: int | None = Field(default=None, ge=1, description="optimizer steps to take")
    minutes: float | None = Field(default=None, gt=0, description="train for this long instead")
    batch_size: int = Field(default=1, ge=1, description="sequences per step, of all processes")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="sequences at once in a process; none means all of its share",
    )
    short_context: int | None = Field(
        default=None,
        ge=1,
        description="tokens of the sequences that the first steps have, more of them; "
        "none means context",
    )
    short_share: float = Field(
        default=0.75, gt=0, lt=1, description="share of the steps that have short_context"
    )
    optimizer: Literal["muon", "adamw"] = Field(
        default="muon", description="of the matrices in the blocks; all else has adamw"
    )
    learning_rate: float = Field(default=8e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices, times learning rate")
    schedule: Literal["linear", "cosine", "wsd"] = Field(
        default="linear", description="how the rate falls to zero; wsd is constant, then linear"
    )
    decay: float = Field(default=0.2, gt=0, le=1, description="share of the run in which wsd falls")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the run that warms up")
    warmup_steps: int | None = Field(default=None, ge=0, description="warm up by steps instead")
    gradient_clip: float = Field(default=0.3, gt=0, description="largest norm of all gradients")
    validate_every: int | None = Field(
        default=None, ge=1, description="steps between looks at held-out bytes; none means never"
    )
    validation_bytes: int = Field(
        default=65536, ge=1, description="about how many, a batch at least"
    )
    recompute: Literal["none", "pointwise", "feed_forward", "all"] = Field(
        default="none", description="of each block, what backward computes again to save memory"
    )
    dtype: Dtype = Field(default="float32", description="bfloat16 is mixed precision")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of weights, batches and dropout")
    parent: Parent | None = Field(default=None, description="the run whose weights this began with")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                "exactly one of steps and minutes is required. "
                f"Got steps={self.steps}, minutes={self.minutes}."
            )
        if self.raw and self.text_field is not None:
            raise ValueError(f"text_field must be none with raw. Got {self.text_field!r}.")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size ({self.batch_size}). "
                f"Got {self.micro_batch_size}."
            )
        if self.short_context is None:
            if self.short_share != type(self).model_fields["short_share"].default:
                raise ValueError(
                    f"short_share must be given with short_context only. Got {self.short_share}."
                )
        else:
            if self.model.context % self.short_context or self.short_context == self.model.context:
                raise ValueError(
                    f"short_context must be a part of context ({self.model.context}) that divides "
                    f"it. Got {self.short_context}."
                )
            if self.steps is None:
                raise ValueError(
                    f"short_context must be none without steps. Got {self.short_context}."
                )
        if self.steps is not None and (self.warmup_steps or 0) >= self.steps:
            raise ValueError(
                f"warmup_steps must be less than steps ({self.steps}). Got {self.warmup_steps}."
            )
        return self

    def context_at(self, step: int) -> int:
        """Tokens of the sequences that a step has; of all together it has as many as any other."""
        if self.short_context is None or self.steps is None:
            return self.model.context
        is_short = step < int(self.short_share * self.steps)  # the last one never is
        return self.short_context if is_short else self.model.context
