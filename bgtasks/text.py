"""Text that is safe to write anywhere: no control characters, no halves of characters, a bounded length."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

NAMES_MAX = 200  # different names that are shown
NAME_LENGTH = 100  # characters of a name that are shown among others

# What moves the cursor, ends a line or turns the direction of writing, and halves of characters, which no
# handler could write. Not the tab, nor the line feed that ends a line of a traceback. `re` keeps it compiled.
_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def indented(text: str) -> str:
    """Return the lines of `text`, none of which begins at the margin, with control characters written out."""
    return "\n".join(f"  {escaped(line)}" for line in text.rstrip("\n").split("\n"))


def escaped(text: str) -> str:
    """Return `text` as one line, with control characters written as Python writes them in a literal."""
    return re.sub(_CONTROL, lambda match: ascii(match[0])[1:-1], text.replace("\n", "\\n"))


def encodable(text: str) -> str:
    """Return `text` with halves of characters, which UTF-8 cannot encode, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def counts_of(names: Iterable[str]) -> str:
    """Return how many there are of which of `names`, the most frequent first, as text of bounded length."""
    counts = Counter(name[:NAME_LENGTH] for name in names)
    told = counts.most_common(NAMES_MAX)
    untold = counts.total() - sum(count for _, count in told)
    shown = [f"{count} {name!r}" for name, count in told]
    return ", ".join([*shown, f"{untold} of other names"] if untold else shown)
