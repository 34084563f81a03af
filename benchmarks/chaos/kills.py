"""``python -m benchmarks chaos kills``: processes that are killed, stopped and told to end while clients stream.

Each case sends one signal, or two, to processes of a running system under load. Then it waits until the system serves
again, lets the open requests end, and checks:

- every answer is the right one, or one of the errors that `faults.EXPECTED` has for this signal to this process;
- the system serves again, or has ended with the documented exit code, in time;
- the idle system has given everything back: requests, KV blocks, processes, descriptors, shared memory, files.

Ten cases share a system. The modes take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

from benchmarks.chaos import processes
from benchmarks.chaos.campaign import Campaign, ChaosError
from benchmarks.chaos.census import IDLE_S, Census, settled
from benchmarks.chaos.faults import KEPT_DESCRIPTORS, choose_fault, inflict, systems
from benchmarks.chaos.load import Load
from benchmarks.chaos.questions import Answer, Question, new_session, questions, right_answers
from benchmarks.chaos.service import ADMIN_KEY, Service, make_model, service, until
from hbserve.process import event_loop

CASES_PER_SYSTEM = 10
NUM_QUESTIONS = 32
READY_S = 90.0
"""Time from the last signal until the system serves again, or has ended."""


class Kills:
    """The cases of a campaign, on systems that are started as they are needed."""

    def __init__(self, campaign: Campaign, model: Path) -> None:
        self._campaign = campaign
        self._systems = systems(model)
        self._known: list[tuple[Question, Answer]] = []
        self._before = Census()
        self._num_signals = 0  # to the running system
        self.rows: dict[tuple[str, str, str], Counter[str]] = {}

    async def run(self) -> None:
        """Run all cases."""
        asked = questions(self._campaign.chance(0, "questions"), NUM_QUESTIONS)
        async with service(self._systems["unified"]) as undisturbed:
            self._known = list(zip(asked, await right_answers(undisturbed, asked), strict=True))
        async with AsyncExitStack() as stack:
            running: tuple[str, Service] | None = None
            for number in self._campaign.cases():
                name = list(self._systems)[number // CASES_PER_SYSTEM % len(self._systems)]
                if running is None or running[0] != name or running[1].has_ended:
                    await self._end(number, running)
                    await stack.aclose()
                    running = name, await stack.enter_async_context(service(self._systems[name]))
                    await self._warm_up(running[1])
                num_failures = len(self._campaign.failures)
                await self._case(number, name, running[1])
                if len(self._campaign.failures) > num_failures:
                    running = None
            await self._end(number, running)

    async def _end(self, number: int, running: tuple[str, Service] | None) -> None:
        if running is not None and not running[1].has_ended:
            await running[1].end()
            await self._check_end(number, running[1], 0)

    async def _warm_up(self, running: Service) -> None:
        answers = await right_answers(running, [question for question, _ in self._known])
        for (question, right), answer in zip(self._known, answers, strict=True):
            if answer != right:
                raise ChaosError(f"an undisturbed system answers {question} by {answer}, another one by {right}")
        if left := await settled(running, None):
            raise ChaosError(f"an undisturbed system does not settle: {left}")
        self._before, self._num_signals = Census.take(running), 0

    async def _case(self, number: int, name: str, running: Service) -> None:
        chance = self._campaign.chance(number)
        log_offset = running.log.stat().st_size
        load = Load(running, self._known, self._campaign.chance(number, "load"))
        num_events = chance.choice([0, 5, 30, 100, 300])
        await until(lambda: load.num_events >= num_events, 5.0)
        await asyncio.sleep(chance.uniform(0, 0.05))
        if name == "semi_pd" and chance.random() < 0.6:
            await _rotate(running, chance)
            await asyncio.sleep(chance.choice([0.0, 0.3, 2.0]))
        faults = [choose_fault(chance, processes.descendants())]
        work = [asyncio.create_task(inflict(faults[0]))]
        if chance.random() < 0.25 and faults[0].expected.exit_code is None:
            await asyncio.sleep(chance.choice([0.0, 0.1, 1.0]))
            faults.append(choose_fault(chance, processes.descendants(), frozenset({"API server"})))
            work.append(asyncio.create_task(inflict(faults[1])))
        errors = faults[0].expected.errors | faults[-1].expected.errors
        exit_code = faults[0].expected.exit_code
        began = time.monotonic()
        await asyncio.gather(*work)
        await asyncio.sleep(0.3)  # until a loss is seen

        async def has_come_back() -> bool:
            return running.has_ended if exit_code is not None else await running.is_ready()

        in_time = await until(has_come_back, READY_S)
        seconds = time.monotonic() - began
        await load.end()
        self._num_signals += len(faults)
        kept = 2 * KEPT_DESCRIPTORS.get(name, 0) * self._num_signals  # a link may fail at a stop and again at its end
        found: dict[str, str] = {}
        if load.wrong:
            found["wrong"] = f"{len(load.wrong)} wrong answers, the first: {load.wrong[0]}"
        if load.outcomes["hung"]:
            found["hung"] = f"{load.outcomes['hung']} requests hang"
        lost = {
            error: count
            for error, count in load.outcomes.items()
            if error not in ("right", "left", "wrong", "hung") and error not in errors
        }
        if lost:
            found["lost"] = f"requests end with undocumented errors: {lost}"
        if not in_time:
            what = "end" if exit_code is not None else "serve again"
            found["late"] = f"the system does not {what}: {await running.get('/health')}"
        elif exit_code is not None:
            await self._check_end(number, running, exit_code)
        elif left := await settled(running, self._before, kept):
            found["leaked"] = "; ".join(left)
        row = self.rows.setdefault((name, faults[0].process.kind, faults[0].name), Counter())
        row.update(cases=1, signals=len(faults), right=load.outcomes["right"], left=load.outcomes["left"])
        row.update(errors=load.outcomes.total() - load.outcomes["right"] - load.outcomes["left"])
        row.update(dict.fromkeys(found, 1))
        what = ", then ".join(map(str, faults))
        print(f"{number:5} {name:26} {what}: {dict(load.outcomes)}, {seconds:.1f} s", flush=True)
        for kind, text in found.items():
            self._campaign.counts[kind] += 1
            self._campaign.fail(number, f"{name}, {what}: {kind}: {text}", running.log_tail(log_offset))

    async def _check_end(self, number: int, running: Service, expected: int) -> None:
        """Check that a system has ended as it should, and has left nothing."""
        code = running.process.returncode
        if code != expected:
            self._campaign.fail(number, f"the system ended with exit code {code}, not {expected}", running.log_tail())

        def is_gone() -> bool:
            processes.reap(running.process.pid)
            return not processes.descendants() and not any(running.folder.iterdir())

        if not await until(is_gone, IDLE_S):
            left = [process.title for process in processes.descendants()]
            files = [str(path.relative_to(running.folder)) for path in running.folder.rglob("*")]
            self._campaign.counts["leaked"] += 1
            self._campaign.fail(number, f"the ended system has left processes {left} and files {files}")


async def _rotate(running: Service, chance: random.Random) -> None:
    """Request another split. All of them need the same number of workers."""
    prefill = chance.choice([50, 60, 70, 80, 90])
    split = {"prefill_percentage": prefill, "decode_percentage": 100, "mixed": chance.random() < 0.2}
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with new_session() as session:
            await session.post(f"{running.url}/v1/semi_pd/allocation", json=split, headers=headers)


def run(campaign: Campaign, folder: Path) -> None:
    """Run all cases; the figures are rows of numbers, one for each mode, process and signal."""
    make_model(folder / "model")
    kills = Kills(campaign, folder / "model")
    names = ("mode", "process", "signal")
    try:
        event_loop.run(kills.run())
    finally:
        campaign.figures["rows"] = [dict(zip(names, key, strict=True)) | row for key, row in sorted(kills.rows.items())]
