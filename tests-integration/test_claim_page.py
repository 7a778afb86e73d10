"""The page about the claim says what was measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def numbers(text: str) -> list[float]:
    """All numbers of a cell; a minus is a sign there."""
    found = re.findall(r"-?[\d.]+", text.replace("\N{MINUS SIGN}", "-").replace(",", ""))
    return [float(x) for x in found]


def test_the_table_of_the_page_is_that_of_the_measured_rows() -> None:
    table = json.loads((ROOT / "benchmarks/claim-h200.json").read_text("utf-8"))["table"]
    measured = {(x["candidate"], x["context"]): x for x in table if x["budget"] == "flops"}
    names = {"sliding window": "window", "blocks (BigBird)": "block sparse"}
    page = (ROOT / "docs/claim.md").read_text("utf-8")
    lines = page[page.index("| attention | context | bytes trained on") :].split("\n\n")[0]
    seen = set()
    for line in lines.splitlines()[2:]:
        name, context, size, keys, bits, _, recall = (x.strip() for x in line.split("|")[1:-1])
        for known, candidate in names.items():
            name = name.replace(known, candidate)
        row = measured[name.removesuffix(", one seed"), int(numbers(context)[0])]
        seen.add((row["candidate"], row["context"]))
        assert (row["seeds"] == 1) == name.endswith("one seed")
        assert numbers(size)[0] == round(row["tokens"] / 1e6, 1)
        assert numbers(keys)[0] == round(row["keys"])
        said = [row["bits"]] + [row["error_of_seeds"]] * (row["seeds"] > 1)
        assert numbers(bits) == [round(x, 3) for x in said], line
        shares = [100 * x for x in row["recall"].values()]
        assert all(abs(a - b) <= 0.5 for a, b in zip(numbers(recall), shares, strict=False)), line
    assert seen == set(measured)
