"""Each piece of state has one owner: only its module changes it."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT

FILES = (path for path in (ROOT / "hbserve" / "scheduler").rglob("*.py") if path.parent.name != "learning")
SOURCES = {path.name: path.read_text() for path in FILES if path.name != "__init__.py"}
OWNERS = {
    "steps in flight": (r"(?:self|worker|other)\.inflight\.(?:append|popleft|pop|clear|extend)\(", {"worker.py"}),
    "pins": (r"pool\.(?:pin|unpin)\(", {"sequence.py"}),
    "a transfer's states": (r"\.(?:sender|receiver) = |\.state = ", {"transfer.py"}),
    "phases": (r"\.phase = ", {"sequence.py"}),
    "a request's memory": (r"\.(?:free|free_slot|free_allocation)\(", {"phases.py"}),
    "the choice of workers": (r"\._current\b", {"worker_choice.py"}),
    "connections": (r"by_connection\[.*\] = ", {"connections.py"}),
    "signs of life": (r"\.last_seen = ", {"worker_registry.py"}),
    "the queue": (r"waiting\.(?:append|insert|remove|pop)\(", {"waiting_queue.py"}),
}
FIRST_VALUE = r"        self\.last_seen = clock\.now"
"""In the constructor of `WorkerHandle`."""


@pytest.mark.parametrize("state", OWNERS)
def test_only_the_owner_changes_a_state(state: str) -> None:
    pattern, owners = OWNERS[state]
    sources = {name: re.sub(FIRST_VALUE, "", text) for name, text in SOURCES.items()}
    del sources["step_builder.py"]  # it has rows of its own
    assert {name for name, text in sources.items() if re.search(pattern, text)} == owners


def test_one_call_decides_that_a_requests_memory_goes() -> None:
    text = "".join(SOURCES.values())
    assert len(re.findall(r"\.free_allocation\(", text)) == 1
    assert len(re.findall(r"pool\.free\(", text)) == 1
