"""`tools/structure.py` finds what ties sources together, and passes those that are in order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "structure.py"


def run(root: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the tool on packages that hold these files, by their paths after `src/`."""
    for name, text in files.items():
        path = root / "packages" / name.partition("/")[0].replace("_", "-") / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    command = [sys.executable, str(TOOL), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_sources_in_order_pass(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        {
            "first/__init__.py": "from first._top import Top\n",
            "first/_top.py": "import second\nfrom first import _ground\n\n\nclass Top:\n    pass\n",
            "first/_ground.py": "import os\n\n\nclass Ground:\n    class Inner:\n        pass\n",
            "second/__init__.py": "from .sub.leaf import Leaf\n",
            "second/sub/__init__.py": "",
            "second/sub/leaf.py": "class Leaf:\n    pass\n",
        },
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "first: 3 files, 13 lines",
        "second: 3 files, 3 lines",
        "16 lines, 0 circles, 0 homonyms",
    ]


@pytest.mark.parametrize(
    ("back", "line"),
    [
        pytest.param("from first.a import f\n", 1, id="top"),
        pytest.param("def g():\n    from first import a\n", 2, id="lazy"),
        pytest.param("def g():\n    import first.a\n", 2, id="lazy import"),
        pytest.param("def g():\n    from .a import f\n", 2, id="lazy relative"),
        pytest.param(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from first.a import f\n",
            3,
            id="type-only",
        ),
        pytest.param("class B:\n    async def g(self):\n        from .a import f\n", 3, id="deep"),
    ],
)
def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path, back: str, line: int) -> None:
    files = {"first/__init__.py": "", "first/a.py": "\nfrom first import b\n", "first/b.py": back}
    done = run(tmp_path, files)
    assert done.returncode == 1
    assert "  circle of 2: first.a, first.b" in done.stdout.splitlines()
    assert "/first/a.py:2 imports first.b" in done.stdout
    assert f"/first/b.py:{line} imports first.a" in done.stdout
    assert "1 circles, 0 homonyms" in done.stdout


def test_a_circle_is_shown_by_its_shortest_way_round(tmp_path: Path) -> None:
    files = {
        "first/__init__.py": "",
        "first/a.py": "import first.b\n",
        "first/b.py": "import first.c\n",
        "first/c.py": "import first.a\nimport first.d\n",
        "first/d.py": "import first.c\n",
        "first/e.py": "import first.a\n",
    }
    done = run(tmp_path, files)
    circle = "  circle of 4: first.a, first.b, first.c, first.d"
    assert done.stdout.splitlines()[1:] == [
        circle,
        "    packages/first/src/first/c.py:2 imports first.d",
        "    packages/first/src/first/d.py:1 imports first.c",
        "6 lines, 1 circles, 0 homonyms",
    ]


def test_a_package_is_in_a_circle_with_the_modules_that_import_its_names(tmp_path: Path) -> None:
    files = {"first/__init__.py": "from .a import f\nx = 1\n", "first/a.py": "from . import x\n"}
    done = run(tmp_path, files)
    assert done.returncode == 1
    assert "circle of 2: first, first.a" in done.stdout


def test_packages_that_import_each_other_are_a_circle(tmp_path: Path) -> None:
    files = {"first/__init__.py": "import second\n", "second/__init__.py": "import first\n"}
    assert "circle of 2: first, second" in run(tmp_path, files).stdout


def test_a_class_of_the_same_name_in_two_modules_is_a_homonym(tmp_path: Path) -> None:
    files = {
        "first/__init__.py": "class Twin:\n    pass\n",
        "second/__init__.py": "",
        "second/a.py": "def f():\n    class Twin:\n        pass\n",
    }
    done = run(tmp_path, files)
    assert done.returncode == 1
    assert done.stdout.splitlines()[2:] == [
        "class Twin is defined 2 times: packages/first/src/first/__init__.py:1, "
        "packages/second/src/second/a.py:2",
        "5 lines, 0 circles, 1 homonyms",
    ]


def test_long_functions_and_files_are_named_and_pass(tmp_path: Path) -> None:
    docs = '    """Say what.\n\n    And more.\n    """\n    # Why.\n\n'
    code = '    def inner():\n        "Docs."\n' + "        x = (\n            1,\n        )\n" * 19
    files = {
        "first/__init__.py": f"def long():\n{docs}{code}    return inner\n",
        "first/a.py": f"def longer():\n{docs}{code}    y = 1\n    return y\n",
        "first/b.py": "\n" * 500,
        "first/c.py": "\n" * 501,
    }
    done = run(tmp_path, files)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:-1] == [
        "  function of 61 lines of code: packages/first/src/first/a.py:1 longer",
        "  file of 501 lines: packages/first/src/first/c.py",
    ]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "ROOT must hold Python files"),
        ({"first/__init__.py": "def\n"}, "__init__.py must be Python in UTF-8. Got: "),
        ({"first/__init__.py": "\0"}, "__init__.py must be Python in UTF-8. Got: "),
    ],
)
def test_what_cannot_be_read_is_an_error_of_one_line(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    done = run(tmp_path, files)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says in done.stderr


def test_a_private_name_of_torch_that_core_uses_is_wrapped_by_core_for_all_who_import_it() -> None:
    """Pool stands alone, so it is free to use what core uses."""

    def private_names(package: str) -> set[str]:
        found = set()
        for path in (ROOT / "packages" / package / "src").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {x for x in names if re.match(r"torch(\.\w+)*\._(?!C$)", x)}
        return found

    core = private_names("dilated-core")
    assert "torch._compile._disable_dynamo" in core
    for package in ("dilated-ring", "dilated-sparse", "dilated-factory"):
        assert not core & private_names(package), package
