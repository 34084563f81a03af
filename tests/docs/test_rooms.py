"""The rooms of the package: each has its row in docs/architecture.md, and imports only go up that table."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from tests.support.paths import ROOT

MAX_MODULES = 20
PACKAGES = {path.parent for path in (ROOT / "hbserve").rglob("__init__.py")}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "hbserve").rglob("*.py"))
}
SIGNPOSTS = {"hbserve", "hbserve.pd_disagg"}
"""Packages whose public names point to rooms below them, lazily."""


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


def imported(name: str) -> Iterator[str]:
    """Modules of `hbserve` that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_room_imports_from_a_row_below_its_own() -> None:
    table = rooms()
    wrong = []
    for name in MODULES:
        if name in SIGNPOSTS:
            continue
        own = row_of(name.split(".")[1], table)
        others = {other for other in imported(name) if other in MODULES and "." in other}
        wrong += [f"{name} imports {other}" for other in others if row_of(other.split(".")[1], table) > own]
    assert not wrong


def reexported(name: str) -> set[str]:
    """Modules of its own that a package's `__init__` names for type checkers only: at run time they load lazily."""
    blocks = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.If)]
    imports = [node for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING" for node in ast.walk(block)]
    modules = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    is_package = MODULES[name].name == "__init__.py"
    return {module for module in modules if is_package and module.startswith(f"{name}.")}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checking and imports inside functions count, too."""
    graph = {name: {*imported(name)} & {*MODULES} - {name} - reexported(name) for name in MODULES}
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> None:
        assert name not in path, "a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                follow(other, [*path, name])
            done.add(name)

    for name in MODULES:
        follow(name, [])


def test_every_folder_is_a_row_of_its_own() -> None:
    folders = {path.name for path in PACKAGES if path.parent == ROOT / "hbserve"}
    shared = [row for row in rooms() if len(folders & set(row)) > 1]
    assert not shared


def test_no_folder_holds_more_modules_than_a_reader_can_survey() -> None:
    sizes = {str(path.relative_to(ROOT)): len([*path.glob("[!_]*.py")]) for path in PACKAGES}
    assert not {name: size for name, size in sizes.items() if size > MAX_MODULES}


def test_the_scheduler_needs_neither_torch_nor_workers_nor_transfers() -> None:
    """Nothing that its process imports leads there, however many steps away."""
    program = (
        "import sys, hbserve.scheduler.process, hbserve.pd_disagg.cpu_scheduler\n"
        "print([m for m in sys.modules if m == 'torch' or m.startswith(('hbserve.worker', 'hbserve.kv_t'))])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


SHELL = {"hbserve.scheduler.shell", "hbserve.scheduler.process"}
EFFECTS = {"asyncio", "os", "pathlib", "random", "secrets", "socket", "subprocess", "threading", "time", "torch", "zmq"}
"""Libraries that read a clock, draw numbers, wait, or reach out of the process."""
BORROWED = {
    # Users' programs share them between threads, and may leave out the clock. The core gives its own.
    "hbserve.locking": {"threading"},
    "hbserve.metrics.collector": {"threading", "time"},
    "hbserve.metrics.window_metrics": {"threading"},
    "hbserve.kv_cache.block_pool": {"torch"},  # for type checking only
}
"""Modules outside `hbserve.scheduler` that its core reaches and that import one of them; `READS_FILES` besides."""
READS_FILES = ("hbserve.config", "hbserve.model_source")
"""They may read the configuration's file and find the model. The core only checks instances that join: no file."""


def test_the_core_of_the_scheduler_reaches_nothing_with_an_effect() -> None:
    """Nor does what it imports, however many steps away; see `hbserve.scheduler.core_io`."""
    core = {name for name in MODULES if name.startswith("hbserve.scheduler.")} - SHELL
    reached: set[str] = set()
    ahead = set(core)
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead |= {other for other in imported(name) if other in MODULES} - reached
    assert not reached & SHELL
    assert not [name for name in reached if name.startswith(("hbserve.worker", "hbserve.kv_t", "hbserve.rpc"))]
    used = {name: EFFECTS & {library.split(".")[0] for library in imported(name)} for name in reached}
    used = {name: libs - {"os", "pathlib"} if name.startswith(READS_FILES) else libs for name, libs in used.items()}
    assert {name: libs for name, libs in used.items() if libs} == BORROWED


def test_the_api_server_starts_without_torch() -> None:
    """It never touches a tensor; torch would cost each API server seconds at its start, and memory."""
    program = "import sys, hbserve.server.app; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_modules_and_rooms_are_told_from_one_another() -> None:
    """The checks above would hold of a package that they cannot read."""
    assert "hbserve.errors" in set(imported("hbserve.config.sections"))
    assert {Path(path).name for path in PACKAGES} >= {"scheduler", "worker", "kv_transfer", "one_sided"}
