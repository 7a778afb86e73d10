"""torch.compile block by block: one graph for all, the same losses, and a line where it fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dilated_factory import InputError, TrainConfig
from dilated_factory.training import compiling
from dilated_factory.training.compiling import decide_compile
from dilated_factory.training.parallel import Parallel

from .conftest import losses, resume, start
from .test_cli import Captured, complaint

pytestmark = pytest.mark.xdist_group("compile")
CPU, CUDA = Parallel(torch.device("cpu")), Parallel(torch.device("cuda"))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made as for the compiler and run as they are: to compile them takes minutes."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: compile(call, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "fields", [{}, *({"recompute": x} for x in ("all", "feed_forward", "pointwise"))], ids=str
)
def test_compiled_steps_are_eager_ones_from_one_graph(
    tiny_train: TrainConfig, tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = tiny_train.model.model_copy(update={"num_layers": 4})
    config = tiny_train.model_copy(
        update={"model": model, "steps": 6, "micro_batch_size": 1, "validate_every": 3, **fields}
    )
    eager = start(config, tmp_path / "eager")
    eager.train()
    expected = losses(eager.run.read_metrics())
    compiled = start(config, tmp_path / "compiled", compiled=True)
    seen = []
    compiled.train(
        on_step=lambda metrics: seen.append(counters["stats"]["unique_graphs"]),
        should_stop=lambda: compiled.step == 4,
    )
    again = resume(tmp_path / "compiled", compiled=True)
    assert again.train()
    found = losses(again.run.read_metrics())
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)
    assert seen[0] == seen[1] > 0  # no recompilation over steps, for 4 blocks
    assert seen[0] <= 3
    assert seen[3] <= 2 * seen[0]  # validation has a graph of its own


def test_it_is_on_where_it_helps_and_a_fault_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    assert not decide_compile("off", CUDA, told.append)
    assert not decide_compile("auto", CPU, told.append)
    monkeypatch.setattr(compiling, "compiler_fault", lambda device: None)
    assert decide_compile("auto", CUDA, told.append)
    assert decide_compile("on", CPU, told.append)
    assert told == []
    monkeypatch.setattr(compiling, "compiler_fault", lambda device: "InvalidCxxCompiler: none")
    assert not decide_compile("auto", CUDA, told.append)
    assert told == ["not compiled, and slower for it: InvalidCxxCompiler: none"]
    with pytest.raises(InputError, match="--compile on: nothing can be compiled here: InvalidCxx"):
        decide_compile("on", CPU, told.append)


def test_without_a_compiler_it_is_one_line(
    capsys: Captured, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    out = tmp_path / "run"
    said = complaint(
        capsys, "train", corpus_folder, "--out", out, "--device", "cpu", "--compile", "on"
    )
    assert "--compile on: nothing can be compiled here: " in said
    assert not out.exists()
