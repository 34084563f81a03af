"""A profile that is learnt from a system's own steps and from probes while it is idle."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.messages.client import AddRequest, OutputBatch
from hbserve.messages.worker import StepPlan, StepResult
from hbserve.policy.learnt_points import LearntPoints, ProbeLimits
from hbserve.policy.probe_step import ProbeSize
from hbserve.policy.profile_file import LearntProfile, load_profile, profiled_predictor
from hbserve.policy.step_profile import StepProfile
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.scheduler.core_io import FromClient, FromWorker, Start
from hbserve.scheduler.learning.profile_learner import _IDLE_S
from hbserve.scheduler.scheduler import CpuScheduler
from tests.support.hellos import hello
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"


def seconds(work: StepWork) -> float:
    """The worker's times: 4 ms, and so much for each token, row and pair."""
    rows, keys, tokens, pairs, _ = work
    return 4e-3 + 2e-5 * tokens + 1e-9 * pairs + 2e-5 * rows + 1e-8 * keys


class Worker:
    """A scheduler that learns, and its one worker, whose steps take as long as `seconds` says."""

    def __init__(self, num_blocks: int = 4096) -> None:
        config = PdDisaggConfig.from_arguments(str(DEMO), mode="unified", device="cpu").freeze()
        start = Start(now=0.0, time_ns=1000, learns_profile=True)
        self.scheduler = CpuScheduler(config, {"unified-0": "tcp://worker:1"}, start)
        self.now, self.free_at = 0.0, 0.0
        self.outputs: dict[str, float] = {}
        self.probes: list[float] = []
        self._running: list[tuple[float, StepResult]] = []
        self._contexts: dict[int, int] = {}
        self.learnt: StepProfile | None = None
        self.slow_tokens, self.num_slow, self.max_slow = math.inf, 0, 99
        self.step([FromWorker(1, hello(num_blocks=num_blocks, max_model_len=16_384))])

    def step(self, inbox: list[FromWorker | FromClient] | None = None) -> None:
        outbox = self.scheduler.step(self.now, inbox or [])
        self.call_at = outbox.call_at
        self.learnt = outbox.learnt or self.learnt
        for _, reply in outbox.to_clients:
            if isinstance(reply, OutputBatch):
                self.outputs |= {o.request_id: self.now for o in reply.outputs if o.finish_reason}
        for _, command in outbox.to_workers:
            if isinstance(command, StepPlan):
                self._run(command)

    def _run(self, plan: StepPlan) -> None:
        decodes, decode_context, prompt_tokens, pairs = 0, 0, 0, 0.0
        for row in plan.rows:
            if row.num_tokens == 1:
                decodes += 1
                decode_context += row.start
            else:
                prompt_tokens += row.num_tokens
                pairs += num_pairs(row.num_tokens, row.start)
        busy_s = seconds(StepWork(decodes, decode_context, prompt_tokens, pairs))
        if prompt_tokens >= self.slow_tokens and self.num_slow < self.max_slow:
            self.num_slow += 1
            busy_s += 1.0
        self.free_at = max(self.now, self.free_at) + busy_s
        tokens = [5] * sum(row.sample for row in plan.rows)
        result = StepResult(epoch=plan.epoch, step_id=plan.step_id, token_ids=tokens, logprobs=None, busy_s=busy_s)
        self._running.append((self.free_at, result))
        self.probes += [self.free_at] * (not self.scheduler.counts["requests"])

    def run(self, until: float) -> None:
        while True:
            next_result = self._running[0][0] if self._running else float("inf")
            at = min(next_result, self.call_at, until)
            self.now = max(self.now, at)
            if at == until and at != next_result:
                return
            self.step([FromWorker(1, self._running.pop(0)[1])] if at == next_result else [])

    def ask(self, name: str, num_tokens: int, max_tokens: int = 1) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = AddRequest(
            request_id=name, prompt_token_ids=[1 + len(name)] * num_tokens, end_token_ids=[], sampling=sampling
        )
        self.step([FromClient(b"c", request)])


def test_an_idle_system_learns_a_profile_that_predicts_its_steps() -> None:
    worker = Worker()
    worker.run(_IDLE_S - 0.01)
    assert not worker.probes, "between two turns of a conversation there are no probes"
    worker.run(120.0)
    assert worker.learnt is not None
    num_probes = len(worker.probes)
    worker.run(150.0)
    assert len(worker.probes) == num_probes, "it is made once"
    stats = worker.scheduler._stats.collect(recent=True)
    assert stats["profile"] == {"state": "learnt", "points": len(worker.learnt.steps)}
    assert stats["cpu_scheduler"]["generated_tokens"] == stats["cpu_scheduler"]["total_requests"] == 0
    assert "profile" in [event["kind"] for event in stats["recent"]["events"]]
    pool = worker.scheduler.instances["unified-0"].pool
    pool.check_consistency()
    assert pool.num_free_blocks == pool.total_blocks
    predicted = profiled_predictor(worker.learnt)
    for work in (StepWork(32, 32 * 1000), StepWork(0, 0, 1500, num_pairs(1500, 0)), StepWork(8, 4000, 400, 80_000)):
        assert predicted.seconds(work) == pytest.approx(seconds(work), rel=0.2)


