"""Commands, options, sessions and paths that a document or a help text names exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "packages/*/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Pages and pictures that the session `docs` makes.
MADE = re.compile(r"docs/(figures\.md|reference/\w+\.md|how/pattern\.html|pictures/\w+\.png)$")
# Options of programs of others that our documents speak of.
OF_TORCHRUN = {"--max-restarts", "--nproc-per-node", "--signals-to-handle", "--standalone"}
OF_OTHERS = OF_TORCHRUN | {"--randomly-seed"}
OF_NOX = {"--list", "-s"}


def code(text: str) -> Iterator[str]:
    """Yield the lines of the blocks of a document that are no Python, and its inline code."""
    for language, block in FENCE.findall(text):
        if language != "python":
            yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(FENCE.sub("", text))


def words(line: str) -> list[str]:
    """Split a line as a shell does; what is no command at all has no words."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


# What exists


def sessions() -> set[str]:
    """Return the names of nox's sessions, without nox, which tests do not need."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {
        node.name
        for node in found
        if any(ast.unparse(mark).partition("(")[0] == "nox.session" for mark in node.decorator_list)
    }


def options_of_benchmarks() -> set[str]:
    """Return the options that scripts of benchmarks/ define."""
    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("benchmarks/*.py"))
    return {option for text in texts for option in re.findall(r'"(--[a-z][\w-]*)"', text)}


def commands() -> dict[str, Any]:
    """Return the commands of `dilated` by their words: "", "train", "config schema"."""
    app = pytest.importorskip("dilated_factory.cli.app", reason="dilated-factory is not installed")
    import typer

    found: dict[str, Any] = {"": typer.main.get_command(app.app)}
    for name in app.COMMANDS:
        found[name] = command = app.load_command(name)
        for inner, what in getattr(command, "commands", {}).items():
            found[f"{name} {inner}"] = what
    return found


def options(command: Any) -> set[str]:
    """Return the options of a command."""
    named = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    return {name for name in named if name.startswith("-")} | {"--help"}


def help_texts() -> dict[str, str]:
    """Return all that `--help` of each command says."""
    return {
        name: "\n".join(
            [
                command.help or "",
                *(getattr(p, "help", "") or "" for p in command.params),
                command.examples,
            ]
        )
        for name, command in commands().items()
    }


# What is wrong with a line


def problems_of_dilated(line: str, known: dict[str, Any]) -> list[str]:
    """Tell which command or options of a line that calls `dilated` do not exist."""
    call = words(line.replace("-m dilated_factory", "dilated"))
    if "dilated" not in call:
        return []
    if call[0] not in ("dilated", "torchrun", "python"):
        return []
    arguments = call[call.index("dilated") + 1 :]
    name = ""
    while arguments and f"{name} {arguments[0]}".strip() in known:
        name = f"{name} {arguments.pop(0)}".strip()
    first = arguments[0] if arguments else "-"
    if name == "plan" and first.isdigit():  # the positions of an attention
        name = "plan attention"
    if name == "" and first.isupper():  # `dilated COMMAND`
        return []
    if hasattr(known[name], "commands") and not first.startswith("-"):
        return [f"{line}: there is no command {first!r}"]
    used = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
    return [f"{line}: {name or 'dilated'} has no {x}" for x in used - options(known[name])]


def problems_of_noxw(line: str) -> list[str]:
    """Tell which sessions or options of a line that calls noxw do not exist."""
    call = words(line)
    if not call or call[0] not in ("./noxw", "noxw"):
        return []
    ours = call[1 : call.index("--")] if "--" in call else call[1:]
    found = [f"{line}: no option {x}" for x in ours if x.startswith("-") and x not in OF_NOX]
    for name in (x for x in ours if not x.startswith("-")):
        found += problems_of_session(name)
    return found


def problems_of_session(told: str) -> list[str]:
    """Tell what of a session's name, with its parameter, does not exist."""
    name, _, parameter = told.rstrip(")").partition("(")
    folders = [f"dilated-{part.removeprefix('dilated-')}" for part in parameter.split("+") if part]
    missing = [folder for folder in folders if not (ROOT / "packages" / folder).is_dir()]
    if name not in sessions():
        missing.append(name)
    return [f"{told}: there is no {x}" for x in missing]


