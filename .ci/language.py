"""Fail if a phrase that readers stumbled over is in the documentation, a docstring, a comment or a message.

codespell looks for misspelled words. This is about words that are spelled right and still wrong here.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SAID_BETTER = {
    r"shall": "must, has to, is to",
    r"gets? to know": "learns",
    r"of (?:its|their|his) own accord": "by itself",
    r"ends? nothing": "other tasks are not affected",
    r"(?:accepted|waiting|running) (?:tasks|jobs|coroutines) end": "finish",
    r"ends? what (?:it|they) runs?|lets? (?:it|them) end|go(?:es)? on to (?:its|their) end": "finishes",
    r"what comes (?:then|after that|later)": "further tasks",
    r"runs? nothing of": "never runs",
    r"last word": "last seen",
    r"hold still": "stop refreshing",
    r"times more": "again (3 more)",
    r"looks? whether": "checks whether",
    r"worked off": "finished",
    r"runs? dry": "is exhausted",
    r"strikes? off": "marks as ended",
    r"in lumps": "at the same moments",
    r"leaves? its bound": "is not limited by CONN_MAX",
    r"belongs? into": "belongs in",
    r"stays? dead": "stays down",
    r"comes? and goes?|come and go": "are spawned or run",
    r"holds? up": "delays, blocks",
    r"all the same": "still, anyway",
    r"travels? along": "is sent with",
    r"whatever becomes of": "whether or not, however it ends",
    r"told apart": "counted separately",
    r"has told of": "has reported",
    r"all of one moment": "all at the same moment",
    r"as ever": "as usual",
    r"for nobody|keeps? nobody": "does not delay others",
    r"for ?evermore|henceforth|hitherto|therein|thereof|whilst|amongst": "a word of today",
}
FOLDERS = (".github", "benchmarks", "bgtasks", "demo_project", "docs", "pytest_bgtasks")
SUFFIXES = {".md", ".py", ".html", ".js", ".txt", ".yml"}
FILES = [
    *sorted(ROOT.glob("*.md")),
    *(
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and ".data" not in path.parts
    ),
]


def complaints(path: Path, text: str) -> Iterator[str]:
    """Yield each phrase of a text, which may go on in the next line, with what to write instead."""
    for pattern, better in SAID_BETTER.items():
        spaced = pattern.replace(" ", r"\s+(?:(?:#|//)\s+)?")
        for found in re.finditer(rf"\b(?:{spaced})\b", text, re.IGNORECASE):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path}:{line}: {found[0]!r}: write {better!r}"


def main() -> int:
    """Print what is found, and return the exit status."""
    found = [line for path in FILES for line in complaints(path.relative_to(ROOT), path.read_text())]
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
