"""Training from Python, in one call."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dilated_factory.configs.models import TrainConfig
from dilated_factory.corpora.tokens import INEXACT, load_tokenizer
from dilated_factory.training.compiling import Compile, decide_compile
from dilated_factory.training.corpus import Corpus, corpus_of
from dilated_factory.training.loop import StepMetrics, Trainer, select_device
from dilated_factory.training.parallel import Parallel
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.trained import TrainedModel, load_trained


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    corpus: Corpus | None = None,
    device: str = "auto",
    compile: Compile = "auto",
    resume: bool = False,
    checkpoint_every: int = 100,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainedModel:
    """Train a model on one device, as `dilated train` does; return it from its last checkpoint.

    Args:
        config: everything that decides the losses.
        out: run folder; it must be new, or with `resume` one of the same configuration, if any.
        corpus: what to train on; that of the config's paths when None.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        compile: torch.compile for the blocks: "on", "off", or "auto", which is on for CUDA.
        resume: go on from the newest checkpoint in `out`, or begin if there is no run in it.
        checkpoint_every: steps between checkpoints.
        on_step: is given the numbers of each step.
        should_stop: asked after each step; the run is saved, and can be resumed.

    Raises:
        CorpusError: the corpus cannot be read, or is shorter than the context.
        RunError: something is at `out`, its run is another, or the loss became infinite.
        InputError: the device is absent, or nothing can be compiled.
        OSError: a checkpoint could not be written.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> config = TrainConfig(model=shape, paths=("text",), steps=2, batch_size=2)
        >>> train(config, "run").state.step
        2
    """
    parallel = Parallel(select_device(device))
    run = None
    if resume and (Path(out) / "config.json").exists():
        run = RunFolder.open(out)
        run.require_corpus()
        run.require_same(dict(config.model) | dict(config))
    if corpus is None:
        corpus = corpus_of(
            config,
            digest=run.corpus_digest() if run else None,
            tokenizer=run.tokenizer() if run else load_tokenizer(config.tokenizer),
        )
    if not corpus.tokenizer.is_exact:
        warnings.warn(INEXACT, stacklevel=2)
    options: dict[str, Any] = {
        "parallel": parallel,
        "checkpoint_every": checkpoint_every,
        "compiled": decide_compile(compile, parallel),
    }
    if run is not None:
        trainer = Trainer(run, corpus, **options)
        trainer.restore()
    else:
        trainer = Trainer.start(out, config, corpus or corpus_of(config), **options)
    trainer.train(on_step=on_step, should_stop=should_stop)
    return load_trained(out, device=parallel.device)
