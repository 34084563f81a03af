"""Masks of grammars beside the steps: a step does not wait for them, and one grammar stays one request's trouble."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbserve.engine.grammar_table import GrammarTable
from hbserve.grammar import Vocabulary
from hbserve.grammar_process import parent
from hbserve.messages.worker import NO_TOKEN, PlanRow, SequenceState
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers
from tests.support.model_zoo import save_model
from tests.support.plan_driver import Driver, Sequence
from tests.unit.engine.test_model_runner import launch, make_runner

pytest.importorskip("llguidance")

DEADLINE_S = 60.0
SLOW, QUICK = 'start: "slow" /[a-z]+/', 'start: "quick" /[a-z]+/'
AMBIGUOUS = "start: s\ns: s s | s s s | /[a-z ]/"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file for which masks of the grammar `SLOW` wait; see `tests.support.odd_grammar_worker` for other grammars."""
    file = tmp_path / "gate"
    monkeypatch.setenv("ODD_GRAMMARS_FILE", str(file))
    monkeypatch.setattr(parent, "_MODULE", "tests.support.odd_grammar_worker")
    return file


def num_begun(gate: Path) -> int:
    """Masks of `SLOW` that were begun."""
    begun = gate.with_suffix(".begun")
    return len(begun.read_text()) if begun.exists() else 0


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


def error_of(table: GrammarTable, slot: int) -> str | None:
    table.masks(np.array([slot]))
    return table.take_missing().get(0)


def test_a_mask_that_is_late_delays_no_other_row(folder: Path, gate: Path) -> None:
    table = GrammarTable(4, 400, folder)
    table.install(state(0, SLOW, [2, 3]))
    table.install(state(1, QUICK, [2, 3]))
    until(lambda: has_mask(table, 1))
    masks = table.masks(np.array([0, 1]))  # returns although the first waits
    assert (masks[1] == vocabulary(folder).follow(QUICK, [1]).mask()).all()
    assert table.missing(2).tolist() == [True, False]
    assert table.take_missing() == {0: None}
    gate.touch()
    until(lambda: has_mask(table, 0))
    assert (table.masks(np.array([0]))[0] == vocabulary(folder).follow('start: "slow" /[a-z]+/ ', [1]).mask()).all()


def test_nothing_more_is_computed_for_a_sequence_that_has_left(folder: Path, gate: Path) -> None:
    table = GrammarTable(4, 400, folder)
    table.install(state(0, SLOW, [2]))
    until(lambda: num_begun(gate) == 1)
    for position, token_id in enumerate(b"slow", start=1):
        table.advance([PlanRow(0, position, 1, [token_id], [], True)])
    table.install(state(0, QUICK, [2]))
    gate.touch()
    until(lambda: has_mask(table, 0))
    assert num_begun(gate) == 1


