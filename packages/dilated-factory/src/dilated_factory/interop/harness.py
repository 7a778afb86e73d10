"""A `LongNetLM` under lm-evaluation-harness: scores of tasks that are files on this machine."""

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dilated_factory.corpora.tokens import BYTES, Bytes, Tokenizer
from dilated_factory.errors import InputError, missing_package
from dilated_factory.models.generation import Draw, drawable, stream_tokens
from dilated_factory.models.longnet import LongNetLM

BATCH = 16  # sequences that are scored at once
MOST_NEW_TOKENS = 256  # where a task does not say


def evaluate_tasks(
    model: LongNetLM,
    files: Sequence[str | Path],
    *,
    tokenizer: Tokenizer = BYTES,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model on tasks of lm-evaluation-harness (extra ``evaluation``).

    A model sees at most its context of each request. An empty request begins behind the end of a
    document, or behind a newline where tokens are bytes.

    Args:
        model: in eval mode, where it is to compute.
        files: of tasks, in YAML. Code that they name ("!function", "!include") is run by the
            harness: take them from where you take programs. Nothing is fetched from the net.
        tokenizer: the model's; see `load_tokenizer`.
        limit: examples of each task at most.

    Returns:
        For each task its metrics, "acc" and "acc_stderr" among them where it has these.

    Raises:
        InputError: a file cannot be read or is no task, or the tokenizer does not fit the model.
        MissingPackageError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise missing_package("evaluate_tasks", "lm-eval")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1. Got {limit}.")
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"a task must be a file. Got {str(file)!r}.")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"tokenizer must have ids below the model's vocab_size={model.config.vocab_size}. "
            f"Got {tokenizer.vocab_size - 1}."
        )
    # Read when the harness is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    evaluator, tasks = import_module("lm_eval.evaluator"), import_module("lm_eval.tasks")
    try:
        given = tasks.TaskManager(include_defaults=False).load([str(Path(f)) for f in files])
    except Exception as error:  # of YAML, of its schema, of the data, of code in it
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--tasks must be tasks of lm-evaluation-harness: {reason}") from error
    found = evaluator.simple_evaluate(
        harness_model(model, tokenizer), tasks=list(given["tasks"].values()), limit=limit,
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    return {
        task: {
            name.replace(",none", ""): float(value)
            for name, value in scores.items()
            if isinstance(value, int | float)
        }
        for task, scores in found["results"].items()
    }


def harness_model(model: LongNetLM, tokenizer: Tokenizer) -> Any:
    """A model as the harness calls it."""
    utils: Any = import_module("lm_eval.utils")
    base: Any = import_module("lm_eval.api.model").TemplateLM
    device, most = next(model.parameters()).device, model.config.context
    end = ord("\n") if isinstance(tokenizer, Bytes) else tokenizer.end_of_document or 0

    stops = () if tokenizer.end_of_document is None else (tokenizer.end_of_document,)
    allowed = drawable(tokenizer, model.config.vocab_size).to(device)

    def encode(text: str) -> list[int]:
        return tokenizer.encode([text.encode("utf-8", "surrogateescape")])[0]

    class HarnessModel(base):  # type: ignore[misc] # it need not be installed
        eot_token_id = end

        def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
            return encode(string)

        @torch.no_grad()
        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            found: dict[int, tuple[float, bool]] = {}
            order = sorted(range(len(requests)), key=lambda i: len(requests[i][1] + requests[i][2]))
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                rows = [(requests[i][1] + requests[i][2])[-most - 1 :] for i in part]
                # Behind its end a row holds anything: nothing before it sees that.
                width = max(2, *map(len, rows))
                tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
                logits = model(tokens[:, :-1].to(device))
                for index, row, scores in zip(part, rows, logits, strict=True):
                    aims = requests[index][2][-most:]
                    here = scores[len(row) - 1 - len(aims) : len(row) - 1].float()
                    wanted = torch.tensor(aims, dtype=torch.int64, device=device)
                    total = F.cross_entropy(here, wanted, reduction="sum")
                    found[index] = -total.item(), bool((here.argmax(-1) == wanted).all())
            return [found[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(encode(request.args[0]), end, most, 1)
                pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
                totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return [self._write(*request.args) for request in requests]

        def _write(self, context: str, options: dict[str, Any]) -> str:
            added = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
            ids = encode(context)[-max(1, most - added) :] or [end]
            until = options.get("until") or []
            heat = options.get("temperature", 1.0) if options.get("do_sample") else 0
            draw = Draw(heat, allowed=allowed)
            steps = stream_tokens(
                model, torch.tensor([ids]), None, added, draw, stops, 0, use_cache=model.can_cache
            )
            drawn = list(takewhile(lambda token: token not in stops, (int(t) for t in steps)))
            text = b"".join(tokenizer.tokens[token] for token in drawn).decode("utf-8", "replace")
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            return text

    return HarnessModel()
