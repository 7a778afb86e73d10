"""Configuration of what a genome is to a model: which file, which parts, which tokens."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dilated_factory.configs.base import KIND, FrozenConfig

Placement = Literal["hyenadna", "caduceus", "tiled"]


class GenomeConfig(FrozenConfig):
    """A FASTA file as a corpus, by the conventions of HyenaDNA and Caduceus.

    Without a BED file each record is cut into windows, of which the last ones are held out.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.

    Examples:
        >>> GenomeConfig(fasta="genome.fa", bed="splits.bed", reverse_complement=0.5).case
        'upper'
    """

    kind: Annotated[Literal["genome"], KIND] = "genome"
    fasta: str = Field(description="the FASTA file: plain, by gzip or by bgzip")
    bed: str | None = Field(
        default=None, description="intervals: record, start, end, split, between tabs"
    )
    train_split: str = Field(default="train", description="split to train on")
    validation_split: str = Field(default="valid", description="split that is held out")
    intervals: Placement | None = Field(
        default=None,
        description="how windows lie in the rows; none means hyenadna, tiled without a BED file",
    )
    window: int = Field(default=2**20, ge=2, description="bases from a row's start, of caduceus")
    case: Literal["upper", "keep"] = Field(
        default="upper", description="whether lower case, the soft mask, has tokens of its own"
    )
    unknown_bases: Literal["ignore", "keep"] = Field(
        default="ignore", description="whether N is padding and no target, or a base as others"
    )
    sep: bool = Field(default=True, description="end each window with [SEP]")
    reverse_complement: float = Field(
        default=0.0, ge=0, le=1, description="chance to take the other strand in training"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.bed is None and self.intervals not in (None, "tiled"):
            raise ValueError(
                f"intervals must be 'tiled' without a BED file. Got {self.intervals!r}."
            )
        return self

    @property
    def placement(self) -> Placement:
        """How windows lie in the rows."""
        return self.intervals or ("tiled" if self.bed is None else "hyenadna")