def problems_of_paths(line: str, home: Path) -> list[str]:
    """Tell which paths of a line exist neither in the tree nor in the document's folder."""
    # What a document of the whole tree says of `src/` is said of every package.
    folders = [ROOT, home, *(ROOT.glob("packages/*") if "<" in line else ())]
    heads = {entry.name for folder in {ROOT, home} for entry in folder.iterdir() if entry.is_dir()}
    found = []
    for path in re.findall(r"(?<![\w./@:~+-])[\w.-]+/(?:<[\w ]+>|[\w./*-])*", line):
        if path.split("/")[0] in heads or path.endswith((".py", ".md")):
            glob = re.sub(r"<[\w ]+>|\bNAME\b", "*", path).rstrip("./")
            if not any(any(folder.glob(glob)) for folder in folders):
                found.append(f"{line}: there is no {path}")
    if home == ROOT and re.fullmatch(r"\w+\.(py|toml)", line) and not (ROOT / line).exists():
        found.append(f"there is no {line}")
    return found


# The tests


def by_document() -> list[Any]:
    """Name the documents by their place."""
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in DOCUMENTS]


@pytest.mark.parametrize("document", by_document())
def test_a_document_names_commands_and_options_that_exist(document: Path) -> None:
    known = commands()
    text = document.read_text(encoding="utf-8")
    assert [x for line in code(text) for x in problems_of_dilated(line, known)] == []
    every = set().union(*map(options, known.values()))
    every |= options_of_benchmarks() | OF_OTHERS | OF_NOX
    inline = " ".join(INLINE.findall(FENCE.sub("", text)))
    assert set(OPTION.findall(inline)) - every == set()


@pytest.mark.parametrize("document", by_document())
def test_a_document_names_sessions_that_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"\bsession `([^`]+)`", text)
    found = [x for line in code(text) for x in problems_of_noxw(line)]
    assert found + [x for name in named for x in problems_of_session(name)] == []


@pytest.mark.parametrize("document", by_document())
def test_a_document_names_paths_that_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    found = [x for line in code(text) for x in problems_of_paths(line, document.parent)]
    places = ((document.parent / link).resolve() for link in LINK.findall(text))
    dead = [x for x in places if not (x.exists() or MADE.search(x.as_posix()))]
    assert found + dead == []


def test_help_names_commands_options_and_paths_that_exist() -> None:
    known = commands()
    every = set().union(*map(options, known.values()))
    found: list[str] = []
    for name, text in help_texts().items():
        for line in text.replace("\\\n", " ").splitlines():
            found += problems_of_dilated(line, known)
            found += problems_of_paths(line, ROOT)
        found += [f"{name}: no option {x}" for x in set(OPTION.findall(text)) - every - OF_OTHERS]
    assert found == []


def test_the_help_of_every_command_has_an_example() -> None:
    assert [name for name, text in help_texts().items() if name and "dilated " not in text] == []


@pytest.mark.parametrize(
    "line",
    [
        "dilated trian",
        "dilated train --step 3",
        "dilated config shema ring",
        "torchrun --nproc-per-node 4 -m dilated_factory train --sequence 4",
        "python -m dilated_factory evaluat",
    ],
)
def test_a_wrong_line_of_dilated_is_found(line: str) -> None:
    assert problems_of_dilated(line, commands())


def test_a_wrong_session_or_path_is_found() -> None:
    assert problems_of_noxw("./noxw -s demos")
    assert problems_of_noxw('./noxw -s "tests(dilated-cor)" -- -k causal')
    assert problems_of_noxw("./noxw --lists")
    assert not problems_of_noxw('./noxw -s "tests(dilated-core)" -- --anything')
    assert problems_of_paths("python benchmarks/gpus.py --png x.png", ROOT)
    assert problems_of_paths("pip install packages/dilated-rings", ROOT)
    assert problems_of_paths("tests/test_bites.py", ROOT / "packages" / "dilated-ring")
    assert not problems_of_paths("tests/test_bytes.py", ROOT / "packages" / "dilated-ring")
