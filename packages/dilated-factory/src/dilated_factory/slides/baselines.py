"""What a slide encoder has to beat: models of a bag of tiles that know no places."""

# Shapes: N tiles, C tile_dim, S slides, K outputs.

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dilated_factory.interop.places import TileSize


class BagClassifier(nn.Module):
    """Outputs of slides from the mean of their tiles, or from a mean by gated attention (ABMIL).

    Source of the attention: Ilse et al., arXiv 1802.04712, equation 9.

    Args:
        tile_dim: width C of a tile's features.
        num_classes: outputs K of a slide.
        attention: weigh the tiles by gated attention.
        hidden: width inside.
    """

    def __init__(
        self, tile_dim: int, num_classes: int, *, attention: bool, hidden: int = 128
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(tile_dim, hidden), nn.ReLU())
        self.gates = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2 * attention))
        self.score = nn.Linear(hidden, 1) if attention else None
        self.classifier = nn.Linear(hidden, num_classes)

    def classify(
        self, slides: Sequence[tuple[Tensor, Tensor]], *, tile_size: TileSize | None = None
    ) -> Tensor:
        """Outputs (S, K) of slides, as `SlideClassifier.classify`; places count for nothing."""
        weight = self.classifier.weight
        bags = [self.embed(tiles.to(weight)) for tiles, _ in slides]
        logits: Tensor = self.classifier(torch.stack([self._pooled(bag) for bag in bags]))
        return logits

    def _pooled(self, bag: Tensor) -> Tensor:
        if self.score is None:
            return bag.mean(0)
        tanh, gate = self.gates
        weights = self.score(tanh(bag).tanh() * gate(bag).sigmoid()).softmax(0)
        pooled: Tensor = (weights * bag).sum(0)
        return pooled
