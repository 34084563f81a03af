"""The serving benchmark: its numbers on made-up times, and its load on a target that keeps time.

Against a real server it runs in `tests/system/test_serving_metrics.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import re
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from hbserve.bench import plots
from hbserve.bench.load import LoadResult, LoadRun
from hbserve.bench.request_batch import LengthRange
from hbserve.bench.request_record import RequestRecord, RequestTargets, summarize
from hbserve.bench.serve import ServeBenchmark
from hbserve.bench.serve_options import ALL_TARGETS, ServeOptions, add_arguments
from hbserve.bench.serve_workload import ServeWorkload, WorkloadSource, draw_arrivals
from hbserve.bench.sweep import RateSearch, interpolated_rate
from hbserve.bench.target import TargetError, split_in
from hbserve.bench.traces import load_trace
from hbserve.errors import ConfigError

DEADLINE_S = 120.0
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.6805900,12,0
2023-11-16 18:15:52.6805900,12,3
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 500, "input_length": 1030, "output_length": 6, "hash_ids": [0, 1, 9]}
{"timestamp": 1500, "input_length": 512, "output_length": 7, "hash_ids": [7]}
"""


def source(**changes: Any) -> WorkloadSource:
    """Twenty random requests, but for the changes."""
    settings: dict[str, Any] = {
        "input_len": LengthRange(8, 64),
        "output_len": LengthRange(2, 6),
        "num_requests": 20,
        "vocab_size": 1000,
    }
    return WorkloadSource(**(settings | changes))


def trace_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


# --- workloads -----------------------------------------------------------------------------------


def test_azure_traces(tmp_path: Path) -> None:
    entries = load_trace(trace_file(tmp_path, "a.csv", AZURE))
    assert [(e.arrival_s, e.input_len, e.output_len) for e in entries] == [
        (0.0, 374, 44),
        (pytest.approx(4.314579), 396, 109),
        (6.0, 12, 3),
    ]
    fast = source(trace=entries, arrivals="trace", num_requests=None).workload(10.0, 0)
    assert [request.arrival_s for request in fast.requests] == pytest.approx([0, 4.314579 / 30, 0.2])
    assert fast.rate == pytest.approx(10)
    soon = source(trace=entries, arrivals="trace", num_requests=None, duration_s=5.0).workload(None, 0)
    assert [request.input_len for request in soon.requests] == [374, 396]
    cut = source(trace=entries, arrivals="trace", max_input_len=100, max_output_len=50).workload(None, 0)
    assert [(r.input_len, r.output_len) for r in cut.requests] == [(100, 44), (100, 50), (12, 3)]


def test_azure_traces_with_zones_and_from_spreadsheets(tmp_path: Path) -> None:
    text = AZURE.replace("6805900,", "680590+00:00,").replace("50.9951690", "50+00:00")
    entries = load_trace(trace_file(tmp_path, "a.csv", "\ufeff" + text))
    assert [entry.arrival_s for entry in entries] == [0.0, pytest.approx(3.31941), 6.0]


def test_mooncake_traces_share_prefix_blocks(tmp_path: Path) -> None:
    trace = load_trace(trace_file(tmp_path, "m.jsonl", MOONCAKE))
    make = source(trace=trace, arrivals="trace", num_requests=None)
    rounded = load_trace(trace_file(tmp_path, "r.jsonl", MOONCAKE.replace("500", "0", 1)))
    assert [entry.arrival_s for entry in rounded] == [0, 0.75, 1.5]
    lines = MOONCAKE.replace("500", "0", 1).splitlines()
    unsorted = load_trace(trace_file(tmp_path, "u.jsonl", "\n".join(reversed(lines))))
    assert [entry.arrival_s for entry in unsorted] == [0, 0.75, 1.5]
    assert load_trace(trace_file(tmp_path, "w.jsonl", "\ufeff" + MOONCAKE.replace("\n", "\r\n"))) == trace
    workload = make.workload(None, 3)
    first, second, third = (workload.prompt(request) for request in workload.requests)
    assert [len(prompt) for prompt in (first, second, third)] == [1100, 1030, 512]
    assert first[:1024] == second[:1024]
    assert first[1024:1030] != second[1024:1030]
    assert third != first[:512]
    assert all(0 <= token < 1000 for token in first)
    again, other = make.workload(None, 3), make.workload(None, 4)
    assert again.prompt(again.requests[0]) == first
    assert other.prompt(other.requests[0])[:64] != first[:64]
    cut = source(trace=trace, arrivals="trace", max_input_len=600).workload(None, 3)
    assert cut.prompt(cut.requests[0]) == first[:600]


