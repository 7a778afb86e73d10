"""Training a classifier of slides fold by fold: the best epoch, curves, scores with intervals."""

# Shapes: S slides, K outputs of a slide.

import csv
import errno
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dilated_factory.configs.files import writing
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.errors import InputError, RunError
from dilated_factory.interop.checkpoints import read_checkpoint
from dilated_factory.interop.classifier import SlideClassifier, parameter_groups, save_gigapath
from dilated_factory.interop.gigapath import SlideEncoder
from dilated_factory.slides.baselines import BagClassifier
from dilated_factory.slides.models import autocast_dtype, loaded
from dilated_factory.slides.readers import SlideFeatures, count_tiles, read_slide_features
from dilated_factory.slides.tasks import (
    LabelledSlides,
    Metrics,
    loss,
    metrics,
    require_metrics,
    scored,
    scores,
)
from dilated_factory.training.atomic import replacing, write_text
from dilated_factory.training.figures import save_epochs
from dilated_factory.training.lock import FolderLock, holder

Classifier: TypeAlias = SlideClassifier | BagClassifier
Progress: TypeAlias = Callable[[str, float], None]

# An epoch is better by its first metric; where none is defined, by its loss.
CHECKPOINT, PREDICTIONS = "best.pth", "predictions.csv"
CONFIG, LABELS = "config.json", "labels.json"  # which a fold is of


