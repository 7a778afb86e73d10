"""One's own rows: to a tokenizer, to a trained run, to a table, to a model of transformers."""

import gzip
import json
from pathlib import Path

import pytest

from dilated_factory.cli import main

pytest.importorskip("tokenizers", reason="tokenizers, of the extra data, is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


def test_rows_become_a_tokenizer_a_run_and_a_folder_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    for shard in range(4):
        rows = [json.dumps({"id": i, "text": f"the row {i} of {shard}. " * 9}) for i in range(40)]
        Path(f"rows/{shard}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    field = ["--text-field", "text", "--cache", "cache"]
    assert main(["tokenize", "rows", *field, "--vocab-size", "280", "--out", "mine.json"]) == 0
    shape = ["--context", "64", "--embed-dim", "16", "--num-heads", "2", "--num-layers", "1"]
    options = ["--tokenizer", "mine.json", "--steps", "3", "--batch-size", "2", "--device", "cpu"]
    assert main(["train", "rows", *field, *shape, *options, "--out", "run"]) == 0
    evaluated = ["--contexts", "16,64", "--max-bytes", "400", "--json", "--device", "cpu"]
    assert main(["evaluate", "run", "--cache", "cache", *evaluated]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.dumps(said).count("bits_per_byte") > 0
    assert main(["export", "run", "--to", "hub"]) == 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dilated_factory.interop.transformers import register_longnet

    register_longnet()
    tokenizer = AutoTokenizer.from_pretrained("hub")
    model = AutoModelForCausalLM.from_pretrained("hub")
    prompt = tokenizer("the row", return_tensors="pt").input_ids
    longer = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(longer[0]).startswith("the row")
