"""Check that every link inside a built site leads to a page, and to an anchor that is there."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of one page, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {"", "top"}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        """Note what links to something, and what can be linked to."""
        named = dict(attrs)
        self.anchors.add(named.get("id") or "")
        for key in ("href", "src"):
            self.links.append(named.get(key) or "")


def main(site: Path) -> int:
    """Print every broken link below `site`; return the exit status."""
    pages = {path: Page(path) for path in site.resolve().rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.name}: {link}: no such page")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.name}: {link}: no such anchor")
    print("\n".join(broken) or f"{len(pages)} pages, no broken link")
    return 1 if broken or not pages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