def test_sharegpt_files_are_their_own_prompts(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "abc"}, {"from": "gpt", "value": "de"}, {"from": "human", "value": "f"}]
    one_sided = {"conversations": turns[:1]}
    turns[:0] = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hello?"}]
    path = trace_file(tmp_path, "s.json", json.dumps([{"id": "x", "conversations": turns}, one_sided]))
    entries = load_trace(path, lambda text: [ord(character) for character in text])
    workload = source(trace=entries).workload(2.0, 0)
    [request] = workload.requests
    assert (workload.prompt(request), request.output_len) == ([97, 98, 99], 2)
    with pytest.raises(ConfigError, match="--tokenizer"):
        load_trace(path)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.csv", "TIMESTAMP,Context\n2023-11-16 18:15:46,3\n", "a.csv: not an Azure trace: there is no column"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n\nnoon,3,4\n", "a.csv:3: not a line of an Azure trace"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-3,4\n", "negative"),
        ("m.jsonl", '{"timestamp": 0}\n', "m.jsonl:1: not a line of a Mooncake trace"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 0, "output_length": 5, "hash_ids": []}', "no usable request"),
        (
            "m.jsonl",
            MOONCAKE + '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0]}',
            ":4: 1 bl",
        ),
        ("m.jsonl", MOONCAKE.replace("[0", "[-1"), "m.jsonl:1: not a line of a Mooncake trace: .*hash_ids"),
        ("m.jsonl", MOONCAKE.replace("[0", f"[{2**63}"), "m.jsonl:1: not a line of a Mooncake trace: .*hash_ids"),
        ("a.csv", AZURE + "2023-11-16 18:16:00," + "1" * 200_000 + ",3\n", "a.csv: field larger than field limit"),
        ("s.json", '[{"conversations": 3}]', "not ShareGPT's format"),
        ("t.txt", "", "name ends in"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no usable request"),
    ],
)
def test_files_that_are_no_trace(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_trace(trace_file(tmp_path, name, text), lambda text: [])


def test_requests_that_come_at_once_have_no_rate(tmp_path: Path) -> None:
    trace = load_trace(trace_file(tmp_path, "m.jsonl", re.sub(r"\b1?500\b", "0", MOONCAKE)))
    assert [entry.arrival_s for entry in trace] == [0, 0, 0]
    with pytest.raises(ConfigError, match="come at once"):
        source(trace=trace, arrivals="trace").workload(1.0, 0)
    with pytest.raises(ConfigError, match="--rate"):
        source().workload(None, 0)
    with pytest.raises(ConfigError, match="over 300 days, and at most 30 are allowed"):
        source(arrivals="poisson", num_requests=300, burstiness=0.0).workload(299 / 300 / 86400, 0)
    with pytest.raises(ConfigError, match="no requests"):
        source(trace=trace[3:], arrivals="trace").workload(1.0, 0)


@pytest.mark.parametrize("burstiness", [0.0, 0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_burstiness(burstiness: float) -> None:
    times = draw_arrivals(20_000, 5.0, burstiness, 7)
    assert times == draw_arrivals(20_000, 5.0, burstiness, 7)
    gaps = [later - sooner for sooner, later in itertools.pairwise([0.0, *times] if burstiness else times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / mean**2 == pytest.approx(burstiness, rel=0.1, abs=1e-9)


# --- numbers -------------------------------------------------------------------------------------


def record(arrival_s: float, times: list[tuple[float, int]], error: str | None = None) -> RequestRecord:
    """A request that has ended with its last token."""
    end_s = times[-1][0] if times else None
    return RequestRecord(0, arrival_s, 10, 4, arrival_s, end_s, times, error)


def test_a_run_counted_by_hand() -> None:
    records = [
        record(0.0, [(0.5, 1), (0.6, 1), (0.9, 2)]),
        record(1.0, [(1.25, 1), (1.5, 3)]),
        record(2.0, [(4.0, 4)]),
        record(2.5, [(2.75, 1)], error="HTTP 503"),
    ]
    summary = summarize(records, RequestTargets.parse("ttft:500,tpot:134"))
    assert (summary["seconds"], summary["num_answered"], summary["errors"]) == (4.0, 3, {"HTTP 503": 1})
    assert (summary["input_tokens_per_s"], summary["output_tokens_per_s"]) == (7.5, 3.0)
    assert (summary["num_met"], summary["attainment"], summary["goodput_per_s"]) == (2, 0.5, 0.5)
    assert (summary["ttft_ms"]["p50"], summary["ttft_ms"]["p99"]) == (500, 2000)
    assert summary["tpot_ms"]["max"] == pytest.approx(400 / 3)
    assert summary["itl_ms"]["p50"] == 250
    assert summary["itl_ms"]["mean"] == pytest.approx((100 + 300 + 250) / 3)
    assert summary["e2e_ms"]["p90"] == 2000
    assert records[0].as_dict()["max_itl_ms"] == 300
    empty = summarize([record(0.0, [], error="HTTP 500")], None)
    assert (empty["ttft_ms"], empty["requests_per_s"]) == (None, 0)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:x", "ttft:-1", "ttft:1,ttft:2", "itl:5", "tpot:inf"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--goodput"):
        RequestTargets.parse(text)


@pytest.mark.parametrize(("first", "limit"), [(1.0, 37.0), (100.0, 0.9), (8.0, 8.0)])
def test_the_search_finds_the_limit(first: float, limit: float) -> None:
    search = RateSearch(first, 0.05)
    tried = []
    while (rate := search.next_rate()) is not None:
        tried.append(rate)
        search.add(rate, rate <= limit)
    assert limit / 1.05 <= search.best <= limit < search.worst <= search.best * 1.05
    assert len(tried) < 20


def test_a_search_near_its_end_takes_small_steps_and_the_limit_lies_between_its_runs() -> None:
    search = RateSearch(10.0, 0.05, 1.1, 4)
    tried = []
    while (rate := search.next_rate()) is not None:
        tried.append(rate)
        search.add(rate, rate <= 13, is_far=rate == 10)
    assert tried == pytest.approx([10, 12.1, 13.31, math.sqrt(12.1 * 13.31)])
    assert interpolated_rate([(8.0, 1.0), (16.0, 0.8), (4.0, 1.0)], 0.9) == pytest.approx(8 * math.sqrt(2))
    assert interpolated_rate([(8.0, 1.0)], 0.9) is interpolated_rate([(8.0, 0.1)], 0.9) is None


def test_the_search_does_not_believe_a_good_rate_above_a_bad_one() -> None:
    search = RateSearch(8.0, 0.05)
    for rate, good in ((8.0, True), (16.0, False), (11.0, False), (20.0, True)):
        search.add(rate, good)
    assert search.best <= search.worst == 11.0


# --- load ----------------------------------------------------------------------------------------


def options(*arguments: str) -> ServeOptions:
    """As the program would have them."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    target = ("--url", "http://127.0.0.1:9", "--vocab-size", "1000", "--no-progress")
    return ServeOptions.from_arguments(parser.parse_args([*target, *arguments]))


class PacedTarget:
    """Answers after so many seconds, then with a token each such time; refuses every fifth if told to.

    With a capacity it is a hundred times slower while more requests than that are open.
    """

    vocab_size = 1000
    max_model_len: int | None = None

    def __init__(self, pace_s: float, refuses: bool = False, capacity: int | None = None) -> None:
        self.pace_s, self.refuses, self.capacity = pace_s, refuses, capacity
        self.came: list[tuple[float, int, int, dict[str, float]]] = []
        self.num_open = self.max_open = 0
        self.splits = iter([(70.0, 30.0, False), (60.0, 40.0, True)])

    async def generate(self, prompt: list[int], output_len: int, targets: dict[str, float]) -> AsyncGenerator[int]:
        self.came.append((time.perf_counter(), len(prompt), output_len, targets))
        if self.refuses and len(self.came) % 5 == 0:
            raise TargetError("HTTP 503")
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            for _ in range(output_len):
                overloaded = self.capacity is not None and self.num_open > self.capacity
                await asyncio.sleep(100 * self.pace_s if overloaded else self.pace_s)
                yield 1
        finally:
            self.num_open -= 1

    async def split(self) -> tuple[float, float, bool] | None:
        return next(self.splits, None)

    async def drafts(self) -> dict[str, dict[str, int]]:
        """Four drafts of three tokens for each request, of which one is right."""
        number = len(self.came)
        counts = {"drafts": 4 * number, "drafted_tokens": 12 * number, "accepted_tokens": 4 * number}
        return {"suffix": counts, "ngram": dict.fromkeys(counts, 0)} if number else {}

    async def describe(self) -> dict[str, Any]:
        return {}


async def run_load(target: PacedTarget, workload: ServeWorkload, *arguments: Any) -> LoadResult:
    async with asyncio.timeout(DEADLINE_S):
        return await LoadRun(target, workload, *arguments).run()


def test_the_split_is_the_first_instances() -> None:
    shares = {"prefill_percentage": 70, "decode_percentage": 30, "mixed": False}
    assert split_in({"instances": {"semi-0": {"current_sm_allocation": shares}}}) == (70, 30, False)
    assert split_in({"instances": {}}) is None


async def test_load_is_open_loop_and_every_request_is_accounted_for() -> None:
    target = PacedTarget(0.15, refuses=True)
    workload = source(num_requests=40).workload(200.0, 5)
    targets = RequestTargets(ttft_ms=1000.0, tpot_ms=500.0)
    result = await run_load(target, workload, targets, ALL_TARGETS)
    assert target.max_open > 20  # a closed loop would have waited for answers
    assert target.num_open == 0
    assert not result.cut_short
    asked = [
        (request.input_len, request.output_len, {"ttft_ms": 1000.0, "tpot_ms": 500.0}) for request in workload.requests
    ]
    assert [came[1:] for came in target.came] == asked
    refused = [record for record in result.records if record.error]
    assert [record.error for record in refused] == ["HTTP 503"] * 8
    for answer in result.records:
        assert answer.sent_s >= answer.arrival_s
        if answer.error is None:
            assert answer.num_tokens == answer.output_len
            assert answer.ttft_s is not None
            assert answer.ttft_s >= 0.15
    assert result.split[0][1:] == (70.0, 30.0, False)
    health = result.client.as_dict(result.records)
    assert 0 < health["cpu_share"] <= 1.5
    assert health["loop_lag_p50_ms"] <= health["loop_lag_max_ms"]


async def test_a_run_that_cannot_be_good_any_more_is_cut_short() -> None:
    target = PacedTarget(60.0)
    workload = source(num_requests=1000).workload(100.0, 5)
    result = await run_load(target, workload, RequestTargets(ttft_ms=50.0), (), 10)
    assert result.cut_short
    assert target.num_open == 0
    summary = summarize(result.records, RequestTargets(ttft_ms=50.0))
    assert (summary["attainment"], summary["errors"]) == (0, {"unfinished": 1000})


@pytest.mark.slow
async def test_the_sweep_measures_a_lone_request_and_finds_where_its_multiples_break(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    target = PacedTarget(0.003, capacity=4)
    asked = options(
        *("--slo-scale", "40:50", "--sweep", "--rate", "20", "--num-requests", "12", "--precision", "0.5"),
        *("--input-len", "8:64", "--output-len", "3", "--arrivals", "poisson", "--seed", "1"),
    )
    async with asyncio.timeout(DEADLINE_S):
        document = await ServeBenchmark(target, asked).run()
    first = document["runs"][0]["summary"]["drafts"]
    assert first == {"suffix": {"drafts": 48, "drafted_tokens": 144, "accepted_tokens": 48}}
    assert "48 drafts, 1.00 tokens right of each (suffix 33% of all tried)" in capsys.readouterr().out
    lone, targets, best = document["lone_request"], document["targets"], document["best_rate"]
    assert lone["tpot_ms"] >= 3
    assert targets == {"ttft_ms": 40 * lone["ttft_ms"], "tpot_ms": 50 * lone["tpot_ms"], "e2e_ms": None}
    rates = {run["summary"]["rate"]: run["summary"]["attainment"] >= 0.9 for run in document["runs"]}
    assert rates[20.0]
    assert rates[best["rate"]]
    assert not rates[best["too_high"]]
    assert best["rate"] < best["too_high"] <= 1.5 * best["rate"]
    prompts = [request[1] for request in target.came]
    assert prompts.count(16) >= 1  # the warm-up
    plots.require_matplotlib("--plots")
    drawn = plots.draw(json.loads(json.dumps(document)), tmp_path)
    assert [path.name for path in drawn] == ["attainment.png", "latencies.png", "split.png"]
    assert all(path.stat().st_size > 1000 for path in drawn)


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--url, --config or --model is needed"),
        (["--url", "http://127.0.0.1:9"], "--vocab-size or --tokenizer"),
        (["--url", "http://127.0.0.1:9", "--vocab-size", "9", "--mode", "unified"], "has its own configuration"),
        (["--url", "http://127.0.0.1:9", "--vocab-size", "9", "--rate", "1", "--num-requests", "1"], "no OpenAI-comp"),
        (["--model", "qwen3-0.6b", "--sweep"], "--sweep needs targets"),
        (["--model", "qwen3-0.6b", "--goodput", "ttft:1", "--slo-scale", "2"], "give one"),
        (["--model", "qwen3-0.6b", "--slo-scale", "0.5"], "--slo-scale"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], complaint: str, capsys: Any, monkeypatch: Any) -> None:
    from hbserve.bench.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bench", "serve", *arguments])
    assert main() == 1
    assert complaint in capsys.readouterr().err