class SlideTask:
    """A task with its slides: trains a model for each fold and scores it.

    Args:
        config: the task.
        slides: its slides.
        files: the feature file of each.
        device: where to compute.

    Raises:
        InputError: there are too few patients for the folds, or a file cannot be read.
        MissingPackageError: scikit-learn is not installed.
    """

    def __init__(
        self,
        config: SlideTaskConfig,
        slides: LabelledSlides,
        files: Sequence[Path],
        device: torch.device,
    ) -> None:
        require_metrics()
        self.config, self.slides, self.files, self.device = config, slides, files, device
        self.parts = slides.split(config.folds, config.seed)
        self.width = read_slide_features(files[0]).features.shape[1]
        wanted = config.encoder.tile_dim
        # Random weights of an encoder that does not say take the features' width.
        told = config.checkpoint is not None or "tile_dim" in config.encoder.model_fields_set
        fixed = config.model == "encoder" and told and not config.new_projection
        if fixed and wanted != self.width:
            raise InputError(
                f"encoder.tile_dim must be the width of the features, {self.width}; of another "
                f"tile encoder, with new_projection = true. Got {wanted}."
            )

    @property
    def encoder_weights(self) -> int:
        """How many weights the matrices of the slide encoder have."""
        shape = self.config.encoder.encoder
        layer = 2 * shape.embed_dim * (2 * shape.embed_dim + shape.hidden_dim)
        return shape.num_layers * layer + self.width * shape.embed_dim

    def operations(self, folds: int) -> float:
        """About how many the products of tiles and the encoder's weights take in so many folds."""
        config = self.config
        if config.model != "encoder":
            return 0.0
        trained = (1 if config.freeze else 3) * (config.folds - 2)
        passes = (config.epochs * (trained + 1) + 1) * folds / config.folds
        return 2.0 * self.encoder_weights * sum(map(count_tiles, self.files)) * passes

    def run(self, folder: Path, folds: Sequence[int], on_progress: Progress) -> dict[str, Any]:
        """Train and test the folds, each in a folder of its own; the scores of all that are done.

        A fold that has its predictions is not trained again, and one that was stopped begins anew.

        Raises:
            RunError: a fold's folder is of another task, of other slides or labels, or damaged,
                another process trains the fold, or training diverges.
        """
        for place, fold in enumerate(folds):
            home = folder / f"fold{fold}"
            if self.predictions(folder, fold):
                continue
            home.mkdir(parents=True, exist_ok=True)

            def show(what: str, share: float, place: int = place, fold: int = fold) -> None:
                on_progress(f"fold {fold}, {what}", (place + share) / len(folds))

            with _locked(home):
                write_text(home / CONFIG, self.config.model_dump_json(indent=2))
                write_text(home / LABELS, self._labels())
                said = self._train(home, fold, show)
                self._save_predictions(home / PREDICTIONS, fold, said)
        results: dict[str, Any] = {"classes": self.slides.classes, "folds": {}}
        scores_of, tested = [], []
        for fold, test in enumerate(self.parts):
            if rows := self.predictions(folder, fold):
                found = np.array(rows)
                results["folds"][str(fold)] = scored(self.slides, found, test, self.config.seed)
                scores_of.append(found)
                tested += test
        together = np.concatenate(scores_of)
        results["all folds"] = scored(self.slides, together, tested, self.config.seed)
        write_text(folder / "results.json", json.dumps(results, indent=2))
        return results

    def predictions(self, folder: Path, fold: int) -> list[list[float]]:
        """What a fold that is done says of its test slides (S, K); empty where it is not.

        Raises:
            RunError: its folder is of another task, of other slides or labels, or damaged.
        """
        home = folder / f"fold{fold}"
        path = home / PREDICTIONS
        of_it = _holds(home / CONFIG, self.config.model_dump_json(indent=2))
        # A process that was killed leaves a file under a temporary name, or its lock.
        if not of_it and any(x.name != "lock" and x.name[0] != "." for x in _entries(home)):
            raise RunError(f"{str(home)!r} exists, and is of another task: take another --out.")
        if not path.exists():
            return []
        if not _holds(home / LABELS, self._labels()):
            raise RunError(
                f"{str(home)!r} exists, and has other slides or labels: take another --out."
            )
        try:
            with path.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            said = [[float(value) for value in row[2:]] for row in rows]
            whole = np.isfinite(np.array(said)).all() and len(rows[0]) == len(header)
        except (IndexError, ValueError, csv.Error):
            whole = False
        if not whole or [header, *(row[:2] for row in rows)] != self._first_columns(fold):
            raise RunError(f"{str(path)!r} is damaged: remove it, and the fold is trained again.")
        return said

    def _first_columns(self, fold: int) -> list[list[str]]:
        """What predictions.csv has beside its numbers: its header, and slide and patient."""
        names = ["risk"] if self.config.task == "survival" else self.slides.classes
        pairs = ([self.slides.names[i], self.slides.patients[i]] for i in self.parts[fold])
        return [["slide", "patient", *names], *pairs]

    def _labels(self) -> str:
        """All slides with their patients and targets, as JSON."""
        slides = self.slides
        targets = slides.targets.tolist()
        rows = zip(slides.names, slides.patients, targets, strict=True)
        return json.dumps({"classes": slides.classes, "slides": list(rows)})

    def _train(self, home: Path, fold: int, show: Progress) -> np.ndarray[Any, Any]:
        """Train on the other parts, keep the best epoch, and score the test slides (S, K)."""
        config = self.config
        torch.manual_seed(config.seed + fold)
        chosen = (fold + 1) % config.folds
        train = [i for j, part in enumerate(self.parts) if j not in (fold, chosen) for i in part]
        shift, scale = self._range(train)
        model = self.new_model()
        optimizer = torch.optim.AdamW(self._groups(model), lr=config.learning_rate)
        steps = config.epochs * math.ceil(len(train) / config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _cosine(s, steps, config))
        order, records, best = list(train), [], -math.inf
        shuffle = random.Random(f"{config.seed} {fold}")
        for epoch in range(config.epochs):
            shuffle.shuffle(order)
            model.train()
            total = 0.0
            for start in range(0, len(order), config.batch_size):
                show(
                    f"epoch {epoch + 1} of {config.epochs}",
                    (epoch + start / len(order)) / config.epochs,
                )
                batch = order[start : start + config.batch_size]
                total += self._step(model, optimizer, batch, shift, scale)
                schedule.step()
            outputs = self._outputs(model, self.parts[chosen])
            record = self._judged(outputs, self.parts[chosen], shift, scale)
            records.append({"epoch": epoch + 1, "training loss": total / len(order), **record})
            write_text(home / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))
            better = next(
                (v for k, v in record.items() if k in ("AUROC", "R2", "concordance")),
                -record["loss"],
            )
            if better > best:
                best = better
                self._save(model, home / CHECKPOINT)
        save_epochs(home / "curves.png", records)
        model.load_state_dict(self._saved(home / CHECKPOINT))
        return scores(config.task, self._outputs(model, self.parts[fold]) * scale + shift)

    def new_model(self) -> Classifier:
        """A model as the configuration says, with a new head."""
        config, outputs = self.config, self.slides.outputs
        if config.model != "encoder":
            return BagClassifier(self.width, outputs, attention=config.model == "abmil").to(
                self.device
            )
        shape = config.encoder.model_copy(update={"tile_dim": self.width})
        options: dict[str, Any] = {"feat_layers": config.feat_layers, "freeze": config.freeze}
        if config.checkpoint is None:
            model = SlideClassifier(SlideEncoder(shape), outputs, **options)
        else:
            strict = not config.new_projection
            model = loaded(
                lambda path: SlideClassifier.load(
                    path, shape, num_classes=outputs, strict=strict, **options
                ),
                Path(config.checkpoint),
            )
        return model.to(self.device)

    def _groups(self, model: Classifier) -> list[dict[str, Any]]:
        config = self.config
        if isinstance(model, BagClassifier):
            return [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
        return parameter_groups(
            model,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )

    def _range(self, train: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What regression's outputs are in units of: mean and deviation in training."""
        if self.config.task != "regression":
            return torch.zeros(1), torch.ones(1)
        targets = self.slides.targets[list(train)]
        return targets.mean(0), targets.std(0, correction=0).clamp(min=1e-6)

    def _step(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        batch: Sequence[int],
        shift: Tensor,
        scale: Tensor,
    ) -> float:
        """One step of the optimizer on a batch; the sum of its slides' losses."""
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        # Cox compares the slides of a step with each other, so they are computed together.
        limit = math.inf if self.config.task == "survival" else self.config.max_tiles
        for rows, slides in self._read(batch, limit):
            targets = self._targets(rows, shift, scale).to(self.device)
            value = loss(self.config.task, self._classify(model, slides), targets)
            _require_finite(value)
            (value / len(batch)).backward()
            total += value.item()
        nn.utils.clip_grad_norm_(model.parameters(), self.config.gradient_clip)
        optimizer.step()
        return total

    def _targets(self, rows: Sequence[int], shift: Tensor, scale: Tensor) -> Tensor:
        targets = self.slides.targets[list(rows)]
        return (targets - shift) / scale if self.config.task == "regression" else targets

    def _classify(self, model: Classifier, slides: Sequence[SlideFeatures]) -> Tensor:
        placed = [slide.placed(self.config.tile_size) for slide in slides]
        dtype = autocast_dtype(self.config.dtype)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            return model.classify(
                [(features.to(self.device), coords) for features, coords, _ in placed],
                tile_size=[size for _, _, size in placed],
            )

    @torch.no_grad()
    def _outputs(self, model: Classifier, rows: Sequence[int]) -> Tensor:
        """The outputs (S, K) of slides, on the CPU."""
        model.eval()
        found = [
            self._classify(model, slides).float().cpu()
            for _, slides in self._read(rows, self.config.max_tiles)
        ]
        return torch.cat(found)

    def _judged(
        self, outputs: Tensor, rows: Sequence[int], shift: Tensor, scale: Tensor
    ) -> Metrics:
        _require_finite(outputs)
        value = loss(self.config.task, outputs, self._targets(rows, shift, scale)).item()
        said = scores(self.config.task, outputs * scale + shift)
        targets = self.slides.targets[list(rows)].numpy()
        return {"loss": value / len(rows), **metrics(self.config.task, said, targets)}

    def _read(
        self, rows: Sequence[int], limit: float
    ) -> Iterator[tuple[list[int], list[SlideFeatures]]]:
        """Slides with at most ``limit`` tiles together, and their indices."""
        some: list[int] = []
        slides: list[SlideFeatures] = []
        for row in rows:
            slide = read_slide_features(self.files[row])
            if slides and sum(len(s.features) for s in slides) + len(slide.features) > limit:
                yield some, slides
                some, slides = [], []
            some.append(row)
            slides.append(slide)
        yield some, slides

    def _save(self, model: Classifier, path: Path) -> None:
        with replacing(path) as temporary:
            if isinstance(model, SlideClassifier):
                save_gigapath(model, temporary)
            else:
                with writing(path):
                    torch.save(model.state_dict(), temporary)

    def _saved(self, path: Path) -> dict[str, Tensor]:
        if self.config.model != "encoder":
            return loaded(read_checkpoint, path).tensors
        return load_classifier(path, self.config, self.width).state_dict()

    def _save_predictions(self, path: Path, fold: int, said: np.ndarray[Any, Any]) -> None:
        header, *firsts = self._first_columns(fold)
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([*first, *row] for first, row in zip(firsts, said, strict=True))


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_bytes() == text.encode()


def _entries(home: Path) -> list[Path]:
    return list(home.iterdir()) if home.exists() else []


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Keep other processes from training a fold, where the file system has locks."""
    try:
        lock = FolderLock(home)
    except BlockingIOError:
        raise RunError(f"{str(home)!r} is being trained by {holder(home)}.") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        yield
    else:
        try:
            yield
        finally:
            lock.release()


def load_classifier(path: Path, config: SlideTaskConfig, width: int) -> SlideClassifier:
    """The classifier that a task kept, for features of a width.

    Raises:
        InputError: the file is no such classifier.
    """
    shape = config.encoder.model_copy(update={"tile_dim": width})
    with warnings.catch_warnings():  # these weights were trained here, not by torchscale
        warnings.filterwarnings("ignore", "outputs differ from torchscale's")
        return loaded(
            lambda file: SlideClassifier.load(file, shape, feat_layers=config.feat_layers), path
        )


def _require_finite(found: Tensor) -> None:
    if not found.isfinite().all():
        raise RunError("training has diverged, to what is no number: lower learning_rate.")


def _cosine(step: int, steps: int, config: SlideTaskConfig) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    share = step / steps
    if share < config.warmup:
        return (step + 1) / (config.warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (share - config.warmup) / (1 - config.warmup)))
