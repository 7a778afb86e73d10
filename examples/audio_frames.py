"""100,000 frames of audio to a class that stands far from where it is read.

    python examples/audio_frames.py
    python examples/audio_frames.py --frames 1000000 --device cuda

A recording is made up: noise, and one call of one of four kinds in its first half, a tenth of all
frames. The class is read from the mean of the last tenth, so attention has to bring it there,
over at least 40,000 frames. Attention of near frames alone guesses.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_factory import LongNetEncoder, LongNetEncoderConfig

STRIDE = 8  # frames that become one row
SHORT = 1600  # frames of a recording to begin with
FEATURES, CLASSES = 80, 4  # of a frame, as in a mel spectrogram with one every 10 ms


class FrameClassifier(nn.Module):
    """Frames (B, N, FEATURES) to logits (B, CLASSES), for B recordings of N frames."""

    def __init__(self, segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...]) -> None:
        super().__init__()
        shape = LongNetEncoderConfig(
            embed_dim=32,
            num_heads=4,
            num_layers=1,
            ffn_dim=64,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            context=max(segment_lengths),
            positions="none",  # so what is learned on short recordings holds on long ones
        )
        self.project = nn.Conv1d(FEATURES, shape.embed_dim, STRIDE, STRIDE)
        self.encoder = LongNetEncoder(shape)
        self.head = nn.Linear(shape.embed_dim, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits of the mean over the last tenth."""
        states = self.encoder(self.project(frames.mT).mT)  # (B, N / STRIDE, 32)
        return self.head(states[:, -(states.shape[1] // 10) :].mean(1))


def record(count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames (count, frames, FEATURES), and which kind of call each has (count)."""
    sound = torch.randn(count, frames, FEATURES, generator=generator)
    kinds = torch.randint(CLASSES, (count,), generator=generator)
    call = frames // 10
    starts = torch.randint(frames // 2 - call, (count,), generator=generator)
    for row, kind, start in zip(sound, kinds.tolist(), starts.tolist(), strict=True):
        row[start : start + call, 20 * kind : 20 * (kind + 1)] += 3  # a band of the spectrum
    return sound, kinds


def train(
    model: FrameClassifier, steps: int, count: int, frames: int, generator: torch.Generator
) -> float:
    """Return the loss of the last step."""
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        sound, kinds = record(count, frames, generator)
        loss = F.cross_entropy(model(sound.to(device)), kinds.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: FrameClassifier, count: int, frames: int, generator: torch.Generator) -> float:
    """Share of new recordings whose class is found, one recording after the other."""
    device = model.head.weight.device
    right = 0
    for _ in range(count):
        sound, kinds = record(1, frames, generator)
        right += (model(sound.to(device)).argmax(1).cpu() == kinds).sum().item()
    return right / count


def main() -> None:
    """Train on short recordings, then on some of full length; the same for near frames alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    far = ((16, options.frames // STRIDE), (1, 4))  # 4 heads: each row sees far in one of them
    for name, pattern in ("near and far", far), ("near alone", ((16,), (1,))):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        model = FrameClassifier(*pattern).to(options.device)
        short = train(model, 120, 16, SHORT, generator)
        start = time.perf_counter()
        long = train(model, 2, 1, options.frames, generator)
        seconds = (time.perf_counter() - start) / 2
        found = accuracy(model, 8, options.frames, generator)
        print(
            f"{name}: loss {short:.2f} on {SHORT:,} frames, {long:.2f} on {options.frames:,} "
            f"({seconds:.2f} s a step), {found:.0%} of 8 new recordings right",
            flush=True,
        )


if __name__ == "__main__":
    main()