def test_a_request_waits_for_one_probe_at_most_and_steps_of_requests_are_learnt_too() -> None:
    waits = []
    for number in range(15):
        worker = Worker()
        worker.run(_IDLE_S + 0.05 * number)  # at any moment of the first probes
        asked = worker.now
        worker.ask("a", 100)
        worker.run(asked + 1.0)
        alone_s = seconds(StepWork(0, 0, 100, num_pairs(100, 0)))
        waits.append(worker.outputs["a"] - asked - alone_s)
    assert max(waits) <= seconds(ProbeSize(decode_rows=1, decode_context=512).work), "one step, not both"
    assert min(waits) == pytest.approx(0.0, abs=1e-9)
    worker = Worker()
    for number in range(60):  # never idle for long enough
        worker.ask(f"r{number}", 40 * (1 + number % 4), max_tokens=20)
        worker.run(worker.now + 0.5)
    assert worker.scheduler._stats.collect(recent=False)["profile"]["points"] >= 4


def test_a_request_ends_a_probe_and_sizes_that_are_slow_are_not_tried_for_ever() -> None:
    worker = Worker()
    worker.run(_IDLE_S + 0.001)
    assert len(worker.probes) == 1, "steps of a probe are planned one at a time"
    worker.ask("a", 100)
    worker.run(worker.now + 0.9)
    assert len(worker.probes) == 1
    assert "a" in worker.outputs
    pool = worker.scheduler.instances["unified-0"].pool
    pool.check_consistency()
    assert pool.num_free_blocks == pool.total_blocks
    worker = Worker()
    worker.slow_tokens = 500
    worker.run(60.0)
    assert worker.num_slow == 2, "once more, and no larger one"
    worker = Worker()
    worker.slow_tokens, worker.max_slow = 500, 1
    worker.run(60.0)
    assert worker.num_slow == 1
    assert worker.learnt is not None, "a disturbance spoils nothing"
    assert max(point.prompt_tokens for point in worker.learnt.steps) == 2048


def test_a_lost_worker_takes_its_probe_with_it() -> None:
    worker = Worker()
    worker.run(_IDLE_S + 0.001)
    assert worker.probes
    worker._running.clear()
    before = len(worker.probes)
    worker.step([FromWorker(1, hello(epoch=2, arena_epoch=2, num_blocks=64, max_model_len=16_384))])
    assert len(worker.probes) > before, "the new memory is probed"
    worker._running.clear()
    worker.step([FromWorker(1, hello(epoch=3, arena_epoch=3, num_blocks=32, max_model_len=16_384))])
    worker.run(worker.now + 0.2)
    pool = worker.scheduler.instances["unified-0"].pool
    assert pool.num_free_blocks == pool.total_blocks == 32


def test_points_are_medians_and_bounded() -> None:
    points = LearntPoints()
    for busy_s in (3.0, 0.01, 0.011, 0.012):  # the first of a size compiles a kernel
        points.observe(StepWork(0, 0, 256, num_pairs(256, 0)), busy_s)
    assert points.num_points == 1
    assert not points.is_enough
    for rows in range(1, 4000):
        points.observe(StepWork(rows, 512 * rows), 0.01)
        points.observe(StepWork(rows, 512 * rows, rows, 0.0), 0.01)  # several short prompts
    assert points.num_points < 30
    limits = ProbeLimits(max_tokens=64, max_rows=1, max_context=600)
    assert LearntPoints().next_probe(limits, lambda _: 0.0, 1.0) == ProbeSize(decode_rows=1, decode_context=512)
    assert LearntPoints().next_probe(limits, lambda _: 2.0, 1.0) is None, "all would take too long"


@pytest.fixture
def profile() -> StepProfile:
    worker = Worker()
    worker.run(120.0)
    assert worker.learnt is not None
    return worker.learnt


def test_a_learnt_profile_is_written_whole_and_over_a_damaged_file_only(
    profile: StepProfile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    learnt = LearntProfile(str(tmp_path / "new" / "p.json"), "this model")
    path = Path(learnt.path)
    learnt.keep(profile)
    assert load_profile(path).subject == "this model"
    assert [file.name for file in path.parent.iterdir()] == ["p.json"]
    before = path.read_bytes()
    learnt.keep(profile)
    assert "not kept" in caplog.text
    assert path.read_bytes() == before
    for damaged in (before[:100], b"\xff" * 50, b"", b"{}"):
        path.write_bytes(damaged)
        learnt.keep(profile)
        assert path.read_bytes() == before
    (tmp_path / "file").write_text("no folder")
    LearntProfile(str(tmp_path / "file" / "p.json"), "this model").keep(profile)
    assert "cannot keep the learnt step times" in caplog.text