@pytest.mark.parametrize("oddity", ["hang", "die", "grow"])
def test_a_grammar_that_cannot_be_computed_fails_alone(
    folder: Path, gate: Path, monkeypatch: pytest.MonkeyPatch, oddity: str
) -> None:
    """Whatever it does: it never ends, it ends the process, or it takes more memory than there is."""
    monkeypatch.setattr(parent, "MAX_WORK_S", 0.5 if oddity == "hang" else DEADLINE_S)
    monkeypatch.setattr(parent, "_LOOK_S", 0.1)
    table = GrammarTable(4, 400, folder)
    table.install(state(0, QUICK, [2]))
    until(lambda: has_mask(table, 0))
    letter = next(i for i in range(400) if table.masks(np.array([0]))[0][i // 32] >> i % 32 & 1)
    table.install(state(1, f'start: "{oddity}"', [2]))
    until(lambda: error_of(table, 1) is not None)
    assert "memory" in (error_of(table, 1) or "")
    table.advance([PlanRow(0, 1, 1, [letter], [], True)])
    until(lambda: has_mask(table, 0))  # by the process that has replaced the first, which got the whole output
    expected = vocabulary(folder).follow(QUICK, [1])
    expected.advance([letter])
    assert (table.masks(np.array([0]))[0] == expected.mask()).all()


def test_a_process_that_was_killed_costs_no_request_and_the_last_ends_with_its_owner(folder: Path) -> None:
    tables = [GrammarTable(4, 400, folder)]
    tables[0].install(state(0, QUICK, [2]))
    until(lambda: has_mask(tables[0], 0))
    events: list[str] = []
    tables[0].set_on_event(lambda kind, subject, text: events.append(f"{kind}: {subject}: {text}"))
    killed = tables[0]._process._child
    assert killed is not None
    killed.kill()
    tables[0].install(state(1, QUICK + " ", [2]))
    until(lambda: has_mask(tables[0], 1))
    assert has_mask(tables[0], 0)
    current = tables[0]._process._child
    assert current is not None
    assert current is not killed
    assert events == ["grammar_restarted: the grammar process: it ended with exit code -9 and is replaced"]
    tables.clear()
    until(lambda: not current.is_alive())


def test_a_process_that_was_idle_is_not_late(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "MAX_WORK_S", 0.3)
    monkeypatch.setattr(parent, "_LOOK_S", 0.05)
    table = GrammarTable(4, 400, folder)
    table.install(state(0, QUICK, [2]))
    until(lambda: has_mask(table, 0))
    process = table._process._child
    time.sleep(0.5)
    table.install(state(1, QUICK + " ", [2]))
    until(lambda: has_mask(table, 1))
    assert table._process._child is process


def test_a_process_that_cannot_start_fails_what_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "_MODULE", "tests.support.no_such_module")
    monkeypatch.setattr(parent, "_MAX_FAILED_STARTS", 1)
    table = GrammarTable(4, 400, folder)
    table.install(state(0, QUICK, [2]))
    until(lambda: "exit code 1, 1 times" in (error_of(table, 0) or ""))


def test_a_grammar_that_takes_too_much_time_says_so(folder: Path, gate: Path) -> None:
    """However the time is spent: in one mask, or in many. There the budget is small."""
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


def test_a_row_without_its_mask_gets_no_token_and_leaves_no_trace(tmp_path: Path, gate: Path) -> None:
    """Its step is repeated when the mask is there, and gives what it would have given at first; penalties too."""
    save_model(tmp_path / "model", "qwen3", vocab_size=400)
    tiny_tokenizers.byte_level(tmp_path / "model")
    runner = make_runner(tmp_path / "model")
    prompt = [5, 6, 7]
    row = PlanRow(0, 0, 3, prompt, [], True)
    first = launch(runner, row, new_sequences=[state(0, SLOW, prompt, presence_penalty=1.5)])
    assert (first.token_ids, first.row_errors) == ([NO_TOKEN], None)
    repeated = PlanRow(0, 2, 1, prompt[2:], [], True)
    assert launch(runner, repeated).token_ids == [NO_TOKEN]
    gate.touch()
    until(lambda: launch(runner, repeated).token_ids != [NO_TOKEN])
    again = launch(runner, repeated)
    plain_row = PlanRow(1, 0, 3, prompt, [], True)
    plain = launch(runner, plain_row, new_sequences=[state(1, SLOW, prompt)])
    while plain.token_ids == [NO_TOKEN]:
        plain = launch(runner, PlanRow(1, 2, 1, prompt[2:], [], True))
    assert again.token_ids == plain.token_ids
    assert plain.token_ids[0] >= 0


def test_drafts_follow_the_grammar_and_change_no_token(tmp_path: Path) -> None:
    """Right, wrong and forbidden guesses; a guess behind a forbidden one never counts. Penalties see them, too."""
    save_model(tmp_path / "model", "qwen3", vocab_size=400)
    tiny_tokenizers.byte_level(tmp_path / "model")
    runner = make_runner(tmp_path / "model")
    samplings = [
        SamplingParams(temperature=0, max_tokens=None, grammar="start: /([a-f]{3}[0-9]{2}x)+/", presence_penalty=1.0),
        SamplingParams(temperature=1.0, seed=4, max_tokens=None, grammar="start: /[a-z]{2}( [0-9]{3})+/", logprobs=1),
        SamplingParams(temperature=1.0, seed=5, max_tokens=None),
        SamplingParams(temperature=1.0, seed=6, max_tokens=None, grammar='start: ("it is " ("a" | "b") " now; ")+'),
    ]

    def run(driver: Driver) -> list[list[int]]:
        return driver.run(*(driver.add([5, 6, 7], 40, slot, sampling=s) for slot, s in enumerate(samplings)))

    expected = run(Driver(runner, feedback=False))
    for share_right in (1.0, 0.7):
        rng = random.Random(f"{share_right}")

        def draft(sequence: Sequence, limit: int, rng: random.Random = rng, share: float = share_right) -> list[int]:
            done = len(sequence.output)
            right = expected[sequence.slot][done : done + min(rng.choice((0, 2, 7)), limit)]
            return [token if rng.random() < share else rng.randrange(400) for token in right]

        driver = Driver(runner, drafter=draft)
        assert run(driver) == expected
        assert driver.num_accepted > 30
        for sequence, begin, tokens in driver.forced:
            assert sequence.output[begin : begin + len(tokens)] == tokens[: len(sequence.output) - begin]
        assert sum(len(tokens) for _, _, tokens in driver.forced) > 5
