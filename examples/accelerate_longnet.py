"""LongNetLM under accelerate, on one process or several: the same losses.

    python examples/accelerate_longnet.py                                    # needs accelerate
    torchrun --nproc-per-node 2 examples/accelerate_longnet.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_longnet.py

What surprises:
- `prepare` wraps the model in DistributedDataParallel, which averages the gradients of what goes
  through `forward`, and of nothing else: `model.module.loss(...)` trains each process alone,
  without a word. So the loss is the forward of a small module here.
- Each process gets other batches of the loader, so the batch of a step is that of the loader times
  the processes; the size is divided here. Ranks that are to share a *sequence* must get the same
  tokens instead: do not prepare their loader, and use `shard_sequence` or
  `shard_for_transformers`.
- At the end of an epoch it fills up with windows from its beginning (`even_batches`), so that all
  have as many batches: a mean over `gather` counts them twice, one over `gather_for_metrics` does
  not.
"""

import sys
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dilated_factory import LongNetConfig, LongNetLM

CONFIG = LongNetConfig(
    embed_dim=32, num_heads=2, num_layers=2, segment_lengths=(16, 64), dilation_rates=(1, 4),
    context=64,
)  # fmt: skip
TEXT = torch.tensor(list(b"It was the best of times, it was the worst of times. " * 40))
WINDOWS = TEXT.unfold(0, 65, 13)[:84]  # (windows, context + 1)
BATCH = 8  # windows of a step, of all processes


class Loss(nn.Module):
    """The loss of a model as a forward."""

    def __init__(self, model: LongNetLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Nats per token."""
        return self.model.loss(tokens)


def main() -> None:
    """Train for an epoch and score all windows."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    loss_of = Loss(LongNetLM(CONFIG))
    optimizer = torch.optim.AdamW(loss_of.parameters(), 3e-3, weight_decay=0.0)
    loader = DataLoader(WINDOWS[:80], BATCH // accelerator.num_processes)
    loss_of, optimizer, loader = accelerator.prepare(loss_of, optimizer, loader)
    losses = []
    for tokens in loader:
        loss = loss_of(tokens)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(loss_of.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())

    # 84 windows in batches of 8: the last one is not whole.
    scored = accelerator.prepare_data_loader(DataLoader(WINDOWS, BATCH))
    model = accelerator.unwrap_model(loss_of).model.eval()
    each = []
    with torch.no_grad():
        for tokens in scored:
            nats = torch.stack([model.loss(row[None]) for row in tokens])
            each.append(accelerator.gather_for_metrics(nats))
    scores = torch.cat(each)
    assert len(scores) == len(WINDOWS)
    accelerator.print(
        f"{accelerator.num_processes} process(es), {len(losses)} steps", file=sys.stderr
    )
    accelerator.print(f"losses {losses[0]:.4f} to {losses[-1]:.4f} nats")
    accelerator.print(f"{len(scores)} windows: {scores.mean():.4f} nats")
    assert losses[-1] < losses[0]
    # Gloo's threads free the last tensors meanwhile. DistributedDataParallel, which goes when this
    # function ends, would wait for them while it holds the lock that they need (torch 2.13).
    time.sleep(0.5)
    accelerator.end_training()


if __name__ == "__main__":
    main()
