"""Masks of grammars beside the steps: a step does not wait for them, and one grammar stays one request's trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbserve.engine import grammar_table
from hbserve.engine.grammar_table import GrammarTable
from hbserve.grammar import Matcher, Vocabulary
from hbserve.messages.worker import NO_TOKEN, PlanRow, SequenceState
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers
from tests.support.model_zoo import save_model
from tests.unit.engine.test_model_runner import launch, make_runner

pytest.importorskip("llguidance")

DEADLINE_S = 60.0
SLOW, QUICK = 'start: "slow" /[a-z]+/', 'start: "quick" /[a-z]+/'
AMBIGUOUS = "start: s\ns: s s | s s s | /[a-z ]/"
Computed = list[list[int]]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, Computed]]:
    """An event for which masks of the grammar `SLOW` wait; and the number of masks that were begun."""
    opened, begun = threading.Event(), []
    follow, mask = Vocabulary.follow, Matcher.mask

    def noted(self: Vocabulary, grammar: str, end_token_ids: list[int]) -> Matcher:
        matcher = follow(self, grammar, end_token_ids)
        matcher.is_slow = grammar == SLOW  # type: ignore[attr-defined]
        return matcher

    def held(self: Matcher) -> Any:
        if self.is_slow:  # type: ignore[attr-defined]
            begun.append([])
            opened.wait(DEADLINE_S)
        return mask(self)

    monkeypatch.setattr(Vocabulary, "follow", noted)
    monkeypatch.setattr(Matcher, "mask", held)
    yield opened, begun
    opened.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("masks"))


def state(slot: int, grammar: str, history: list[int], **sampling: Any) -> SequenceState:
    return SequenceState(
        slot=slot,
        block_ids=[slot],
        sampling=SamplingParams(grammar=grammar, temperature=0, **sampling),
        end_token_ids=[1],
        min_end_position=0,
        num_prompt_tokens=len(history),
        history=history,
    )


def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary(read_vocabulary(folder), 400)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def has_mask(table: GrammarTable, slot: int) -> bool:
    table.masks(np.array([slot]))
    return not table.take_missing()


def test_a_mask_that_is_late_delays_no_other_row(folder: Path, gate: tuple[threading.Event, Computed]) -> None:
    opened, _ = gate
    table = GrammarTable(4, 400, folder)
    table.install(state(0, SLOW, [2, 3]))
    table.install(state(1, QUICK, [2, 3]))
    until(lambda: has_mask(table, 1))
    masks = table.masks(np.array([0, 1]))  # returns although the first waits
    assert (masks[1] == vocabulary(folder).follow(QUICK, [1]).mask()).all()
    assert table.missing(np.array([0, 1])).tolist() == [True, False]
    assert table.take_missing() == {0: None}
    opened.set()
    until(lambda: has_mask(table, 0))
    assert (table.masks(np.array([0]))[0] == vocabulary(folder).follow('start: "slow" /[a-z]+/ ', [1]).mask()).all()


def test_nothing_more_is_computed_for_a_sequence_that_has_left(
    folder: Path, gate: tuple[threading.Event, Computed]
) -> None:
    opened, begun = gate
    table = GrammarTable(4, 400, folder)
    table.install(state(0, SLOW, [2]))
    until(lambda: len(begun) == 1)
    for position, token_id in enumerate(b"slow", start=1):
        table.advance([PlanRow(0, position, 1, [token_id], [], True)])
    table.install(state(0, QUICK, [2]))
    opened.set()
    until(lambda: has_mask(table, 0))
    assert len(begun) == 1


def test_a_grammar_that_takes_too_much_time_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the time is spent: in one mask, or in many."""
    monkeypatch.setattr(grammar_table, "_CPU_S_AT_START", 0.2)
    monkeypatch.setattr(grammar_table, "_CPU_S_PER_TOKEN", 0.0)
    table = GrammarTable(4, 400, folder)
    letter = next(i for i in range(400) if vocabulary(folder).follow("start: /a/", []).mask()[i // 32] >> i % 32 & 1)
    table.install(state(0, AMBIGUOUS, [2]))
    table.install(state(1, QUICK, [2]))
    error, position = None, 1
    while error is None:
        assert position < 400
        until(lambda: has_mask(table, 0) or table._followers[0].error is not None)
        table.masks(np.array([0, 1]))
        error = table.take_missing().get(0)
        table.advance([PlanRow(0, position, 1, [letter], [], True)])
        position += 1
    assert "too complex" in error or "too much time" in error
    until(lambda: has_mask(table, 1))


def test_a_row_without_its_mask_gets_no_token_and_leaves_no_trace(
    tmp_path: Path, gate: tuple[threading.Event, Computed]
) -> None:
    """Its step is repeated when the mask is there, and gives what it would have given at first; penalties too."""
    opened, _ = gate
    save_model(tmp_path, "qwen3", vocab_size=400)
    tiny_tokenizers.byte_level(tmp_path)
    runner = make_runner(tmp_path)
    prompt = [5, 6, 7]
    row = PlanRow(0, 0, 3, prompt, [], True)
    first = launch(runner, row, new_sequences=[state(0, SLOW, prompt, presence_penalty=1.5)])
    assert (first.token_ids, first.row_errors) == ([NO_TOKEN], None)
    repeated = PlanRow(0, 2, 1, prompt[2:], [], True)
    assert launch(runner, repeated).token_ids == [NO_TOKEN]
    opened.set()
    until(lambda: launch(runner, repeated).token_ids != [NO_TOKEN])
    again = launch(runner, repeated)
    plain = launch(runner, PlanRow(1, 0, 3, prompt, [], True), new_sequences=[state(1, SLOW, prompt)])
    assert again.token_ids == plain.token_ids
    assert plain.token_ids[0] >= 0
