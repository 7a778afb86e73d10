"""A trained model out of its run folder, and its scores beside the Markov baselines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dilated_factory.errors import InputError, RunError
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.training.baselines import MarkovModel
from dilated_factory.training.batches import bytes_seen
from dilated_factory.training.corpus import Corpus, corpus_of, load_held_out
from dilated_factory.training.evaluation import (
    ContextScore,
    evaluate_contexts,
    fitting_contexts,
    scored_sections,
)
from dilated_factory.training.loop import initial_model, load_model
from dilated_factory.training.precision import autocast
from dilated_factory.training.run_folder import RunFolder, RunState


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a run, on a device and ready to evaluate."""

    run: RunFolder
    model: LongNetLM
    state: RunState
    device: torch.device


@dataclass(frozen=True)
class Evaluation:
    """Held-out bits per byte at each context, and of each baseline on the same bytes.

    There are no baselines if the corpus of the run is gone or has changed.
    """

    scores: list[ContextScore]
    baselines: dict[str, float]


def load_trained(
    path: str | Path, *, device: torch.device | str = "cpu", best: bool = False
) -> TrainedModel:
    """Load a checkpoint of a run folder: the newest, or that of the least validation loss.

    Raises:
        RunError: no run folder, no such checkpoint, or a damaged one.
    """
    run = RunFolder.open(path)
    checkpoint = run.load(best=best)
    model = initial_model(run.config)
    load_model(model, checkpoint.model)
    device = torch.device(device)
    return TrainedModel(run, model.to(device).eval(), checkpoint.state, device)


def evaluate_run(
    trained: TrainedModel,
    paths: Sequence[str | Path] = (),
    *,
    contexts: Sequence[int] | None = None,
    max_bytes: int = 131072,
    cache: str | Path | None = None,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Evaluation:
    """Score a trained model on held-out bytes, beside Markov models of order 1 and 2.

    The Markov models count the very windows that the model was trained on.

    Args:
        trained: the model.
        paths: files and folders to score instead of the held-out files of the run's corpus.
        contexts: in bytes; default 512 to 16384, doubling, as far as the data goes.
        max_bytes: about how many bytes are scored at each context.
        cache: folder of the cache of tokens, as in `load_corpus`.
        on_progress: is told what is done and which share of the model's part is done, from 0 to 1.

    Raises:
        RunError: the held-out files are asked for, but the corpus has changed since training.
        CorpusError: a path does not exist, or the data is too short for the contexts.
    """
    config = trained.run.config
    corpus: Corpus | None = None
    try:
        corpus = _same_corpus(trained, cache)
    except InputError:
        if not paths:
            raise
    if corpus is None or paths:
        data = load_held_out(
            paths, text_field=config.text_field, raw=config.raw, cache=cache
        ).validation
    else:
        data = corpus.validation
    contexts = tuple(contexts or fitting_contexts(len(data)))
    # In float32 on CPUs: scores are as exact, and torch's attention is faster there.
    with autocast(trained.device, config.dtype if trained.device.type == "cuda" else "float32"):
        scores = evaluate_contexts(
            *(trained.model, data, contexts),
            max_bytes=max_bytes,
            device=trained.device,
            on_progress=on_progress,
        )
    if not all(math.isfinite(score.bits_per_byte) for score in scores):
        raise RunError("the model's predictions are not finite: its weights are too large.")
    sections = scored_sections(len(data), max(contexts), max_bytes)
    on_progress("counting for the Markov models", 1.0)
    baselines = {} if corpus is None else _baselines(trained, corpus, data, sections)
    return Evaluation(scores, baselines)


def _same_corpus(trained: TrainedModel, cache: str | Path | None) -> Corpus:
    corpus = corpus_of(trained.run.config, digest=trained.state.corpus_digest, cache=cache)
    if corpus.digest != trained.state.corpus_digest:
        raise RunError("the corpus has changed since this run was trained.")
    return corpus


def _baselines(
    trained: TrainedModel, corpus: Corpus, data: Tensor, sections: list[range]
) -> dict[str, float]:
    config = trained.run.config
    seen = bytes_seen(
        corpus.train,
        context=config.model.context,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=trained.state.step,
    )
    return {
        f"Markov order {order}": MarkovModel(order, seen).bits_per_byte(data, sections)
        for order in (1, 2)
    }
