"""lm-evaluation-harness on our model: its scores are sums of our own log-probabilities."""

import json
import math
from pathlib import Path

import pytest
import torch

from dilated_factory import (
    InputError,
    LongNetConfig,
    LongNetLM,
    generate,
    load_tokenizer,
    load_trained,
)
from dilated_factory.cli import main
from dilated_factory.corpora.tokens import rounded
from dilated_factory.interop.harness import evaluate_tasks, harness_model

from .tokenizer_files import byte_level, saved

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

DATA = [
    {"start": "def ", "ends": ["return", "!!", "self for"], "right": 0, "text": "def class self"},
    {"start": "import", "ends": [" ~~", " while"], "right": 1, "text": "pass " * 40},
]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{start}}}}"
target_delimiter: ""
"""
CHOICES = (
    CHOICE
    + """
output_type: multiple_choice
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
)
ROLLING = (
    CHOICE.replace("choice", "rolling").replace("{{{{start}}}}", "")
    + """
output_type: loglikelihood_rolling
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
)
WRITTEN = (
    CHOICE.replace("choice", "written")
    + """
output_type: generate_until
doc_to_target: "{{{{start}}}}"
generation_kwargs: {{until: [" "], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DATA)))
    for name, text in {"choice": CHOICES, "rolling": ROLLING, "written": WRITTEN}.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return [tmp_path / f"{name}.yaml" for name in ("choice", "rolling", "written")]


def test_scores_are_those_of_our_own_log_probabilities(
    finished_run: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_trained(finished_run).model
    scores = evaluate_tasks(model, files)
    right, bits, size = 0, 0.0, 0
    for row in DATA:
        start, ends = str(row["start"]), list(map(str, row["ends"]))  # type: ignore[call-overload]
        likelihoods = [nats(model, start, end) for end in ends]
        right += likelihoods.index(max(likelihoods)) == row["right"]
        text = str(row["text"])
        data, size = list(text.encode()), size + len(text)
        for first in range(0, len(data), model.config.context):
            part = data[first : first + model.config.context]
            before = [10] if first == 0 else data[first - 1 : first]
            bits -= nats(model, bytes(before).decode(), bytes(part).decode()) / math.log(2)
    assert scores["choice"]["acc"] == right / 2
    assert scores["rolling"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-3)
    assert scores["written"]["exact_match"] == 0
    options = ["--tasks", str(files[0]), "--json", "--device", "cpu"]
    assert main(["evaluate", str(finished_run), *options]) == 0
    said = json.loads(capsys.readouterr()[0].splitlines()[-1])
    assert said["tasks"]["choice"]["acc"] == right / 2


def test_what_is_no_task_is_one_line(files: list[Path], tmp_path: Path) -> None:
    model = LongNetLM(LongNetConfig(embed_dim=8, num_heads=1, num_layers=1, context=32))
    with pytest.raises(InputError, match=r"a task must be a file\. Got 'none\.yaml'"):
        evaluate_tasks(model, ["none.yaml"])
    (tmp_path / "broken.yaml").write_text("[")
    with pytest.raises(InputError, match="must be tasks of lm-evaluation-harness"):
        evaluate_tasks(model, [tmp_path / "broken.yaml"])
    few = LongNetLM(LongNetConfig(embed_dim=8, num_heads=1, num_layers=1, context=32, vocab_size=9))
    with pytest.raises(InputError, match="tokenizer must have ids below the model's vocab_size=9"):
        evaluate_tasks(few, files)
    with pytest.raises(InputError, match=r"limit must be at least 1\. Got 0"):
        evaluate_tasks(model, files, limit=0)


def test_it_writes_what_dilated_generate_writes_up_to_the_end_of_a_document(
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(saved(byte_level(), tmp_path / "tokenizer"))
    end, size = tokenizer.end_of_document, rounded(tokenizer.vocab_size + 1)
    assert end is not None
    config = LongNetConfig(embed_dim=32, num_heads=2, num_layers=1, context=64, vocab_size=size)
    model = LongNetLM(config).eval()
    written = harness_model(model, tokenizer)._write
    with torch.no_grad():  # ids without a token would be the likeliest
        row = model.hidden_states(torch.tensor(tokenizer.encode([b"ab"])))[0, -1]
        model.head.weight[tokenizer.vocab_size :] = 4 * row
    ours = generate(model, b"ab", max_bytes=200, tokenizer=tokenizer, temperature=0)
    text = written("ab", {"max_gen_toks": 10})
    assert text
    assert ours.decode("utf-8", "replace").startswith(text.rstrip("\ufffd"))
    with torch.no_grad():
        model.head.weight[end] = 4 * row
    assert written("ab", {"max_gen_toks": 10}) == ""


@torch.no_grad()
def nats(model: LongNetLM, start: str, end: str) -> float:
    """The log-probability of an end behind a start."""
    whole, count = list((start + end).encode()), len(end.encode())
    # The harness gives spaces at the end of a start to what follows.
    count += len(start) - len(start.rstrip(" "))
    chances = model(torch.tensor([whole[:-1]])).log_softmax(-1)[0]
    wanted = torch.tensor(whole[1:])
    return chances.gather(1, wanted[:, None])[-count:].sum().item()
