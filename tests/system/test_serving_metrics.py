"""The measurements of a served system: every request and every token counts once."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hbserve.cli import main as cli
from hbserve.config import SchedulerConfig
from hbserve.messages.client import AddRequest
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.sampling_params import SamplingParams
from hbserve.scheduler.core_io import OutboxWriter
from hbserve.scheduler.metrics import SchedulerMetrics
from hbserve.scheduler.sequence import InflightRow, InflightStep, Sequence
from tests.support.paths import ROOT
from tests.system.test_scripts import Program

DEADLINE_S = 60.0
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 500, "input_length": 1030, "output_length": 6, "hash_ids": [0, 1, 9]}
{"timestamp": 1500, "input_length": 512, "output_length": 7, "hash_ids": [7]}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A prefill and a decode instance of the demo model behind the HTTP API."""
    folder = tmp_path_factory.mktemp("served")
    program = Program(
        folder,
        "start_pd_disagg.py",
        *("--config", str(ROOT / "configs" / "pd_disagg_cpu.yaml"), "--port", "0"),
        *("--kv_cache.host_bytes", str(8 << 20)),
    )
    yield program.url()
    program.process.terminate()
    assert program.process.wait(DEADLINE_S) == 0


def scrape(url: str) -> dict[str, Any]:
    """Return samples by name and labels, as Prometheus reads them; the sum over labels has the bare name."""
    response = httpx.get(f"{url}/metrics", timeout=DEADLINE_S).raise_for_status()
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples: dict[str, Any] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            if "le" not in sample.labels:
                samples[sample.name] = samples.get(sample.name, 0) + sample.value
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            assert f"{sample.name}/{labels}" not in samples, "the same sample twice"
            samples[f"{sample.name}/{labels}"] = sample.value
    return samples


async def complete(url: str, prompts: list[list[int]], num_tokens: int, **more: Any) -> list[httpx.Response]:
    """Send one completion request per prompt, all at once; return the answers."""
    body = {"model": "hbserve-demo", "max_tokens": num_tokens, "ignore_eos": True, **more}
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
        return await asyncio.gather(
            *(http.post("/v1/completions", json=body | {"prompt": prompt}) for prompt in prompts)
        )


async def test_every_request_and_token_is_counted_once(url: str) -> None:
    before = scrape(url)
    prompts = [[5 + number] * 40 for number in range(6)]
    for response in await complete(url, prompts, 9):
        response.raise_for_status()
    deadline = time.monotonic() + DEADLINE_S
    while (after := scrape(url))["hbserve_kv_transfers_open"]:  # the sender's side may report after the last token
        assert time.monotonic() < deadline

    def grown(name: str) -> float:
        return float(after[name] - before.get(name, 0))

    for name, count in (
        ("requests_total/outcome=completed", 6),
        ("requests_total/outcome=failed", 0),
        ("requests_with_targets_total", 0),
        ("time_to_first_token_seconds_count", 6),
        ("time_per_output_token_seconds_count", 6),
        ("e2e_request_latency_seconds_count", 6),
        ("prefill_queue_seconds_count", 6),
        ("decode_queue_seconds_count", 6),
        ("inter_token_latency_seconds_count", 6 * 8),
        ("generated_tokens_total", 6 * 9),
        ("prompt_tokens_total", 6 * 40),
        ("prompt_length_tokens_sum", 6 * 40),
        ("output_length_tokens_sum", 6 * 9),
        ("instance_generated_tokens_total/instance=prefill-0,role=prefill", 6),
        ("instance_generated_tokens_total/instance=decode-0,role=decode", 6 * 8),
        ("kv_transfers_total/source=prefill-0,target=decode-0", 6),
    ):
        assert grown(f"hbserve_{name}") == count, name
    # The gaps of a request add up to the time between its first token and its end.
    gaps, tpots = grown("hbserve_inter_token_latency_seconds_sum"), grown("hbserve_time_per_output_token_seconds_sum")
    assert gaps == pytest.approx(8 * tpots, rel=0.05, abs=0.01)
    assert after["hbserve_open_requests"] == 0
    assert after["hbserve_instance_up"] == 2
    assert after["hbserve_instance_info"] == 2
    assert grown("hbserve_instance_busy_seconds_total") > 0 < grown("hbserve_instance_host_seconds_total")
    bounds = [name for name in after if name.startswith("hbserve_time_to_first_token_seconds_bucket/")]
    cumulated = [after[name] for name in bounds]
    assert cumulated == sorted(cumulated)
    assert cumulated[-1] == after["hbserve_time_to_first_token_seconds_count"]

    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
        stats = (await http.get("/stats")).json()
        [model] = (await http.get("/v1/models")).json()["data"]
    formats = stats["gpu_instances"]["decode-0"]["formats"]
    assert formats.items() <= model.items()
    [info] = [name for name in after if name.startswith("hbserve_instance_info/") and "decode-0" in name]
    assert {f"{key}={value}" for key, value in formats.items()} <= {*info.partition("/")[2].split(",")}
    link = stats["kv_transfer"]["links"]["prefill-0->decode-0"]
    assert (
        grown("hbserve_kv_transfer_bytes_total")
        == 6 * 3 * stats["gpu_instances"]["decode-0"]["kv_blocks"]["block_bytes"]
    )
    assert link["bytes"] == after["hbserve_kv_transfer_bytes_total"]
    assert link["gb_per_s"] == pytest.approx(link["bytes"] / link["seconds"] / 1e9)
    for what in ("seconds", "queued_seconds"):
        assert 0 < grown(f"hbserve_kv_transfer_{what}_total") < DEADLINE_S, what
    assert 0 <= grown("hbserve_kv_transfer_exposed_seconds_total") < DEADLINE_S  # 0: all was hidden behind prefill
    assert after["hbserve_kv_transfers_open"] == link["queued"] == 0
    assert link["failures"] == {}
    window = stats["metrics"]
    assert window["queues"]["requests"] == {
        "waiting": 0,
        "batch_waiting": 0,
        "prefilling": 0,
        "transferring": 0,
        "decoding": 0,
    }
    assert 0 < window["window"]["ttft_p50_ms"] <= window["window"]["ttft_p99_ms"]
    assert set(window["busy_share"]) == {"prefill-0", "decode-0"}


