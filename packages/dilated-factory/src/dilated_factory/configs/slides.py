"""Validated configuration of slide encoders."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dilated_core import DilatedPattern
from dilated_factory.configs.base import KIND, FrozenConfig
from dilated_factory.configs.models import LongNetEncoderConfig


class SlideEncoderConfig(FrozenConfig):
    """Shape of a slide encoder; the defaults are those of the published one, 86 million parameters.

    Its authors say that the class token of the published weights was not trained, and that
    ``global_pool=True`` is meant; the default of the field is that of their class, False.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.

    Examples:
        >>> SlideEncoderConfig(global_pool=True).tile_dim  # the published size, pooled by the mean
        1536
    """

    kind: Annotated[Literal["slide_encoder"], KIND] = "slide_encoder"
    tile_dim: int = Field(default=1536, ge=1, description="width of a tile's embedding")
    embed_dim: int = Field(default=768, ge=4, multiple_of=4, description="width of the model")
    num_heads: int = Field(default=16, ge=1, description="attention heads")
    num_layers: int = Field(default=12, ge=1, description="blocks")
    ffn_dim: int | None = Field(default=None, ge=1, description="None means 4 * embed_dim")
    segment_lengths: tuple[int, ...] = Field(
        default=(1024, 5792, 32768, 185363, 1048576), description="of each branch, in tiles"
    )
    dilation_rates: tuple[int, ...] = Field(
        default=(1, 2, 4, 8, 16), description="of each branch: of how many tiles one is kept"
    )
    grid_size: int = Field(default=1000, ge=1, description="tiles along a side of a slide")
    tile_size: float = Field(
        default=256, gt=0, description="pixels along a side of a tile, where a call does not say"
    )
    global_pool: bool = Field(default=False, description="mean of the tiles, not the class token")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout rate")
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="chance to skip the last layer's parts; others less"
    )
    layer_norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of the layers' norms")
    final_norm_eps: float = Field(default=1e-6, gt=0, description="epsilon of the last norm")

    @property
    def encoder(self) -> LongNetEncoderConfig:
        """Shape of the LongNet encoder inside, with torchscale's habits."""
        return LongNetEncoderConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            ffn_dim=self.ffn_dim,
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offsets="blocked",
            count_padding=True,
            context=max(self.segment_lengths),
            positions="none",
            dropout=self.dropout,
            drop_path=self.drop_path,
            layer_norm_eps=self.layer_norm_eps,
            float32_gelu=True,
        )

    @property
    def pattern(self) -> DilatedPattern:
        """The dilated-attention pattern of every layer."""
        return self.encoder.pattern


class SlideTaskConfig(FrozenConfig):
    """A task on slides: a table of labels, features, a model, and how it is trained.

    The table is a CSV file with a row for each slide. All slides of a patient are on one side of
    every split: of ``folds`` parts one is the test, the next one chooses the best epoch, and the
    rest trains.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.
    """

    kind: Annotated[Literal["slide_task"], KIND] = "slide_task"
    table: str = Field(description="CSV file of slides and labels")
    features: tuple[str, ...] = Field(min_length=1, description="feature files and folders of them")
    task: Literal["multiclass", "binary", "multilabel", "regression", "survival"] = Field(
        description="what is predicted, which decides loss and scores"
    )
    labels: tuple[str, ...] = Field(
        min_length=1,
        description="columns of the table: one; of multilabel and regression any number; of "
        "survival the time and whether the event was seen (1 or 0)",
    )
    slide_column: str = Field(default="slide", description="name of the feature file, no ending")
    patient_column: str | None = Field(default=None, description="None: a slide is a patient")
    model: Literal["encoder", "mean_pool", "abmil"] = Field(
        default="encoder", description="a slide encoder, or a baseline that knows no places"
    )
    checkpoint: str | None = Field(default=None, description="None starts from random weights")
    encoder: SlideEncoderConfig = Field(
        default=SlideEncoderConfig(global_pool=True), description="shape of the slide encoder"
    )
    new_projection: bool = Field(
        default=False, description="start the projection of tiles anew: another tile encoder"
    )
    feat_layers: tuple[int, ...] = Field(
        default=(-1,), min_length=1, description="layers whose embeddings the head takes; 0: tiles"
    )
    freeze: bool = Field(default=False, description="train the head only")
    tile_size: float | None = Field(default=None, gt=0, description="in place of the files' word")
    folds: int = Field(default=5, ge=3, description="parts that the patients are split into")
    epochs: int = Field(default=10, ge=1, description="times that each slide is trained on")
    batch_size: int = Field(default=8, ge=1, description="slides of an optimizer's step")
    max_tiles: int = Field(
        default=100_000, ge=1, description="computed together; a step's other slides accumulate"
    )
    learning_rate: float = Field(default=5e-4, gt=0, description="peak learning rate of the head")
    layer_decay: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="factor of the learning rate from a layer to that below",
    )
    weight_decay: float = Field(default=0.05, ge=0, description="of weights, times learning rate")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps")
    gradient_clip: float = Field(default=1.0, gt=0, description="largest norm of all gradients")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16 is mixed precision"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="of splits, weights, batches and dropout"
    )

    @model_validator(mode="after")
    def _as_many_labels_as_the_task_has(self) -> Self:
        wanted = {"multiclass": 1, "binary": 1, "survival": 2}.get(self.task, len(self.labels))
        if len(self.labels) != wanted:
            raise ValueError(
                f"labels must name {wanted} of the columns for {self.task}. Got {self.labels}."
            )
        return self
