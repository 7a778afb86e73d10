"""SlideClassifier: a head on embeddings of a slide encoder; its checkpoints, its fine-tuning."""

# Shapes: B batch, N tiles, S slides, E embed_dim.

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dilated_factory.configs.files import writing
from dilated_factory.configs.slides import SlideEncoderConfig
from dilated_factory.interop.checkpoints import Source, read_checkpoint
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.interop.places import TileSize
from dilated_factory.interop.torchscale import (
    load_slide_encoder,
    slide_names,
    warn_of_misplacement,
    warn_of_untrained_token,
)

_HEAD = "classifier.0."


class SlideClassifier(nn.Module):
    """Logits of slides: a linear layer on the embeddings of some states of a slide encoder.

    It has the layout of GigaPath's ClassificationHead.

    Shapes: batch B, slides S.

    Args:
        encoder: the slide encoder.
        num_classes: logits of a slide.
        feat_layers: whose embeddings the head sees, side by side: 0 is what enters the first layer
            and i what leaves layer i; negative ones count from the end.
        freeze: train the head only; the encoder then stays in evaluation mode.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.

    Examples:
        >>> shape = SlideEncoderConfig(
        ...     tile_dim=8,
        ...     embed_dim=16,
        ...     num_heads=2,
        ...     num_layers=1,
        ...     segment_lengths=(16,),
        ...     dilation_rates=(1,),
        ... )
        >>> model = SlideClassifier(SlideEncoder(shape), num_classes=3)
        >>> slides = [(torch.randn(n, 8), torch.randint(99, (n, 2)) * 256) for n in (20, 30)]
        >>> model.classify(slides, tile_size=[256, 256]).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        encoder: SlideEncoder,
        num_classes: int,
        *,
        feat_layers: Sequence[int] = (-1,),
        freeze: bool = False,
    ) -> None:
        super().__init__()
        states = encoder.config.num_layers + 1
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1. Got {num_classes}.")
        if not feat_layers or not all(-states <= layer < states for layer in feat_layers):
            raise ValueError(
                f"feat_layers must be one or more in [-{states}, {states - 1}]. Got {feat_layers}."
            )
        self.feat_layers = tuple(feat_layers)
        self.freeze = freeze
        self.slide_encoder = encoder
        width = len(self.feat_layers) * encoder.config.embed_dim
        token = encoder.cls_token
        # In a sequence, so that the names are GigaPath's.
        self.classifier = nn.Sequential(
            nn.Linear(width, num_classes, device=token.device, dtype=token.dtype)
        )
        if freeze:
            encoder.requires_grad_(False)
        self.train(encoder.training)

    def train(self, mode: bool = True) -> Self:
        """As in torch.nn; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.slide_encoder.eval()
        return self

    def forward(
        self,
        tiles: Tensor,
        coords: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        tile_size: TileSize | None = None,
    ) -> Tensor:
        """Logits (B, num_classes); arguments as in `SlideEncoder.forward`."""
        return self._head(
            lambda every: self.slide_encoder(
                tiles, coords, every, key_padding_mask=key_padding_mask, tile_size=tile_size
            )
        )

    def classify(
        self, slides: Sequence[tuple[Tensor, Tensor]], *, tile_size: TileSize | None = None
    ) -> Tensor:
        """Logits (S, num_classes) of packed slides; arguments as in `SlideEncoder.encode`."""
        return self._head(
            lambda every: self.slide_encoder.encode(
                slides, tile_size=tile_size, all_layer_embed=every
            )
        )

    def _head(self, embed: Callable[[bool], list[Tensor]]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            states = embed(True)
        features = torch.cat([states[layer] for layer in self.feat_layers], dim=-1)
        logits: Tensor = self.classifier(features)
        return logits

    @classmethod
    def load(
        cls,
        source: Source,
        config: SlideEncoderConfig,
        *,
        num_classes: int | None = None,
        feat_layers: Sequence[int] = (-1,),
        freeze: bool = False,
        strict: bool = True,
    ) -> Self:
        """The classifier of a fine-tuned checkpoint, or a new head on a pretrained encoder.

        Args:
            source: as in `load_torchscale`: ``slide_encoder.*`` with ``classifier.*``, or without.
            config: shape of the encoder.
            num_classes: of a new head; what the checkpoint has when it has one.
            feat_layers: as in the class. The tensors do not tell which layers the head was trained
                on, only how many: GigaPath writes them as e.g. "5-11".
            freeze: as in the class.
            strict: as in `load_torchscale`.

        Returns:
            The classifier, in evaluation mode.

        Raises:
            ValueError: as `load_torchscale`; num_classes is missing, or contradicts the checkpoint;
                the head's width is not that of ``feat_layers``.
        """
        tensors, _ = read_checkpoint(source)
        warn_of_untrained_token(config)
        warn_of_misplacement(config.pattern)
        encoder = load_slide_encoder(tensors, config, strict=strict)
        head = {
            name: tensors[full]
            for full in tensors
            for name in ("weight", "bias")
            if full.endswith(_HEAD + name)
        }
        if not head:
            if num_classes is None:
                raise ValueError(
                    "num_classes must be given for a checkpoint without a classifier. Got None."
                )
            return cls(encoder, num_classes, feat_layers=feat_layers, freeze=freeze).eval()
        classes, width = head["weight"].shape
        if num_classes not in (None, classes):
            raise ValueError(
                f"num_classes must be {classes} for this checkpoint. Got {num_classes}."
            )
        if width != len(feat_layers) * config.embed_dim:
            raise ValueError(
                f"feat_layers must name {width / config.embed_dim:g} layers for this checkpoint, "
                f"whose head is {width} wide. Got {tuple(feat_layers)}."
            )
        model = cls(encoder, classes, feat_layers=feat_layers, freeze=freeze)
        model.classifier[0].load_state_dict(head)
        return model.eval()


def parameter_groups(
    model: SlideEncoder | SlideClassifier,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer with a learning rate that falls layer by layer, as GigaPath's do.

    Of L layers, the class token trains at learning_rate * layer_decay ** (L + 1), layer i (from 0)
    at layer_decay ** (L - i), and everything else, the projection of tiles too, at the full rate.
    Parameters of one axis (biases and norms) have no weight decay. Frozen ones are left out.

    Args:
        model: what is trained.
        learning_rate: the full rate.
        weight_decay: of the parameters that have any.
        layer_decay: factor between the rates of neighbouring layers, in (0, 1].

    Returns:
        Groups with "params", "lr", "weight_decay", and "lr_scale", by which a schedule multiplies.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> shape = SlideEncoderConfig(
        ...     tile_dim=8,
        ...     embed_dim=16,
        ...     num_heads=2,
        ...     num_layers=1,
        ...     segment_lengths=(16,),
        ...     dilation_rates=(1,),
        ... )
        >>> groups = parameter_groups(SlideEncoder(shape), learning_rate=1e-3, layer_decay=0.9)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    for name, value, fits in (
        ("learning_rate", learning_rate, learning_rate > 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
        ("layer_decay", layer_decay, 0 < layer_decay <= 1),
    ):
        if not fits:
            wanted = {"learning_rate": "positive", "weight_decay": "at least 0"}
            raise ValueError(f"{name} must be {wanted.get(name, 'in (0, 1]')}. Got {value}.")
    encoder = model if isinstance(model, SlideEncoder) else model.slide_encoder
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        below = encoder.config.num_layers + 1 - _depth(name, encoder.config.num_layers + 1)
        scale, decay = layer_decay**below, 0.0 if parameter.ndim == 1 else weight_decay
        group = groups.setdefault(
            (scale, decay),
            {
                "params": [],
                "lr": learning_rate * scale,
                "lr_scale": scale,
                "weight_decay": decay,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _depth(name: str, top: int) -> int:
    name = name.removeprefix("slide_encoder.")
    if name == "cls_token":
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return top


def save_gigapath(model: SlideEncoder | SlideClassifier, path: str | PathLike[str]) -> None:
    """Write a model under GigaPath's names, as its own code reads them.

    A slide encoder goes under the key "model", where GigaPath's ``create_model`` looks, a
    classifier as the bare state dict that its fine-tuning saves. A path that ends in
    ``.safetensors`` gets the bare names in that format.

    Args:
        model: what to write.
        path: the file; one that is there is replaced.

    Raises:
        TypeError: another kind of model.
        OSError: the file cannot be written.

    Examples:
        >>> shape = SlideEncoderConfig(
        ...     tile_dim=8,
        ...     embed_dim=16,
        ...     num_heads=2,
        ...     num_layers=1,
        ...     segment_lengths=(16,),
        ...     dilation_rates=(1,),
        ... )
        >>> save_gigapath(SlideEncoder(shape), "slide_encoder.pth")
    """
    if not isinstance(model, SlideEncoder | SlideClassifier):
        raise TypeError(
            f"model must be a SlideEncoder or a SlideClassifier. Got {type(model).__name__}."
        )
    own = model.state_dict()
    state = {theirs: own[name].detach() for name, theirs in slide_names(own).items()}
    with writing(Path(path)):
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        else:
            torch.save(state if isinstance(model, SlideClassifier) else {"model": state}, path)