def test_documents_and_dashboard_name_existing_metrics(url: str) -> None:
    scraped = {name.split("/")[0] for name in scrape(url)}
    dashboard = (ROOT / "configs" / "grafana" / "hbserve.json").read_text()
    documented = set(re.findall(r"hbserve_\w+", (ROOT / "docs" / "metrics.md").read_text()))
    for name in set(re.findall(r"hbserve_\w+", json.dumps(json.loads(dashboard)["panels"]))):
        assert name in scraped or name.startswith(
            ("hbserve_kv_transfer_failures", "hbserve_kv_tier_failures", "hbserve_semi_pd_")
        ), name
        assert re.sub("_(bucket|count|sum)$", "", name) in documented, name
    for name in scraped:
        assert re.sub("_(bucket|count|sum)$", "", name) in documented, name


@pytest.mark.parametrize(
    ("name", "value", "wrong"), [("ttft_ms", 500, -1), ("tpot_ms", 500, -1), ("priority", "batch", "urgent")]
)
async def test_targets_and_priority_over_http(url: str, name: str, value: object, wrong: object) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
        body = {"model": "hbserve-demo"}
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        for path, what in (
            ("/v1/completions", {"prompt": [5, 6], "max_tokens": 2}),
            ("/v1/chat/completions", chat),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
        ):
            good = await http.post(path, json=body | what | {name: value})
            assert good.status_code == 200, good.text
            bad = await http.post(path, json=body | what | {name: wrong})
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, name)


def test_a_file_of_requests_is_answered_and_goes_on_where_it_stopped(url: str, tmp_path: Path) -> None:
    file, output, errors = (tmp_path / name for name in ("b.jsonl", "b.out.jsonl", "b.errors.jsonl"))
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    bodies = [
        ("/v1/completions", {"prompt": [5, 6], "max_tokens": 2}),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
        ("/v1/chat/completions", chat | {"temperature": -1}),
    ]
    lines = [
        json.dumps({"custom_id": f"r{number}", "method": "POST", "url": path, "body": {"model": "hbserve-demo"} | body})
        for number, (path, body) in enumerate(bodies)
    ]
    file.write_text("\n".join(lines) + "\n")
    command = ["batch", str(file), "--url", url, "--concurrency", "2", "--timeout-s", str(DEADLINE_S)]
    assert cli.main(command) == 1  # one is refused
    answers = {answer["custom_id"]: answer for answer in map(json.loads, output.read_text().splitlines())}
    assert set(answers) == {"r0", "r1", "r2"}
    assert all(answer["response"]["status_code"] == 200 for answer in answers.values())
    assert answers["r1"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    [refused] = map(json.loads, errors.read_text().splitlines())
    assert (refused["custom_id"], refused["response"]["body"]["error"]["param"]) == ("r3", "temperature")
    whole = output.read_text().splitlines(keepends=True)
    output.write_text(whole[0] + whole[1][:30])  # it was killed in a line
    file.write_text("\n".join(lines[:3]) + "\n")
    assert cli.main(command) == 0
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in again) == ["r0", "r1", "r2"]
    assert output.read_text().startswith(whole[0])
    assert not errors.read_text()


