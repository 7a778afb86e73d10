"""A page to explore a dilated pattern: one HTML file that loads nothing else."""

import html
import json
from importlib.resources import files

from dilated_core import DilatedPattern


def pattern_page(
    pattern: DilatedPattern,
    length: int,
    heads: int,
    *,
    is_causal: bool,
    view: tuple[int, int] | None = None,
) -> str:
    """The page as text; the pattern is computed in the page, for whatever its controls say.

    Args:
        pattern: which keys a query sees.
        length: positions at first.
        heads: heads H.
        is_causal: whether keys after each query are hidden at first.
        view: the first position that is shown at first, and the one after the last; all when None.
    """
    template = (
        files("dilated_factory.tools").joinpath("pattern_page.html").read_text(encoding="utf-8")
    )
    data = pattern.to_dict() | {"length": length, "heads": heads, "is_causal": is_causal}
    data["view"] = view or (0, length)
    # "</" would end the script element.
    script = json.dumps(data).replace("</", "<\\/")
    return template.replace("{{title}}", html.escape(repr(pattern))).replace("{{data}}", script)
