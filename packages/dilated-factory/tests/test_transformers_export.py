"""`dilated export`: what transformers loads is the model that was trained."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dilated_factory import (
    InputError,
    LongNetConfig,
    LongNetLM,
    export_to_transformers,
    generate,
    load_tokenizer,
    load_trained,
)
from dilated_factory.cli import main
from dilated_factory.corpora.tokens import rounded

from .tokenizer_files import byte_level, saved

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from dilated_factory.interop.transformers import LongNetForCausalLM  # noqa: E402 - needs it

LOAD = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, call, out = sys.argv[1:]
options = {"trust_remote_code": True} if call == "remote" else {}
if call == "register":
    from dilated_factory.interop.transformers import register_longnet
    register_longnet()
assert AutoConfig.from_pretrained(folder, **options).vocab_size == 256
model = AutoModelForCausalLM.from_pretrained(folder, **options)
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
prompt = tokenizer("def \\u0120", return_tensors="pt")
added = model.generate(**prompt, max_new_tokens=60)
torch.save((model(**prompt).logits.detach(), added), out)
"""
TEXTS = [
    "",
    "def f(x):\r\n\treturn  x ,a 's  n't .\0\x01",
    "".join(map(chr, range(0x300))),
    "中\U0001f600",
]


@pytest.mark.parametrize("call", ["register", "remote"])
def test_a_fresh_process_loads_it_and_writes_what_dilated_generate_writes(
    call: str, finished_run: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder, out = tmp_path / "exported", tmp_path / "out.pt"
    options = ["--remote-code"] if call == "remote" else []
    assert main(["export", str(finished_run), "--to", str(folder), *options]) == 0
    assert capsysbinary.readouterr().err == b""
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names <= {path.name for path in folder.iterdir()}
    assert os.listdir(tmp_path) == ["exported"]
    mode = (finished_run / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {mode}

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", LOAD, str(folder), call, str(out)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    logits, added = torch.load(out)
    prompt = torch.tensor([list("def \u0120".encode())])
    expected = load_trained(finished_run).model(prompt)
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()

    generate = ["--prompt", "def \u0120", "--max-bytes", "60", "--temperature", "0"]
    assert main(["generate", str(finished_run), *generate]) == 0
    said = bytes(added[0].tolist())
    assert said.decode("utf-8", "replace") + "\n" == capsysbinary.readouterr()[0].decode()


def test_bytes_are_tokens_and_any_text_comes_back(tmp_path: Path) -> None:
    export_to_transformers(LongNetLM(tiny()), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_of_a_run_comes_along(finished_run: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"tokenizer": "tokenizer.json"}))
    (run / "config.json.sha256").unlink()
    for largest, code in ((256, 2), (255, 0)):
        vocabulary = {"def": 0, "import": largest, "</s>": 7}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "def"))
        words.add_special_tokens(["</s>"])
        words.save(str(run / "tokenizer.json"))
        assert main(["export", str(run), "--to", str(tmp_path / "out")]) == code
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("import")["input_ids"] == [255]
    assert loaded.eos_token == "</s>"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 7


def test_ids_that_stand_for_nothing_are_not_drawn_as_dilated_generate_does_not(
    tmp_path: Path,
) -> None:
    tokenizer = saved(byte_level(), tmp_path / "tokenizer")
    known = load_tokenizer(tokenizer)
    size = rounded(known.vocab_size + 1)
    config = LongNetConfig(embed_dim=32, num_heads=2, num_layers=1, context=64, vocab_size=size)
    model = LongNetLM(config).eval()
    with torch.no_grad():
        row = 4 * model.hidden_states(torch.tensor(known.encode([b"ab"])))[0, -1]
        model.head.weight[known.vocab_size :] = row  # the likeliest, had they a token
    export_to_transformers(model, tmp_path / "out", tokenizer=tokenizer)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompt = torch.tensor(known.encode([b"ab"]))
    added = loaded.generate(prompt, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
    assert max(added) < known.vocab_size
    ours = generate(model, b"ab", max_bytes=64, tokenizer=known, temperature=0)
    assert ours.startswith(known.decode(added))


def test_a_folder_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dilated_factory.interop import transformers_export as module

    model = LongNetLM(tiny(vocab_size=257))
    with pytest.raises(InputError, match="tokenizer must be given with a vocabulary of 257"):
        export_to_transformers(model, tmp_path / "out")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match=r"broken\.json. is no tokenizer"):
        export_to_transformers(model, tmp_path / "out", tokenizer=tmp_path / "broken.json")
    (tmp_path / "broken.json").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for folder in ("full", "full/file"):
        with pytest.raises(InputError, match="folder must not exist yet, or be empty"):
            export_to_transformers(LongNetLM(tiny()), tmp_path / folder)
    with pytest.raises(InputError, match="folder must be in one that exists"):
        export_to_transformers(LongNetLM(tiny()), tmp_path / "none" / "out")
    shutil.rmtree(tmp_path / "full")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(module, "_sync", lambda path: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        export_to_transformers(LongNetLM(tiny()), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert not os.listdir(tmp_path / "out")
    monkeypatch.undo()
    export_to_transformers(LongNetLM(tiny()).bfloat16(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_with_another_attention_is_refused(tmp_path: Path) -> None:
    from dilated_core import DilatedAttention, DilatedPattern

    model = LongNetLM(tiny(), attention=lambda: DilatedAttention(DilatedPattern([4], [1])))
    with pytest.raises(InputError, match="attention of its configuration"):
        export_to_transformers(model, tmp_path / "out")


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = [x for x in re.findall("```python\n(.*?)```", text, re.DOTALL) if '"exported"' in x]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr()[0].startswith("def main(")


def tiny(vocab_size: int = 256) -> LongNetConfig:
    return LongNetConfig(
        embed_dim=16, num_heads=2, num_layers=1, context=48, segment_lengths=(8,),
        dilation_rates=(1,), vocab_size=vocab_size,
    )  # fmt: skip
