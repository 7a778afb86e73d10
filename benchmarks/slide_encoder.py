"""A random slide encoder of GigaPath's published size over one slide on the CPU, in float32.

Reports the time of a forward pass, least and median of the rounds, and the peak memory of the
process, with what it held before the first pass beside it.

    ./noxw -s bench -- slide_encoder.py [--tiles 20000] [--threads 2] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _machine import describe

from dilated_factory import SlideEncoder, SlideEncoderConfig

PUBLISHED_PARAMETERS = 86_330_880


def main() -> None:
    """Run the encoder and print a line of JSON for the machine and one for the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = describe()
    print(json.dumps(machine))
    results = measure(arguments.tiles, arguments.rounds)
    print(json.dumps(results))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine, "results": results}))


def measure(tiles: int, rounds: int) -> dict[str, Any]:
    """Build the encoder, run it, check that what comes out is an embedding."""
    torch.manual_seed(0)
    config = SlideEncoderConfig()
    model = SlideEncoder(config).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == PUBLISHED_PARAMETERS, parameters
    inputs = torch.randn(1, tiles, config.tile_dim)
    coords = torch.randint(int(config.grid_size * config.tile_size), (1, tiles, 2))
    before = peak_bytes()
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds):
            start = time.perf_counter()
            (embedding,) = model(inputs, coords)
            seconds.append(time.perf_counter() - start)
    assert embedding.shape == (1, config.embed_dim)
    assert embedding.isfinite().all()
    return {
        "parameters": parameters,
        "tiles": tiles,
        "seconds_least": round(min(seconds), 2),
        "seconds_median": round(statistics.median(seconds), 2),
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
        "parameter_bytes": 4 * parameters,
        "input_bytes": inputs.nbytes,
    }


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
