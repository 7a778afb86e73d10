"""A linear model on embeddings of slides, tested on patients that it has not seen."""

# Shapes: S slides, E width of an embedding, K outputs of a slide.

import warnings
from importlib import import_module
from typing import Any

import numpy as np

from dilated_factory.errors import InputError
from dilated_factory.slides.tasks import LabelledSlides, scored


def probe_embeddings(
    slides: LabelledSlides, features: np.ndarray[Any, Any], *, folds: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Each metric with its 95 % interval, of each fold and of all.

    Args:
        slides: the labels.
        features: (S, E), or (S, L, E) of several states, which stand side by side.
        folds: parts of whole patients; each is tested by a model of all others.
        seed: of parts and intervals.

    Raises:
        InputError: there are fewer patients than folds, or one class is all that a fit would see.
    """
    features = features.reshape(len(features), -1).astype(np.float64)
    targets = slides.targets.numpy()
    found: dict[str, dict[str, Any]] = {}
    said: list[np.ndarray[Any, Any]] = []
    parts = slides.split(folds, seed)
    for fold, test in enumerate(parts):
        train = [i for j, part in enumerate(parts) if j != fold for i in part]
        said.append(_fitted(slides, features[train], targets[train], features[test]))
        found[str(fold)] = scored(slides, said[-1], test, seed)
    found["all"] = scored(slides, np.concatenate(said), [i for part in parts for i in part], seed)
    return found


def _fitted(
    slides: LabelledSlides,
    features: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    tested: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """What a linear model of some slides says of others (S, K)."""
    linear: Any = import_module("sklearn.linear_model")
    center, scale = features.mean(0), features.std(0) + 1e-8
    features, tested = (features - center) / scale, (tested - center) / scale
    if slides.task == "regression":
        model = linear.RidgeCV(alphas=np.logspace(-2, 4, 13)).fit(features, targets)
        values: np.ndarray[Any, Any] = model.predict(tested).reshape(len(tested), -1)
        return values
    columns = targets.T if slides.task == "multilabel" else [targets]
    outputs = []
    for column in columns:
        if len(set(column.tolist())) < 2:
            raise InputError(
                "a part must leave two classes to the others. Take fewer folds, or leave out a "
                "class of which one patient has all slides."
            )
        with warnings.catch_warnings():
            # With more features than slides the last digits of the fit change nothing.
            warnings.filterwarnings("ignore", message="lbfgs failed to converge")
            model = linear.LogisticRegression(max_iter=1000).fit(features, column)
        chances = np.zeros((len(tested), len(slides.classes)))
        if slides.task == "multilabel":
            outputs.append(model.predict_proba(tested)[:, 1])
        else:
            chances[:, model.classes_] = model.predict_proba(tested)
            return chances
    return np.stack(outputs, axis=1)
