"""What the pages say can be checked against the code is checked against the code."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml

from hbserve import __version__
from hbserve.config import Config, InstanceConfig, from_dict, load
from hbserve.config.fields import Section
from hbserve.config.flat import KEYS
from hbserve.messages.supervisor import EventKind
from hbserve.sampling_params import SamplingParams
from hbserve.server.bodies.border import NEUTRAL
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.protocol import CompletionRequest
from tests.support.paths import ROOT

EVENT_KINDS = get_args(EventKind)
MAKERS_OF_EVENTS = ("note", "on_event", "_on_event", "report_event", "ReportEvent", "on_error")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Where links into a page may point."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def shown(default: Any) -> str:
    """A default as the table of keys has it."""
    return yaml.safe_dump(msgspec.to_builtins(default), default_flow_style=True).split("\n")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:hbserve|scripts|configs|tests|examples)/[\w/.]+)[` ]", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        tests = ast.parse((ROOT / path).read_text()).body
        assert name in [test.name for test in tests if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef)], name


def definitions() -> dict[str, set[str]]:
    """Names of all classes, functions, methods and constants of the package: by file, methods as ``Class.method``."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "hbserve").rglob("*.py"):
        names = found[str(path.relative_to(ROOT))] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, FUNCTIONS)}
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                names.add(node.name)
            for target in node.targets if isinstance(node, ast.Assign) else ():
                names |= {target.id} if isinstance(target, ast.Name) else set()
    return found


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_the_tour_names_what_is_there_and_where() -> None:
    """In each step, what is named after a file is defined there; any other name is defined somewhere."""
    text = (ROOT / "docs" / "tour.md").read_text()
    assert len(text.splitlines()) <= 200
    defined = definitions()
    everywhere = set().union(*defined.values())
    num_places = num_names = 0
    for name, path in re.findall(r"`([A-Za-z_][\w.]*)`\s+in\s+`(hbserve/[\w/]+\.py)`", text):
        candidates = defined[path] | {item.split(".")[-1] for item in defined[path]}
        assert name in candidates, f"{name} is not in {path}"
        num_places += 1
    for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        assert name in everywhere, name
        num_names += 1
    assert num_places > 30
    assert num_names > 60


def test_rates_in_the_readme_are_those_of_the_benchmarks() -> None:
    rates = r"\| ([\d,]+)(?: in)?[^|]* \|(?: [\d.]+ s \|)? ([\d.]+) % \|"
    measured = dict(re.findall(rates, (ROOT / "docs" / "benchmarks.md").read_text()))
    told = re.findall(rates, (ROOT / "README.md").read_text())
    assert len(told) == 5
    assert [f"{float(measured[rate]):.0f}" for rate, _ in told] == [share for _, share in told]


def test_offline_rates_are_the_medians_of_their_raw_runs() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in (ROOT / "docs" / "results").glob("offline_*.json"):
        runs = json.loads(path.read_text())["runs"]
        rate = statistics.median(run["num_output_tokens"] / run["seconds"] for run in runs)
        assert f"| {rate:,.0f}" in page, path.name


def test_every_key_is_documented_with_its_default_and_its_name_in_python() -> None:
    section, documented = "", {}
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        row = re.match(r"\| `(\w+)` \| ([^|]*) \|(?: (?:`(\w+)`)? ?\|)? ", line)
        if row:
            documented[section, row[1]] = row[2], row[3]

    in_python = {key: name for name, key in KEYS.items()}
    expected: dict[tuple[str, str], tuple[str, str | None]] = {
        ("", "mode"): (Config(model=None).mode, "mode"),  # type: ignore[arg-type]
        ("", "launcher"): (Config(model=None).launcher, "launcher"),  # type: ignore[arg-type]
        ("", "gpu_instances"): ("by mode", "gpu_instances"),
    }
    sections: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Config)}
    sections["gpu_instances"] = InstanceConfig
    for name, kind in sections.items():
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            continue
        for field in msgspec.structs.fields(kind):
            default = "required" if field.required else shown(field.default)
            expected[name, field.name] = (
                {"null": "none"}.get(default, default),
                in_python.get(f"{name}.{field.name}"),
            )
    assert documented == expected


def test_every_event_is_documented_and_happens() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    table = page.partition("## Events\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(EVENT_KINDS), "the same kinds, in the same order"
    named: set[str] = set()  # kinds in calls that make events
    constants: set[str] = set()
    for file in (ROOT / "hbserve").rglob("*.py"):
        if file.name == "supervisor.py":
            continue  # it lists them
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant):
                constants.add(str(node.value))
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in MAKERS_OF_EVENTS:
                kinds = [*node.args[:1], *(given.value for given in node.keywords if given.arg == "kind")]
                parts = [part for kind in kinds for part in ast.walk(kind) if isinstance(part, ast.Constant)]
                named |= {part.value for part in parts if isinstance(part.value, str)}
    assert named <= set(EVENT_KINDS) <= constants


def test_every_parameter_of_the_http_api_is_documented() -> None:
    text = (ROOT / "docs" / "http_api.md").read_text()
    own = set(SamplingParams.__struct_fields__) & set(CompletionRequest.model_fields)
    for name in {*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, *own, *NEUTRAL}:
        assert re.search(rf"`{name}\b", text), name


def test_yaml_in_the_readme_is_a_system() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert from_dict(yaml.safe_load(text), ROOT).mode == "disaggregated"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load(path)


def test_version_changelog_and_tag_agree() -> None:
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    is_released = re.fullmatch(r"\d+\.\d+\.\d+", __version__) is not None
    assert sections[0] == (__version__ if is_released else "Unreleased")
    numbers = [tuple(map(int, name.removesuffix(".dev0").split("."))) for name in (__version__, sections[1])]
    assert numbers[0] > numbers[1]
    tags = [os.environ["GITHUB_REF_NAME"]] if os.environ.get("GITHUB_REF_TYPE") == "tag" else []
    listed = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    tags += listed.stdout.split()  # none without a repository
    assert {tag for tag in tags if tag.startswith("v")} <= {f"v{__version__}"}
