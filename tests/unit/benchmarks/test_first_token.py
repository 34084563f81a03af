"""The hops of a first token, from a log of the scheduler and the times at the client."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.first_token import HOPS, hops_of, steps_of
from benchmarks.step_log import Done, Entry, Planned, Taken, key_of, read_log

PROMPT = list(range(300))


def planned(at: float, step_id: int, chunks: dict[str, tuple[int, int, bool]], lead_s: float | None) -> Planned:
    tokens = sum(end - start for start, end, _ in chunks.values())
    return Planned(at, step_id, 8, 800.0, tokens, 0.0, 0.03, lead_s, chunks, "unified-0")


def test_the_hops_of_a_prompt_in_two_chunks_add_up_to_its_time_to_the_first_token(tmp_path: Path) -> None:
    log: list[Entry] = [
        planned(10.000, 1, {}, None),
        Taken(10.002, "a", key_of(PROMPT)),
        planned(10.025, 2, {"a": (0, 200, False)}, 0.005),
        Done(10.031, 1, 0.030, 0.001, 0.0),
        planned(10.060, 3, {"a": (200, 300, True)}, 0.004),
        Done(10.065, 2, 0.032, 0.001, -0.001),
        Done(10.090, 3, 0.024, 0.001, 0.001),
    ]
    path = tmp_path / "log"
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in log))
    times = {key_of(PROMPT): (10.001, 10.092)}
    [hops] = hops_of(read_log(path), times, {key_of(PROMPT): 0.0005})
    expected = {"late": 0.5, "in": 1, "plan": 23, "before": 6, "travel": 2, "steps": 56, "turns": 1, "out": 2}
    assert hops == expected
    assert tuple(hops) == HOPS
    assert sum(hops.values()) == 91.5
    _, second, third = steps_of(log, None)
    assert (second["busy_ms"], second["gap_ms"], second["lead_ms"], second["chunks"]) == (32, 2, 5, 1)
    assert third["prompt_tokens"] == 100
