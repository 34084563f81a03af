"""Imports go the way that the table of rooms in docs/architecture.md says."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIGNPOSTS = {"hbserve/__init__.py", "hbserve/pd_disagg/__init__.py"}


def rooms() -> list[list[str]]:
    """Patterns of names in `hbserve`, row by row."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("| room | holds | page |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [[name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", row)] for row in rows]


def row_of(module: str, table: list[list[str]]) -> int:
    found = [i for i, names in enumerate(table) if any(fnmatch(module, name) for name in names)]
    assert len(found) == 1, f"hbserve.{module} is in {len(found)} rows of the table of rooms in docs/architecture.md"
    return found[0]


def imported(path: Path) -> set[str]:
    """Names below `hbserve` that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            if node.module == "hbserve":
                names |= {f"hbserve.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
    return {name.split(".")[1] for name in names if name.startswith("hbserve.")}


def test_no_module_imports_from_a_room_above_its_own() -> None:
    table = rooms()
    wrong = []
    for path in sorted((ROOT / "hbserve").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name in SIGNPOSTS:
            continue
        own = row_of(path.relative_to(ROOT / "hbserve").with_suffix("").parts[0], table)
        public = {path.stem for path in (ROOT / "hbserve").iterdir() if not path.name.startswith("_")}
        wrong += [f"{name} imports hbserve.{other}" for other in imported(path) & public if row_of(other, table) > own]
    assert not wrong