def test_the_serving_benchmark(url: str, tmp_path: Path) -> None:
    trace = tmp_path / "m.jsonl"
    trace.write_text(MOONCAKE)
    results, plots = tmp_path / "results.json", tmp_path / "plots"
    pytest.importorskip("matplotlib")
    command = (
        *(
            sys.executable,
            "-m",
            "hbserve.bench",
            "serve",
            "--no-progress",
            "--url",
            url,
            "--vocab-size",
            "100",
            "--trace",
            str(trace),
            "--rate",
            "6",
            "--max-input-len",
            "60",
        ),
        *("--goodput", "ttft:60000,tpot:60000"),
        *("--json", str(results), "--plots", str(plots), "--seed", "3"),
    )
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(results.read_text())
    first = document["runs"][0]
    assert [request["num_tokens"] for request in first["requests"]] == [5, 6, 7]
    assert [request["error"] for request in first["requests"]] == [None] * 3
    assert first["summary"]["attainment"] == 1
    assert first["summary"]["output_tokens"] == 18
    assert len(first["itl_quantiles_ms"]) <= 4 + 5 + 6
    assert document["target"]["model"] == "hbserve-demo"
    assert (plots / "latencies.png").stat().st_size > 0
    assert "TTFT" in done.stdout


class Clock:
    """A clock in seconds that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def sequence(arrival: int, num_prompt_tokens: int, arrival_time: float) -> Sequence:
    """Make a request as the scheduler keeps it."""
    request = AddRequest(
        request_id="r", prompt_token_ids=[1] * num_prompt_tokens, end_token_ids=[], sampling=SamplingParams()
    )
    return Sequence(
        client=b"",
        request=request,
        arrival=arrival,
        tokens=[1] * num_prompt_tokens,
        end_token_ids=frozenset(),
        max_total_tokens=99,
        arrival_time=arrival_time,
    )


def test_a_schedule_counted_by_hand() -> None:
    """Two requests on one worker: a is alone for two steps, then b's prompt joins its third one."""
    clock = Clock()
    metrics = SchedulerMetrics(
        SemiPDMetricsCollector(window_size_seconds=60.0, clock=clock), SchedulerConfig(), OutboxWriter()
    )
    a, b = sequence(1, 10, 0.0), sequence(2, 30, 3.75)

    def step(now: float, prefill: list[Sequence], decode: list[Sequence], busy_s: float) -> None:
        clock.now = now
        in_prefill, in_decode = SimpleNamespace(num_tokens_at_entry=4), SimpleNamespace(num_tokens_at_entry=3)
        allocations: list[Any] = [in_prefill] * len(prefill) + [in_decode] * len(decode)
        pairs = zip(prefill + decode, allocations, strict=True)
        rows = [InflightRow(request, 0, allocation, 3, 4, True) for request, allocation in pairs]
        prefill_tokens = sum(request.num_prompt_tokens for request in prefill)
        last_token_times = []
        for request in prefill + decode:
            last_token_times.append(request.last_token_time)
            if request.last_token_time is None:
                metrics.on_first_token(request)
            request.last_token_time = now
            request.tokens.append(7)
        done = InflightStep(1, rows, prefill_rows=len(prefill), prefill_tokens=prefill_tokens)
        metrics.on_step_done("unified-0", done, busy_s, now, last_token_times)

    metrics.on_arrived(a)
    clock.now = 1.0
    metrics.on_admitted(a)
    step(3.0, [a], [], 1.5)
    step(3.5, [], [a], 0.25)
    clock.now = 3.75
    metrics.on_arrived(b)
    metrics.on_admitted(b)
    step(5.5, [b], [a], 1.75)
    metrics.on_ended(a, "completed")
    step(6.0, [], [b], 0.5)
    metrics.on_preempted(b)
    step(8.0, [], [b], 0.5)
    metrics.on_ended(b, "completed")
    clock.now = 10.0

    window = metrics.collector.get_current_window_metrics()
    assert window.duration_s == 10
    assert window.ttft.values == (1750, 3000)
    assert window.tpot.values == (1250, 1250)  # a: 2.5 s for two tokens; b: 2.5 s for two
    assert window.e2e.values == (4250, 5500)
    assert window.prefill_queue.values == (0, 1000)
    assert window.decode_queue.values == (0, 0)
    assert window.itl.values == (500, 500, 2000, 2000)
    assert (window.num_arrivals, window.num_completed, window.num_preemptions) == (2, 2, 1)
    assert (window.prefill.num_steps, window.prefill.num_tokens) == (2, 40)
    assert (window.decode.num_steps, window.decode.num_tokens, window.output_tokens) == (4, 4, 6)
    assert window.prefill.utilization == pytest.approx(0.325)
    assert window.decode.utilization == pytest.approx(0.3)
    assert window.worker_busy == {"unified-0": pytest.approx(0.45)}
    assert window.decode_throughput == 0.6
    gaps = metrics.collector.histograms["inter_token_latency_seconds"]
    assert (sum(gaps.counts), gaps.sum, gaps.counts[gaps.bounds.index(0.5)], gaps.counts[-1]) == (4, 5.0, 2, 2)
    assert metrics.collector.histograms["prefill_batch_size"].counts[:2] == [2, 0]
    assert metrics.collector.histograms["output_length_tokens"].sum == 6
