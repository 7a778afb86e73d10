"""Tasks on slides: tables, splits, losses, metrics, and training from end to end."""

import csv
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dilated_factory import read_config
from dilated_factory.cli import main, slides_train
from dilated_factory.cli.slides_train import read_task
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.errors import InputError
from dilated_factory.slides import tasks
from dilated_factory.slides.readers import slide_files
from dilated_factory.slides.tasks import concordance, intervals, loss, metrics, read_labels, scores
from dilated_factory.slides.training import SlideTask
from dilated_factory.training.lock import FolderLock

pytest.importorskip("sklearn", reason="scikit-learn, of the extra slides, is not installed")

ENCODER = """
[encoder]
embed_dim = 16
num_heads = 2
num_layers = 1
segment_lengths = [16, 64]
dilation_rates = [1, 2]
global_pool = true
"""


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RESAMPLES", 50)


def cohort(folder: Path, slides: int = 30) -> Path:
    """Slides whose label shifts their features, two slides a patient, and a table of labels."""
    generator = torch.Generator().manual_seed(0)
    (folder / "features").mkdir()
    rows = []
    for index in range(slides):
        label = index // 2 % 2
        tiles = torch.randn(8 + index, 6, generator=generator) + label
        places = torch.randint(200, (8 + index, 2), generator=generator) * 256
        torch.save({"features": tiles, "coords": places}, folder / "features" / f"s{index}.pt")
        value = label + index / 100
        rows.append(
            [f"s{index}", f"p{index // 2}", ["no", "yes"][label], index % 3, label, 1, value]
        )
    with (folder / "labels.csv").open("w", newline="") as file:
        header = ["slide", "patient", "mutated", "grade", "flag", "seen", "value"]
        csv.writer(file).writerows([header, *rows])
    return folder


def task(folder: Path, text: str, *, name: str = "task.toml") -> Path:
    shared = 'table = "labels.csv"\nfeatures = ["features"]\npatient_column = "patient"\n'
    path = folder / name
    path.write_text(
        shared + "tile_size = 256\nfolds = 3\nepochs = 4\nlearning_rate = 0.01\n" + text
    )
    return path


TASKS = {
    "binary": ('task = "binary"\nlabels = ["mutated"]\n', "AUROC"),
    "multiclass": ('task = "multiclass"\nlabels = ["grade"]\n', "AUROC"),
    "multilabel": ('task = "multilabel"\nlabels = ["flag", "seen"]\n', "AUROC"),
    "regression": ('task = "regression"\nlabels = ["value"]\n', "R2"),
    "survival": ('task = "survival"\nlabels = ["value", "seen"]\n', "concordance"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_trained_and_tested_from_its_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, metric = TASKS[kind]
    path = task(cohort(tmp_path), text + ENCODER)
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "run"), "--fold", "1"]) == 0
    out = capsys.readouterr().out
    assert "30 slides, 15 patients" in out
    assert metric in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = results["folds"]["1"][metric]
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    if kind != "multiclass":  # whose labels have nothing to do with the features
        assert found["value"] > {"regression": 0.3, "survival": 0.55}.get(kind, 0.8)
    home = tmp_path / "run" / "fold1"
    names = {"best.pth", "config.json", "curves.png", "metrics.jsonl", "predictions.csv"}
    names |= {"labels.json", "lock"}
    assert {file.name for file in home.iterdir()} == names
    assert len((home / "metrics.jsonl").read_text().splitlines()) == 4
    with (home / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert len({row["patient"] for row in rows}) == 5
    config = read_config(home / "config.json")
    assert isinstance(config, SlideTaskConfig)
    assert config.task == kind


@pytest.mark.parametrize("model", ["mean_pool", "abmil"])
def test_baselines_are_trained_in_the_same_way(model: str, tmp_path: Path) -> None:
    path = task(cohort(tmp_path), TASKS["binary"][0] + f'model = "{model}"\n')
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["folds"]) == {"0", "1", "2"}
    assert results["all folds"]["AUROC"]["value"] > 0.9
    assert results["classes"] == ["no", "yes"]


