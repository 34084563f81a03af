"""Links of the pages that lead out of docs/: they point to files of the repository, not to pages of the site.

`mkdocs` would call them broken. They stay links in the repository, and plain code on the site, after this hook has
seen that the file is there.
"""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./|results\b)[^)#]*)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page before it is rendered."""

    def plain(match: re.Match[str]) -> str:
        if not (DOCS / match[2]).exists():
            raise FileNotFoundError(f"docs/{page.file.src_path}: no file {match[2]}")
        return match[1] if "`" in match[1] else f"{match[1]} (`{match[2].removeprefix('../')}`)"

    return OUTSIDE.sub(plain, markdown)
