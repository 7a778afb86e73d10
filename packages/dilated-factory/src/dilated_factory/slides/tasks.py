"""Tasks on slides: labels from a table, splits by patient, losses, metrics with intervals."""

# Shapes: S slides, K outputs of a slide.

import csv
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.errors import InputError, missing_package

Metrics = dict[str, float]
# Random samples of patients behind an interval.
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class LabelledSlides:
    """Slides with labels.

    Attributes:
        task: as in the configuration.
        names: of the slides.
        patients: the patient of each slide.
        targets: (S,) int64 classes, or (S, K) float32.
        classes: what the outputs stand for: values of a label, or names of labels.
    """

    task: str
    names: list[str]
    patients: list[str]
    targets: Tensor
    classes: list[str]

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for a slide."""
        return 1 if self.task == "survival" else len(self.classes)

    def split(self, folds: int, seed: int) -> list[list[int]]:
        """The indices of each of ``folds`` parts; patients are whole, classes are spread evenly.

        Raises:
            InputError: there are fewer patients than parts.
        """
        slides: dict[str, list[int]] = {}
        for index, patient in enumerate(self.patients):
            slides.setdefault(patient, []).append(index)
        if len(slides) < folds:
            raise InputError(
                f"folds must not be more than the patients, {len(slides)}. Got {folds}."
            )
        order = sorted(slides)
        random.Random(seed).shuffle(order)
        order.sort(key=lambda patient: self._stratum(slides[patient][0]))
        parts: list[list[int]] = [[] for _ in range(folds)]
        for place, patient in enumerate(order):
            parts[place % folds] += slides[patient]
        return parts

    def _stratum(self, index: int) -> float:
        target = self.targets[index]
        return float(target if target.ndim == 0 else target[-1])


def read_labels(config: SlideTaskConfig, known: Sequence[str]) -> tuple[LabelledSlides, list[str]]:
    """The slides of the table that have features, and the names of those that have none.

    Raises:
        InputError: a column is missing, a value cannot be read, a slide is there twice, or no slide
            has features.
        OSError: there is no table.
    """
    rows = _read_table(config)
    there = set(known)
    # A name may have a dot of its own, as TCGA's, so an ending is taken off where that is needed.
    names = [
        name if (name := row[config.slide_column]) in there else Path(name).stem for row in rows
    ]
    missing = sorted(set(names) - there)
    kept = [i for i, name in enumerate(names) if name not in missing]
    if not kept:
        raise InputError(
            f"no slide of {config.table!r} has features: their names must be those of the files "
            f"without the ending. The first: {', '.join(names[:3])}; files: {', '.join(known[:3])}."
        )
    twice = sorted(name for name, times in Counter(names[i] for i in kept).items() if times > 1)
    if twice:
        raise InputError(
            f"{config.slide_column!r} of {config.table!r} must name each slide once. "
            f"Got twice: {', '.join(twice[:5])}."
        )
    column = config.patient_column or config.slide_column
    targets, classes = _targets(config, [rows[i] for i in kept])
    return (
        LabelledSlides(
            config.task, [names[i] for i in kept], [rows[i][column] for i in kept], targets, classes
        ),
        missing,
    )


def _read_table(config: SlideTaskConfig) -> list[dict[str, str]]:
    path, wanted = config.table, {config.slide_column: "slide_column"}
    wanted |= dict.fromkeys(config.labels, "labels")
    if config.patient_column:
        wanted[config.patient_column] = "patient_column"
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, there = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path!r} is no CSV file: {error}.") from None
    for column, field in wanted.items():
        if column not in there:
            raise InputError(
                f"{path!r} must have a column {column!r}, as {field} says. "
                f"Got {', '.join(map(repr, there))}."
            )
    for line, row in enumerate(rows, start=2):
        empty = [column for column in wanted if not (row[column] or "").strip()]
        if empty:
            raise InputError(f"{path!r}, line {line}: {empty[0]!r} must have a value. Got none.")
        row.update({column: row[column].strip() for column in wanted})
    return rows


def _targets(config: SlideTaskConfig, rows: list[dict[str, str]]) -> tuple[Tensor, list[str]]:
    if config.task in ("multiclass", "binary"):
        (column,) = config.labels
        values = [row[column] for row in rows]
        classes = sorted(set(values), key=lambda value: (not _is_number(value), _key(value)))
        if len(classes) < 2 or (config.task == "binary" and len(classes) > 2):
            wanted = "two values" if config.task == "binary" else "at least two values"
            raise InputError(
                f"{column!r} must have {wanted} for {config.task}. Got {', '.join(classes[:9])}."
            )
        return torch.tensor([classes.index(value) for value in values]), classes
    table = []
    for row in rows:
        for column in config.labels:
            flag = config.task == "multilabel" or (
                config.task == "survival" and column == config.labels[1]
            )
            if not _is_number(row[column]) or (flag and float(row[column]) not in (0, 1)):
                wanted = "0 or 1" if flag else "a number"
                raise InputError(
                    f"{column!r} must be {wanted} for {config.task}. Got {row[column]!r} of "
                    f"{row[config.slide_column]!r}."
                )
        table.append([float(row[column]) for column in config.labels])
    if config.task == "survival" and not any(seen for _, seen in table):
        raise InputError(
            f"{config.labels[1]!r} must be 1 of some slide for survival. Got 0 of all."
        )
    return torch.tensor(table), list(config.labels)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _key(value: str) -> Any:
    return float(value) if _is_number(value) else value


def loss(task: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over slides of what a task minimises.

    Survival: Cox's partial likelihood (1972) with Breslow's ties, among the slides given.

    Args:
        task: as in the configuration.
        outputs: (S, K).
        targets: as in `LabelledSlides`.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if task in ("multiclass", "binary"):
        return F.cross_entropy(outputs, targets, reduction="sum")
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    if task == "regression":
        return F.mse_loss(outputs, targets, reduction="sum")
    risk, times, seen = outputs[:, 0], targets[:, 0], targets[:, 1]
    at_risk = times[None] >= times[:, None]
    total = torch.logsumexp(risk[None].masked_fill(~at_risk, -torch.inf), dim=1)
    return ((total - risk) * seen).sum()


def scores(task: str, outputs: Tensor) -> np.ndarray[Any, Any]:
    """What a model says of slides: probabilities, values, or log risks (S, K)."""
    outputs = outputs.detach().double()
    if task in ("multiclass", "binary"):
        outputs = outputs.softmax(-1)
    elif task == "multilabel":
        outputs = outputs.sigmoid()
    found: np.ndarray[Any, Any] = outputs.numpy()
    return found


def require_metrics() -> None:
    """Raise unless scikit-learn, which computes metrics, is installed.

    Raises:
        MissingPackageError: it is not.
    """
    if find_spec("sklearn") is None:
        raise missing_package("scoring slides", "scikit-learn")


def metrics(task: str, said: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> Metrics:
    """How well scores (S, K) fit targets, the metric that chooses an epoch first.

    A metric that is not defined, e.g. AUROC where there is one class only, is left out.
    """
    judge: Any = import_module("sklearn.metrics")
    if task == "survival":
        found = concordance(said[:, 0], targets[:, 0], targets[:, 1])
        return {} if found is None else {"concordance": found}
    if task == "regression":
        fit = {"R2": judge.r2_score(targets, said)} if len(targets) > 1 else {}
        return {**fit, "mean absolute error": judge.mean_absolute_error(targets, said)}
    if task == "multilabel":
        told = [column for column in range(targets.shape[1]) if 0 < targets[:, column].mean() < 1]
        named = {
            "AUROC": judge.roc_auc_score,
            "average precision": judge.average_precision_score,
        }
        return {
            name: float(np.mean([score(targets[:, k], said[:, k]) for k in told]))
            for name, score in named.items()
            if told
        }
    classified = {}
    if set(targets.tolist()) == set(range(said.shape[1])):
        classified["AUROC"] = (
            judge.roc_auc_score(targets, said[:, 1])
            if said.shape[1] == 2
            else judge.roc_auc_score(targets, said, multi_class="ovr", average="macro")
        )
    guess = said.argmax(-1)
    with warnings.catch_warnings():
        # A resample may lack a class that was guessed.
        warnings.simplefilter("ignore", UserWarning)
        classified["balanced accuracy"] = judge.balanced_accuracy_score(targets, guess)
    classified["accuracy"] = judge.accuracy_score(targets, guess)
    return {name: float(value) for name, value in classified.items()}


def concordance(
    risk: np.ndarray[Any, Any], times: np.ndarray[Any, Any], seen: np.ndarray[Any, Any]
) -> float | None:
    """Harrell's C: of pairs whose order is known, the share that the risks order so; None of none.

    scikit-learn has no such metric.
    """
    known = (times[:, None] < times[None]) & (seen[:, None] > 0)
    if not known.any():
        return None
    agree = (risk[:, None] > risk[None]) + 0.5 * (risk[:, None] == risk[None])
    return float(agree[known].mean())


def intervals(
    score: Callable[[np.ndarray[Any, Any]], Metrics], patients: Sequence[str], seed: int
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each metric over samples of patients, drawn with replacement.

    Args:
        score: the metrics of the slides with these indices.
        patients: of each slide.
        seed: of the samples.
    """
    generator = np.random.default_rng(seed)
    of = {patient: np.flatnonzero(np.array(patients) == patient) for patient in patients}
    everyone = sorted(of)
    found: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(everyone), size=len(everyone))
        rows = np.concatenate([of[everyone[i]] for i in drawn])
        for name, value in score(rows).items():
            found.setdefault(name, []).append(value)
    return {
        name: (float(low), float(high))
        for name, values in found.items()
        for low, high in [np.nanpercentile(values, (2.5, 97.5))]
    }


def scored(
    slides: LabelledSlides, said: np.ndarray[Any, Any], rows: Sequence[int], seed: int
) -> dict[str, dict[str, Any]]:
    """Each metric of scores (S, K) of the slides ``rows``: its value and its 95 % interval."""
    targets = slides.targets[list(rows)].numpy()
    bounds = intervals(
        lambda some: metrics(slides.task, said[some], targets[some]),
        [slides.patients[i] for i in rows],
        seed,
    )
    return {
        name: {"value": value, "interval": list(bounds.get(name, (math.nan, math.nan)))}
        for name, value in metrics(slides.task, said, targets).items()
    }