def test_slides_that_accumulate_step_as_those_computed_together(tmp_path: Path) -> None:
    cohort(tmp_path)
    losses = []
    for tiles in (1, 10_000):
        text = TASKS["binary"][0] + f'max_tiles = {tiles}\nmodel = "mean_pool"\n'
        path = task(tmp_path, text, name=f"task{tiles}.toml")
        run = tmp_path / f"run{tiles}"
        assert main(["slides", "train", str(path), "--out", str(run), "--fold", "0"]) == 0
        records = (run / "fold0" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["training loss"] for record in records])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_pattern_that_torchscale_misplaces_is_no_warning_for_weights_of_ours(
    tmp_path: Path,
) -> None:
    uneven = ENCODER.replace("[16, 64]", "[16, 63]")  # the rate 2 does not divide 63
    path = task(cohort(tmp_path, 12), TASKS["binary"][0] + uneven)
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "run"), "--fold", "0"]) == 0


def test_hours_on_a_cpu_are_told_with_what_takes_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(*_: object) -> dict[str, Any]:
        return {"folds": {}, "all folds": {}}

    def said(text: str, *options: str) -> str:
        path = task(folder, TASKS["binary"][0] + text)
        assert main(["slides", "train", str(path), "--out", str(tmp_path / "run"), *options]) == 0
        return capsys.readouterr().out

    assert slides_train.operations_a_second() > 1e8
    speed = 1e9
    monkeypatch.setattr(slides_train, "operations_a_second", lambda: speed)
    folder = cohort(tmp_path)
    path = task(folder, TASKS["binary"][0] + ENCODER)
    with FlopCounterMode(display=False) as counter:
        assert main(["slides", "train", str(path), "--out", str(tmp_path / "small")]) == 0
    config, files = read_task(path), slide_files([folder / "features"])
    labelled, _ = read_labels(config, [file.stem for file in files])
    work = SlideTask(config, labelled, files, torch.device("cpu"))
    assert 0.7 < work.operations(3) / counter.get_total_flops() < 1
    assert "at least" not in capsys.readouterr().out
    monkeypatch.setattr(SlideTask, "run", done)
    # 675 tiles pass 3 * 4 times forward and backward, 4 times to be judged and once to be tested.
    minutes = 2 * (12 * 12 * 768**2 + 6 * 768) * 675 * (3 * 4 + 4 + 1) / 60e9
    told = said("")
    assert f"this takes at least {minutes:.0f} minutes on this CPU" in told
    assert "85 million weights, the published size, since the task says nothing of it" in told
    assert 'freeze = true, model = "abmil", or a smaller [encoder]' in told
    assert f"at least {minutes / 3:.0f} minutes" in said("", "--fold", "1")
    assert f"at least {minutes * 9 / 17:.0f} minutes" in said("freeze = true\n")
    assert "85 million weights. Less" in said("[encoder]\nglobal_pool = true\n")
    assert "at least" not in said('model = "abmil"\n')
    speed = 1e8
    assert f"at least {minutes / 6:.0f} hours" in said("")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('task = "binary"\nlabels = ["grade"]\n', "'grade' must have two values for binary"),
        (
            'task = "binary"\nlabels = ["nothing"]\n',
            "column 'nothing', as labels says. Got 'slide'",
        ),
        (
            TASKS["binary"][0] + 'slide_column = "slide_id"\n',
            "'slide_id', as slide_column says. Got",
        ),
        ('task = "survival"\nlabels = ["value"]\n', "labels must name 2 of the columns for surv"),
        ('task = "regression"\nlabels = ["mutated"]\n', "'mutated' must be a number for regress"),
        ('task = "multilabel"\nlabels = ["grade"]\n', "'grade' must be 0 or 1 for multilabel"),
        ('task = "dreaming"\nlabels = ["grade"]\n', "task: Input should be"),
        (TASKS["binary"][0] + "layer_decay = 2\n", "layer_decay"),
        (TASKS["binary"][0] + 'slide_column = "patient"\n', "no slide of .* has features"),
        (TASKS["binary"][0] + 'checkpoint = "labels.csv"\n', "tile_dim must be the width of the"),
        (TASKS["binary"][0] + "folds = 99\n", "folds"),
    ],
)
def test_bad_tasks_are_one_line_and_exit_code_2(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = task(cohort(tmp_path), text)
    if "folds" in text:
        path.write_text(path.read_text().replace("folds = 3\n", "", 1))
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(re.escape(says).replace(r"\.\*", ".*"), error)


def test_features_that_are_no_numbers_are_named_with_their_tile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A feature that overflowed in float16 would spoil every weight."""
    path = task(cohort(tmp_path), TASKS["binary"][0] + 'model = "mean_pool"\n')
    file = tmp_path / "features" / "s3.pt"
    content = torch.load(file)
    content["features"][2, 1] = math.inf
    torch.save(content, file)
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "s3 must have finite features. Got others in 1 of 11 tiles, first in tile 2." in (
        capsys.readouterr().err
    )


def test_training_that_diverges_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = task(cohort(tmp_path), TASKS["binary"][0] + 'model = "mean_pool"\n')
    path.write_text(path.read_text().replace("learning_rate = 0.01", "learning_rate = 1e25"))
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "training has diverged" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("model", ["mean_pool", "encoder"])
def test_a_kept_epoch_that_is_damaged_when_it_is_read_is_one_line(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = task(cohort(tmp_path, 12), TASKS["binary"][0] + f'model = "{model}"\n' + ENCODER)
    table = b"slide,patient,mutated,value\n"
    monkeypatch.setattr(torch, "save", lambda content, path: Path(path).write_bytes(table))
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "best.pth' is no checkpoint, or is damaged" in error
    assert error.count("\n") == 1


def test_a_run_goes_on_with_the_folds_that_are_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task(cohort(tmp_path), TASKS["binary"][0] + 'model = "mean_pool"\n')

    def train(out: str, *options: str) -> int:
        return main(["slides", "train", str(path), "--out", str(tmp_path / out), *options])

    assert train("whole") == 0
    assert train("run", "--fold", "1") == 0
    (tmp_path / "run" / "fold0").mkdir()  # as a run leaves it that is stopped at once
    kept = (tmp_path / "run" / "fold1" / "best.pth").stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # the same task, told from elsewhere
    path = Path(path.name)
    assert train("run", "--fold", "0", "--fold", "1") == 0
    assert "done before, and not trained again: fold 1\n" in capsys.readouterr().out
    assert train("run", "--fold", "2") == 0
    assert (tmp_path / "run" / "fold1" / "best.pth").stat().st_mtime_ns == kept
    whole, found = ((tmp_path / x / "results.json").read_text() for x in ("whole", "run"))
    assert json.loads(found) == json.loads(whole)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "a header only": lambda whole: whole.splitlines(keepends=True)[0],
    "cut off": lambda whole: whole[: len(whole) // 2],
    "an empty line": lambda whole: whole + b"\n",
    "no text": lambda whole: b"\xff\xfe\0",
    "no number": lambda whole: re.sub(rb",0\.\d+", b",many", whole, count=1),
    "not finite": lambda whole: re.sub(rb",0\.\d+", b",nan", whole, count=1),
    "other classes": lambda whole: whole.replace(b"no,yes", b"yes,no"),
    "a column less": lambda whole: re.sub(
        rb",[^,\r]*\r", b"\r", whole.replace(b"no,yes", b"no,yes,")
    ),
}


def test_a_done_fold_that_is_damaged_or_of_other_labels_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = task(cohort(tmp_path), TASKS["regression"][0] + 'model = "mean_pool"\n')
    numbers = ["slides", "train", str(path), "--out", str(tmp_path / "numbers"), "--fold", "0"]
    assert main(numbers) == 0
    table = tmp_path / "labels.csv"
    whole = table.read_text()
    table.write_text(whole.replace("1.02", "1.03"))  # the parts stay as they are
    capsys.readouterr()
    assert main(numbers) == 2
    assert "exists, and has other slides or labels: take another" in capsys.readouterr().err
    table.write_text(whole)
    path = task(tmp_path, TASKS["binary"][0] + 'model = "mean_pool"\n')
    command = ["slides", "train", str(path), "--out", str(tmp_path / "run"), "--fold", "0"]
    assert main(command) == 0
    predictions = tmp_path / "run" / "fold0" / "predictions.csv"
    sound = predictions.read_bytes()
    for name, damage in DAMAGES.items():
        predictions.write_bytes(damage(sound))
        capsys.readouterr()
        assert main(command) == 2, name
        error = capsys.readouterr().err
        assert "predictions.csv' is damaged: remove it, and the fold is trained again." in error
        assert error.count("\n") == 1
    predictions.unlink()
    assert main(command) == 0
    assert predictions.read_bytes() == sound


def test_a_fold_that_another_process_trains_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = task(cohort(tmp_path), TASKS["binary"][0] + 'model = "mean_pool"\n')
    command = ["slides", "train", str(path), "--out", str(tmp_path / "run"), "--fold"]
    home = tmp_path / "run" / "fold0"
    home.mkdir(parents=True)
    (home / ".config.json.1.tmp").write_text("{")  # of a process that was killed
    lock = FolderLock(home)
    assert main([*command, "0"]) == 2
    assert f"fold0' is being trained by process {os.getpid()} on " in capsys.readouterr().err
    lock.release()
    assert main([*command, "0"]) == 0


def test_scores_are_of_all_folds_that_are_done_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task(cohort(tmp_path), TASKS["binary"][0] + 'model = "mean_pool"\n')
    command = ["slides", "train", str(path), "--out", str(tmp_path / "run"), "--fold"]
    train, others = SlideTask._train, ["1"]

    def meanwhile(*arguments: Any) -> Any:
        if others:
            assert main([*command, others.pop()]) == 0
        return train(*arguments)

    monkeypatch.setattr(SlideTask, "_train", meanwhile)
    assert main([*command, "0"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["folds"]) == ["0", "1"]


def test_an_existing_fold_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = task(cohort(tmp_path), TASKS["binary"][0] + 'model = "mean_pool"\n')
    command = ["slides", "train", str(path), "--out", str(tmp_path / "run"), "--fold", "0"]
    (tmp_path / "run" / "fold0").mkdir(parents=True)
    notes = tmp_path / "run" / "fold0" / "notes.txt"
    notes.write_text("mine")
    assert main(command) == 2
    assert "exists, and is of another task: take another --out" in capsys.readouterr().err
    notes.unlink()
    assert main(command) == 0
    table = tmp_path / "labels.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-2]))
    capsys.readouterr()
    assert main(command) == 2
    assert "exists, and has other slides or labels: take another --out" in capsys.readouterr().err
    table.write_text("".join(lines))
    path.write_text(path.read_text() + "# the same\n")
    assert main(command) == 0
    path.write_text(path.read_text().replace("learning_rate = 0.01", "learning_rate = 0.02"))
    capsys.readouterr()
    assert main(command) == 2
    assert "exists, and is of another task: take another --out" in capsys.readouterr().err
    assert main(["slides", "train", str(path), "--out", str(tmp_path / "x"), "--fold", "3"]) == 2
    assert "--fold must be in [0, 2]" in capsys.readouterr().err


def config(folder: Path, **fields: Any) -> SlideTaskConfig:
    shared = {"table": str(folder / "labels.csv"), "features": ["features"], "task": "binary"}
    return SlideTaskConfig(**{**shared, "labels": ["mutated"], **fields})


def test_patients_are_whole_and_classes_even_in_every_part(tmp_path: Path) -> None:
    cohort(tmp_path, 60)
    slides, missing = read_labels(
        config(tmp_path, patient_column="patient"), [f"s{i}" for i in range(59)]
    )
    assert missing == ["s59"]
    parts = slides.split(5, seed=3)
    assert sorted(i for part in parts for i in part) == list(range(59))
    owners = [{slides.patients[i] for i in part} for part in parts]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 30
    for part in parts:
        assert 4 / 12 <= sum(slides.targets[i].item() for i in part) / len(part) <= 8 / 12
    assert slides.split(5, seed=3) == parts != slides.split(5, seed=4)
    with pytest.raises(InputError, match=r"folds must not be more than the patients, 30. Got 31"):
        slides.split(31, seed=0)


def test_values_that_are_missing_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("slide,mutated\na,1\nb,\n")
    with pytest.raises(InputError, match="line 3: 'mutated' must have a value"):
        read_labels(config(tmp_path), ["a", "b"])


def test_coxs_loss_is_the_partial_likelihood() -> None:
    risk = torch.tensor([[0.3], [-1.0], [0.7], [0.1]], dtype=torch.float64)
    targets = torch.tensor([[5.0, 1], [2, 1], [2, 0], [9, 1]])
    expected = 0.0
    for i in (0, 1, 3):
        at_risk = [j for j in range(4) if targets[j, 0] >= targets[i, 0]]
        expected -= math.log(risk[i].exp() / sum(risk[j].exp() for j in at_risk))
    assert loss("survival", risk, targets).item() == pytest.approx(expected)


def test_concordance_counts_pairs_whose_order_is_known() -> None:
    times, seen = np.array([1.0, 2, 3, 4]), np.array([1.0, 0, 1, 0])
    assert concordance(np.array([4.0, 3, 2, 1]), times, seen) == 1
    assert concordance(np.array([1.0, 2, 3, 4]), times, seen) == 0
    assert concordance(np.ones(4), times, seen) == 0.5
    # 1 < 2, 3, 4 and 3 < 4 are known.
    assert concordance(np.array([4.0, 5, 2, 1]), times, seen) == 0.75
    assert concordance(np.ones(2), np.ones(2), np.ones(2)) is None


def test_metrics_are_those_of_scikit_learn_and_left_out_where_undefined() -> None:
    said = scores("binary", torch.tensor([[0.0, 2], [1, 0], [0, 1]]))
    found = metrics("binary", said, np.array([1, 0, 0]))
    assert found == {
        "AUROC": 1.0, "balanced accuracy": 0.75, "accuracy": pytest.approx(2 / 3)
    }  # fmt: skip
    assert "AUROC" not in metrics("binary", said, np.array([1, 1, 1]))
    both = metrics("multilabel", said, np.array([[1, 1], [0, 1], [0, 1]]))
    assert set(both) == {"AUROC", "average precision"}
    assert metrics("regression", said, said)["R2"] == 1


def test_an_interval_is_over_patients() -> None:
    values = np.arange(40) % 2
    patients = [f"p{i // 20}" for i in range(40)]
    bounds = intervals(lambda rows: {"mean": values[rows].mean()}, patients, seed=0)
    assert bounds["mean"] == (0.5, 0.5)  # both patients have the same mean
    alone = intervals(
        lambda rows: {"mean": values[rows].mean()}, [str(i) for i in range(40)], seed=0
    )
    assert alone["mean"][0] < 0.45 < 0.55 < alone["mean"][1]


def labelled(folder: Path, rows: list[list[object]], **values: Any) -> SlideTaskConfig:
    with (folder / "few.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["slide", "patient", "time", "seen"], *rows])
    said = {"task": "regression", "labels": ["time"], "patient_column": "patient", **values}
    return SlideTaskConfig(table=str(folder / "few.csv"), features=["."], **said)


def test_a_slide_is_found_with_dots_in_its_name_with_an_ending_and_with_blanks(
    tmp_path: Path,
) -> None:
    dotted = "TCGA-A1-A0SB-01Z-00-DX1.1a2b"
    rows = [[dotted, "p1", 1, 1], [f"{dotted}c.svs", "p1 ", 2, 1], [" plain.h5 ", " p2", 3, 1]]
    known = [dotted, f"{dotted}c", "plain"]
    slides, missing = read_labels(labelled(tmp_path, [*rows]), known)
    assert (slides.names, slides.patients, missing) == (known, ["p1", "p1", "p2"], [])


def test_a_slide_that_a_table_names_twice_is_refused_since_it_could_train_and_test(
    tmp_path: Path,
) -> None:
    config = labelled(tmp_path, [["a", "p1", 1, 1], ["b", "p2", 2, 1], ["a.svs", "p3", 3, 1]])
    with pytest.raises(InputError, match=r"'slide' of .* must name each slide once.*twice: a\."):
        read_labels(config, ["a", "b"])


def test_survival_without_an_event_that_was_seen_is_refused(tmp_path: Path) -> None:
    rows: list[list[object]] = [["a", "p1", 1, 0], ["b", "p2", 2, 0]]
    config = labelled(tmp_path, rows, task="survival", labels=["time", "seen"])
    with pytest.raises(InputError, match=r"'seen' must be 1 of some slide.* Got 0 of all"):
        read_labels(config, ["a", "b"])


def test_training_refuses_two_feature_files_of_one_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cohort(tmp_path, 6)
    (folder / "more").mkdir()
    torch.save(torch.zeros(4, 6), folder / "more" / "s0.pt")
    (folder / "task.toml").write_text(
        'table = "labels.csv"\nfeatures = ["features", "more"]\ntask = "binary"\n'
        'labels = ["mutated"]\n'
    )
    assert main(["slides", "train", str(folder / "task.toml"), "--out", str(folder / "run")]) == 2
    assert "slides must have different names. Got twice: s0." in capsys.readouterr().err
    assert not (folder / "run").exists()
