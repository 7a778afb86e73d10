"""The commands that install packages of this project, as READMEs and errors give them.

The project is on no package index, so a command names the places, and each sibling by itself: pip
would look for the siblings that are not named on its index.
"""

# The packages, each after those that it requires, and what it requires of the others.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "dilated-core": (),
    "dilated-pool": (),
    "dilated-ring": ("dilated-core",),
    "dilated-sparse": ("dilated-core",),
    "dilated-factory": ("dilated-core",),
}


def install_command(*packages: str, url: str | None = None) -> str:
    """The command of pip that installs packages, together with the siblings that they require.

    Args:
        packages: names of packages, with extras in brackets where those are wanted. Packages that
            are not of this project are named as they are.
        url: what a repository of this project is cloned from; without it the command is for the
            folder of a clone.
    """
    extras = {
        name: bracket + extra for name, bracket, extra in (p.partition("[") for p in packages)
    }
    wanted = {sibling for name in extras for sibling in _REQUIRED.get(name, ())} | extras.keys()
    ours = [_place(name, extras.get(name, ""), url) for name in _REQUIRED if name in wanted]
    others = [name + extra for name, extra in extras.items() if name not in _REQUIRED]
    return " ".join(["pip install", *map(_quoted, ours + others)])


def how_to_install(*packages: str) -> str:
    """The command that installs packages, after a word on where it works, as errors say it."""
    where = "in a clone of the project, " if any(name in _REQUIRED for name in packages) else ""
    return where + install_command(*packages)


def _place(package: str, extra: str, url: str | None) -> str:
    if url is None:
        return f"packages/{package}{extra}"
    return f"{package}{extra} @ git+{url}#subdirectory=packages/{package}"


def _quoted(word: str) -> str:
    """A word as every shell takes it: cmd.exe knows double quotes only."""
    return f'"{word}"' if set(word) & set(" []#<>") else word
