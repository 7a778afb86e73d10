"""A trained model out of its run folder, and its scores beside the Markov baselines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dilated_factory.configs.models import FILES
from dilated_factory.corpora.tokens import Bytes, Tokenizer
from dilated_factory.errors import InputError, RunError
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.training.baselines import MarkovModel
from dilated_factory.training.batches import windows_seen
from dilated_factory.training.checkpoints import RunState
from dilated_factory.training.corpus import Corpus, corpus_of, load_held_out
from dilated_factory.training.evaluation import (
    ContextScore,
    evaluate_contexts,
    fitting_contexts,
    scored_sections,
)
from dilated_factory.training.precision import autocast
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.weights import initial_model, load_model


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a run, on a device and ready to evaluate.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> config = TrainConfig(model=shape, paths=("text",), steps=2, batch_size=2)
        >>> trained = train(config, "run")
        >>> trained.state.step
        2
    """

    run: RunFolder
    model: LongNetLM
    state: RunState
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own; raises as `RunFolder.tokenizer`."""
        return self.run.tokenizer()


@dataclass(frozen=True)
class Evaluation:
    """Held-out bits per byte at each context, and of each baseline on the same bytes.

    There are no baselines if the corpus of the run is gone or has changed.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> config = TrainConfig(model=shape, paths=("text",), steps=2, batch_size=2)
        >>> evaluation = evaluate_run(train(config, "run"), contexts=(8, 32), max_bytes=64)
        >>> [score.context for score in evaluation.scores]
        [8, 32]
    """

    scores: list[ContextScore]
    baselines: dict[str, float]


def load_trained(
    path: str | Path, *, device: torch.device | str = "cpu", best: bool = False
) -> TrainedModel:
    """Load a checkpoint of a run folder: the newest, or that of the least validation loss.

    Raises:
        RunError: no run folder, no such checkpoint, or a damaged one.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> config = TrainConfig(model=shape, paths=("text",), steps=2, batch_size=2)
        >>> _ = train(config, "run")
        >>> load_trained("run").model.config.context
        32
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
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    cache: str | Path | None = None,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Evaluation:
    """Score a trained model on held-out bytes, beside Markov models of order 1 and 2.

    The Markov models count the very windows that the model was trained on.

    Args:
        trained: the model.
        paths: files and folders to score instead of the held-out files of the run's corpus; they
            are read as the run read its own.
        contexts: in tokens; default 512 to 16384, doubling, as far as the data goes.
        max_bytes: about how many bytes are scored at each context.
        include: globs of names in ``paths`` to read; default: those of the run.
        exclude: as ``include``, of names that are not read.
        cache: folder of the cache of tokens, as in `load_corpus`.
        on_progress: is told what is done and which share of the model's part is done, from 0 to 1.

    Raises:
        InputError: bytes are no tokens of the model, or globs are given without paths.
        RunError: the held-out files are asked for, but the corpus has changed since training.
        CorpusError: a path does not exist, or the data is too short for the contexts.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> config = TrainConfig(model=shape, paths=("text",), steps=2, batch_size=2)
        >>> evaluation = evaluate_run(train(config, "run"), contexts=(32,), max_bytes=64)
        >>> evaluation.scores[0].scored_bytes
        64
    """
    given = {"include": include, "exclude": exclude}
    given = {name: globs for name, globs in given.items() if globs is not None}
    if given and not paths:
        raise InputError(
            f"paths must be given with {' and '.join(given)}: held-out files are those of the run."
        )
    config, tokenizer = trained.run.config, trained.tokenizer
    if config.tokenizer is None and config.model.vocab_size < 256:
        raise InputError(
            "model must have a vocabulary of 256 bytes to score bytes. "
            f"Got {config.model.vocab_size}."
        )
    corpus: Corpus | None = None
    try:
        corpus = _same_corpus(trained, cache)
    except InputError:
        if not paths:
            raise
    held_out = corpus
    if held_out is None or paths:
        reading = {name: getattr(config, name) for name in FILES} | given
        held_out = load_held_out(paths, tokenizer, cache=cache, **reading)
    data = held_out.validation
    max_tokens = max(1, round(max_bytes / held_out.bytes_per_token))
    contexts = tuple(contexts or fitting_contexts(len(data)))
    # In float32 on CPUs: scores are as exact, and torch's attention is faster there.
    with autocast(trained.device, config.dtype if trained.device.type == "cuda" else "float32"):
        scores = evaluate_contexts(
            *(trained.model, data, contexts),
            max_tokens=max_tokens,
            bytes_in=held_out.bytes_in,
            device=trained.device,
            on_progress=on_progress,
        )
    if not all(math.isfinite(score.bits_per_byte) for score in scores):
        raise RunError("the model's predictions are not finite: its weights are too large.")
    sections = scored_sections(len(data), max(contexts), max_tokens)
    on_progress("counting for the Markov models", 1.0)
    baselines = {} if corpus is None else _baselines(trained, corpus, held_out, sections)
    return Evaluation(scores, baselines)


def _same_corpus(trained: TrainedModel, cache: str | Path | None) -> Corpus:
    trained.run.require_corpus()
    corpus = corpus_of(
        trained.run.config,
        digest=trained.state.corpus_digest,
        tokenizer=trained.tokenizer,
        cache=cache,
    )
    if corpus.digest != trained.state.corpus_digest:
        raise RunError("the corpus has changed since this run was trained.")
    return corpus


def _baselines(
    trained: TrainedModel, corpus: Corpus, held_out: Corpus, sections: list[range]
) -> dict[str, float]:
    config = trained.run.config
    seen = windows_seen(corpus.train, config, trained.state.step)
    data, share = held_out.validation, 1.0
    if not isinstance(corpus.tokenizer, Bytes):
        seen = [_text(corpus, window) for window in seen]
        data, sections = _texts(held_out, sections)
        share = held_out.bytes_share
    return {
        f"Markov order {order}": MarkovModel(order, seen).bits_per_byte(data, sections) / share
        for order in (1, 2)
    }


def _text(corpus: Corpus, tokens: Tensor) -> Tensor:
    """The bytes that tokens stand for, uint8."""
    text = b"".join(corpus.tokenizer.tokens[id] for id in tokens.tolist())
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else tokens[:0].byte()


def _texts(corpus: Corpus, sections: list[range]) -> tuple[Tensor, list[range]]:
    """The bytes of sections of held-out tokens, each after some of those before it."""
    parts, found, length = [], [], 0
    for section in sections:
        before = _text(corpus, corpus.validation[max(0, section.start - 64) : section.start])[-2:]
        text = _text(corpus, corpus.validation[section.start : section.stop])
        # A Markov model needs a history; where there is none, newlines are as good as any.
        parts += [torch.full((2 - len(before),), 10, dtype=torch.uint8), before, text]
        found.append(range(length + 2, length + 2 + len(text)))
        length += 2 + len(text)
    return torch.cat(parts), found
