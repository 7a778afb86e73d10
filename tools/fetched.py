"""What a browser fetches by itself for a page, unlike a link that a person follows."""

import re

_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]+"
    r"|url\(\s*[\"']?(?:https?:)?//|@import\s+[\"'](?:https?:)?//",
    re.IGNORECASE,
)
_NAMED_ONLY = re.compile(r"<link\b[^>]*rel=[\"']?(?:canonical|next|prev)")


def outside_requests(text: str) -> list[str]:
    """What of a page or a style sheet comes from another host."""
    return [hit[0] for hit in _FETCHED.finditer(text) if not _NAMED_ONLY.match(hit[0])]
