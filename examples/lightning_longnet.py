"""LongNetLM in a LightningModule: the losses are those of a plain loop.

    python examples/lightning_longnet.py        # needs lightning

`LongNetLM.loss` makes the gradients of the head while it computes the loss, a chunk of logits at a
time. Lightning does not notice: it calls backward once on what `training_step` returns. With
`accumulate_grad_batches` it divides that loss first, which scales all gradients alike.

What surprises:
- Lightning accumulates the mean of means: batches of other numbers of targets count alike. Where
  rows are padded or documents packed, divide by the targets of all batches by hand.
- With several devices Lightning hands each another part of the batches, so the batch of a step is
  that of the loader times the devices. `training_step` goes through the forward of
  DistributedDataParallel there, so `self.model.loss` in it is averaged over them.
"""

import logging
import warnings

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dilated_factory import LongNetConfig, LongNetLM

CONFIG = LongNetConfig(
    embed_dim=32, num_heads=2, num_layers=2, segment_lengths=(16, 64), dilation_rates=(1, 4),
    context=64,
)  # fmt: skip
TEXT = torch.tensor(list(b"It was the best of times, it was the worst of times. " * 40))
WINDOWS = TEXT.unfold(0, 65, 13)[:120]  # (windows, context + 1)


class LongNetModule(lightning.LightningModule):
    """Training of a LongNetLM on windows of tokens."""

    def __init__(self, config: LongNetConfig, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.model, self.learning_rate = LongNetLM(config), learning_rate
        self.losses: list[float] = []

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        """Nats per token of a batch."""
        loss = self.model.loss(tokens)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One rate for all."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.0)


def by_lightning(batch: int, accumulate: int) -> list[float]:
    """Losses of each step's batches."""
    torch.manual_seed(0)
    module = LongNetModule(CONFIG)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(WINDOWS, batch))
    return torch.tensor(module.losses).view(-1, accumulate).mean(1).tolist()


def by_hand(batch: int) -> list[float]:
    """The same in a plain loop."""
    torch.manual_seed(0)
    model, losses = LongNetLM(CONFIG), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for tokens in WINDOWS.split(batch):
        loss = model.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # on workers of loaders, and the like
    expected = by_hand(8)
    for batch, accumulate in ((8, 1), (4, 2)):
        losses = by_lightning(batch, accumulate)
        worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        print(
            f"{len(losses)} steps of {accumulate} x {batch}: {losses[0]:.3f} to {losses[-1]:.3f} "
            f"nats, differs from a plain loop by {worst:.1e}"
        )
        assert worst < 1e-4
