"""KV tiers in the scheduler's core: a test plays the worker. Blocks have 16 tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pytest

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.messages.client import AbortRequest, AddRequest, OutputBatch, RequestOutput
from hbserve.messages.tiers import FindBlocks, FoundBlocks, LoadBlocks, StoreBlocks, TierCommand, TierInfo, TierResult
from hbserve.messages.worker import StepPlan, StepResult
from hbserve.scheduler.core_io import ConnectionBroke, FromClient, FromWorker, InboxEvent, Start
from hbserve.scheduler.scheduler import CpuScheduler
from tests.support.hellos import hello
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"
TIER = TierInfo(name="host", memory="m", num_slots=64)
TIMEOUT_S = 1.0
PROMPT = [*range(1, 71)]  # four full blocks


class System:
    """A unified instance with a pool of ``num_blocks``, whose worker does at once what it is told, except copies."""

    def __init__(
        self,
        num_blocks: int = 8,
        tier: TierInfo = TIER,
        timeout_s: float = TIMEOUT_S,
        other_tiers: Iterable[TierInfo] = (),
    ) -> None:
        config = PdDisaggConfig.from_arguments(str(DEMO), mode="unified", device="cpu").freeze()
        kv_cache = msgspec.structs.replace(config.kv_cache, timeout_s=timeout_s)
        performance = msgspec.structs.replace(config.performance, decode_headroom_tokens=0)
        config = msgspec.structs.replace(config, kv_cache=kv_cache, performance=performance)
        self.scheduler = CpuScheduler(config, {"unified-0": "tcp://worker:1"}, Start(now=50.0, time_ns=1000))
        self.now = 50.0
        self.tier, self._other_tiers = tier, other_tiers
        self.copies: list[TierCommand] = []
        self.lookups: list[FindBlocks] = []
        self.plans: list[StepPlan] = []
        self.outputs: list[RequestOutput] = []
        self.is_paused = self.stores_at_once = False
        self._withheld: list[FromWorker] = []
        self._num_blocks = num_blocks
        self._num_requests = 0
        self.epoch = 0
        self.begin()

    def begin(self) -> None:
        """The worker introduces itself, with new memory."""
        self.epoch += 1
        introduction = hello(
            num_blocks=self._num_blocks,
            epoch=self.epoch,
            arena_epoch=self.epoch,
            block_bytes=1 << 20,
            tiers=[self.tier, *self._other_tiers],
        )
        self.step(FromWorker(1, introduction))

    def step(self, *events: InboxEvent, seconds: float = 0.001) -> None:
        """Do a step and all that follow from it."""
        inbox = list(events)
        while True:
            self.now += seconds
            seconds = 0.001
            outbox = self.scheduler.step(self.now, inbox)
            self.outputs += [o for _, b in outbox.to_clients if isinstance(b, OutputBatch) for o in b.outputs]
            self.copies += [c for _, c in outbox.to_workers if isinstance(c, StoreBlocks | LoadBlocks)]
            self.lookups += [c for _, c in outbox.to_workers if isinstance(c, FindBlocks)]
            plans = [command for _, command in outbox.to_workers if isinstance(command, StepPlan)]
            self.plans += plans
            results = [FromWorker(1, result) for result in map(self._result, plans)]
            if self.is_paused:
                self._withheld += results
                results = []
            inbox = list(results)
            if self.stores_at_once:
                stores = [copy for copy in self.copies if isinstance(copy, StoreBlocks)]
                self.copies = [*self.loads()]
                inbox += [FromWorker(1, self._end_of(store)) for store in stores]
            self.scheduler._requests.tiers.check_consistency()
            if not inbox:
                return

    def go_on(self) -> None:
        """The worker reports what it has computed since it was paused."""
        self.is_paused = False
        withheld, self._withheld = self._withheld, []
        self.step(*withheld)

    def _result(self, plan: StepPlan) -> StepResult:
        tokens = [7 for row in plan.rows if row.sample]
        return StepResult(epoch=plan.epoch, step_id=plan.step_id, token_ids=tokens, logprobs=None, busy_s=0.01)

    def ask(self, prompt: list[int], **sampling: Any) -> str:
        self._num_requests += 1
        name = f"r{self._num_requests}"
        params = SamplingParams(temperature=0, **({"max_tokens": 2} | sampling))
        request = AddRequest(request_id=name, prompt_token_ids=prompt, end_token_ids=[], sampling=params)
        self.step(FromClient(b"c", request))
        return name

    def answer(self, copy: TierCommand, failures: dict[int, str] | None = None, seconds: float = 0.001) -> None:
        """The worker reports the end of a copy."""
        self.copies.remove(copy)
        self.step(FromWorker(1, self._end_of(copy, failures, seconds)))

    def _end_of(self, copy: TierCommand, failures: dict[int, str] | None = None, seconds: float = 0.001) -> TierResult:
        return TierResult(
            epoch=self.epoch,
            job_id=copy.job_id,
            failures=failures or {},
            error="bad" if failures else None,
            checksums=[] if isinstance(copy, LoadBlocks) else [[hash(key)] for key in copy.keys],
            num_bytes=len(copy.slots) << 20,
            seconds=seconds,
        )

    def answer_all(self) -> None:
        while self.copies:
            self.answer(self.copies[0])

    def loads(self) -> list[LoadBlocks]:
        return [copy for copy in self.copies if isinstance(copy, LoadBlocks)]

    def stored_and_evicted(self) -> None:
        """Have the prompt in the tier and not in the pool."""
        self.ask(PROMPT)
        self.answer_all()
        self.ask([*range(200, 320)])
        self.answer_all()
        self.plans.clear()
        self.outputs.clear()

    def prompt_rows(self) -> Iterator[tuple[int, int]]:
        """The first position and the number of tokens of every planned piece of a prompt."""
        return ((row.start, row.num_tokens) for plan in self.plans for row in plan.rows if row.num_tokens > 1)

    def cached_tokens(self) -> list[int]:
        return [output.num_cached_tokens for output in self.outputs if output.num_cached_tokens]

    @property
    def stats(self) -> dict[str, Any]:
        """What `get_system_stats` says of the tier."""
        return self.stats_of(self.tier.name)

    def stats_of(self, name: str) -> dict[str, Any]:
        tiers: dict[str, Any] = self.scheduler._stats.collect(False)["kv_tiers"][name]
        return tiers

    @property
    def num_free(self) -> int:
        return self.scheduler.instances["unified-0"].pool.num_free_blocks


def test_sealed_blocks_are_stored_once_and_held_until_they_are() -> None:
    system = System()
    system.ask(PROMPT)
    [store] = system.copies
    assert isinstance(store, StoreBlocks)
    assert (store.slots, len(set(store.keys))) == ([0, 1, 2, 3], 4)
    assert system.num_free == 8 - 4  # the request has ended
    system.answer(store)
    assert system.num_free == 8
    system.ask(PROMPT)
    assert not system.copies
    assert (system.stats["stored_blocks"], system.stats["stored_bytes"], system.stats["blocks"]) == (4, 4 << 20, 4)


def test_a_few_sealed_blocks_wait_for_others() -> None:
    system = System(num_blocks=100)
    system.is_paused = True
    system.ask([*range(1, 41)], max_tokens=100)
    withheld, system._withheld = system._withheld, []
    system.step(*withheld)
    assert not system.copies  # two blocks of 1 MiB
    system.step(seconds=system.scheduler._clock.next_call - system.now)
    [store] = system.copies
    assert len(store.keys) == 2


def test_a_prompt_that_was_evicted_is_loaded_and_only_its_tail_is_computed() -> None:
    system = System()
    system.stored_and_evicted()
    name = system.ask(PROMPT)
    [load] = system.loads()
    assert load.slots == [0, 1, 2, 3]
    assert load.checksums == [[hash(key)] for key in load.keys]
    assert not system.plans  # it waits for its load
    system.answer(load)
    assert [*system.prompt_rows()] == [(64, 6)]
    assert system.outputs[-1].request_id == name
    assert system.outputs[-1].finish_reason == "length"
    assert system.cached_tokens() == [64]
    assert system.stats["saved_prompt_tokens"] == 64
    assert system.scheduler._stats.collect(False)["cpu_scheduler"]["cached_prompt_tokens"] == 64


def test_a_block_that_is_not_sound_is_computed_with_all_after_it_and_forgotten() -> None:
    system = System()
    system.stored_and_evicted()
    system.ask(PROMPT)
    system.answer(system.loads()[0], {2: "checksum"})
    assert [*system.prompt_rows()] == [(32, 38)]
    assert system.cached_tokens() == [32]
    assert system.scheduler._events.counts["tier_failed"] == 1
    assert system.stats["failures"] == {"checksum": 1}
    [store] = system.copies  # what was computed again
    assert len(store.keys) == 1


def with_disk_and_store() -> System:
    """A system whose three tiers have the prompt."""
    disk = TierInfo(name="disk", memory="d", num_slots=64)
    store = TierInfo(name="store", memory="s", num_slots=64, by_name=True)
    system = System(other_tiers=[disk, store])
    for prompt in (PROMPT, [*range(200, 320)]):
        system.ask(prompt)
        while system.lookups or system.copies:
            while system.lookups:
                lookup = system.lookups.pop()
                system.step(FromWorker(1, FoundBlocks(epoch=1, lookup_id=lookup.lookup_id, num_found=0)))
            system.step(seconds=0.3)  # what goes to a store waits for more
            system.answer_all()
    system.plans.clear()
    system.outputs.clear()
    return system


@pytest.mark.parametrize("kind", ["checksum", "missing", "timeout", "backend"])
def test_what_a_tier_fails_to_bring_the_next_one_brings(kind: str) -> None:
    system = with_disk_and_store()
    system.ask(PROMPT)
    [load] = system.loads()
    assert load.tier == "host"
    system.answer(load, {2: kind, 3: kind})
    [again] = system.loads()
    assert (again.tier, again.keys, again.block_ids) == ("disk", load.keys[2:], load.block_ids[2:])
    assert not system.plans
    system.answer(again, {1: kind})
    [last] = system.loads()
    assert (last.tier, last.keys, last.block_ids) == ("store", load.keys[3:], load.block_ids[3:])
    system.answer(last)
    assert [*system.prompt_rows()] == [(64, 6)]
    assert system.cached_tokens() == [64]
    assert [system.stats_of(name)["saved_prompt_tokens"] for name in ("host", "disk", "store")] == [32, 16, 16]
    assert system.scheduler._events.counts["tier_failed"] == 2
    system.answer_all()
    assert system.num_free == 8


def test_a_prompt_that_no_tier_brings_is_computed() -> None:
    system = with_disk_and_store()
    system.ask(PROMPT)
    for name in ("host", "disk", "store"):
        [load] = system.loads()
        assert load.tier == name
        system.answer(load, dict.fromkeys(range(4), "checksum"))
    assert [*system.prompt_rows()] == [(0, 70)]
    assert not system.cached_tokens()
    system.answer_all()
    assert system.num_free == 8


def test_what_a_tier_fails_to_bring_is_computed_where_that_is_sooner() -> None:
    system = with_disk_and_store()
    system.scheduler._requests.tiers._compute_s = lambda tokens, start: tokens * 1e-7 if start else 1.0
    system.ask(PROMPT)
    system.answer(system.loads()[0], {2: "checksum"})
    assert [*system.prompt_rows()] == [(32, 38)]


def test_a_request_that_loads_again_can_be_aborted() -> None:
    system = with_disk_and_store()
    name = system.ask(PROMPT)
    system.answer(system.loads()[0], {0: "backend"})
    [again] = system.loads()
    system.step(FromClient(b"c", AbortRequest(request_id=name)))
    assert system.num_free == 8 - 5
    system.answer(again)
    assert system.num_free == 8
    assert not system.plans


def test_a_late_load_is_computed_in_other_blocks_and_its_own_stay_pinned() -> None:
    system = System(num_blocks=16)
    system.stored_and_evicted()
    system.ask([*range(400, 640)])
    system.answer_all()
    system.plans.clear()
    system.ask(PROMPT)
    [load] = system.loads()
    system.step(seconds=2 * TIMEOUT_S + 0.1)
    assert [*system.prompt_rows()] == [(0, 70)]
    used = {block for plan in system.plans for state in plan.new_sequences for block in state.block_ids}
    assert not used & set(load.block_ids)
    assert system.outputs[-1].finish_reason == "length"
    assert system.num_free == 16 - 5
    system.copies = [*system.loads()]
    system.answer(load)  # which changes nothing any more
    assert system.num_free == 16
    assert system.stats["failures"] == {"late": 4}
    assert system.scheduler._events.counts["tier_failed"] == 1


def test_a_load_that_takes_much_longer_than_computing_is_given_up() -> None:
    system = System(timeout_s=30.0)
    system.stored_and_evicted()
    system.scheduler._requests.tiers._compute_s = lambda tokens, start: tokens / 128
    name = system.ask(PROMPT)
    assert system.loads()
    system.step(seconds=1.9)
    assert not system.plans
    system.step(seconds=0.2)
    assert not system.plans  # the late load still has its blocks, and the pool no others
    system.answer(system.loads()[0])
    system.step(seconds=0.2)
    assert [*system.prompt_rows()] == [(0, 70)]
    assert (system.outputs[-1].request_id, system.outputs[-1].finish_reason) == (name, "length")
    assert system.stats["failures"] == {"late": 4}


def test_a_tier_that_fails_is_left_alone_for_a_while() -> None:
    system = System()
    system.stored_and_evicted()
    system.ask(PROMPT)
    system.answer(system.loads()[0], dict.fromkeys(range(4), "backend"))
    assert [*system.prompt_rows()] == [(0, 70)]
    system.ask([*range(600, 700)])
    assert not system.copies
    system.step(seconds=11.0)
    system.ask([*range(700, 800)])
    assert len(system.copies) == 1


def test_a_request_that_is_aborted_while_it_loads_keeps_its_blocks_until_the_copy_has_ended() -> None:
    system = System()
    system.stored_and_evicted()
    name = system.ask(PROMPT)
    system.step(FromClient(b"c", AbortRequest(request_id=name)))
    assert system.num_free == 8 - 5
    system.answer(system.loads()[0])
    assert system.num_free == 8
    assert not system.plans


def test_what_a_lost_instance_had_computed_is_loaded() -> None:
    system = System()
    system.ask(PROMPT)
    system.answer_all()
    system.step(ConnectionBroke(1))
    system.begin()
    system.plans.clear()
    system.ask(PROMPT)
    system.answer(system.loads()[0])
    assert [*system.prompt_rows()] == [(64, 6)]


def test_cached_tokens_are_those_of_the_attempt_that_is_answered() -> None:
    system = System()
    system.stored_and_evicted()
    before = system.scheduler._stats.collect(False)["cpu_scheduler"]["cached_prompt_tokens"]
    system.is_paused = True
    system.ask(PROMPT)
    system.answer(system.loads()[0])
    system.step(ConnectionBroke(1))  # before the first token
    system._withheld.clear()
    system.is_paused = False
    system.begin()
    system.step(seconds=1.0)
    system.answer(system.loads()[0], {3: "checksum"})
    assert system.cached_tokens() == [48]
    assert system.scheduler._stats.collect(False)["cpu_scheduler"]["cached_prompt_tokens"] == before + 64


def test_what_a_preempted_request_had_computed_is_loaded() -> None:
    system = System(num_blocks=9)
    system.scheduler._requests.tiers._compute_s = lambda tokens, start: math.inf
    system.is_paused = system.stores_at_once = True
    system.ask([*range(1, 41)], max_tokens=72)
    system.ask([*range(101, 141)], max_tokens=72)
    system.go_on()
    while system.copies:
        system.answer_all()
    stats = system.scheduler._stats.collect(False)["cpu_scheduler"]
    assert stats["preemptions"] == 1
    assert [output.finish_reason for output in system.outputs if output.finish_reason] == ["length"] * 2
    assert system.stats["loaded_blocks"] > 0
    first, second, again = system.prompt_rows()
    assert (first, second) == ((0, 40), (0, 40))
    assert 40 < again[0] + again[1] < 112
    assert again[1] <= 16  # what was sealed is not computed again
    assert system.num_free == 9


def test_copies_of_a_lost_instance_leave_nothing_behind() -> None:
    system = System()
    system.stored_and_evicted()
    system.ask([*range(800, 830)])  # stores
    system.ask(PROMPT)  # loads
    assert {type(copy) for copy in system.copies} == {StoreBlocks, LoadBlocks}
    system.copies.clear()
    system.step(ConnectionBroke(1))
    system.begin()
    system.step(seconds=0.5)
    system.answer_all()
    assert system.num_free == 8
    assert system.stats["failures"]["lost"] >= 4
    assert system.outputs[-1].finish_reason == "length"


def test_prompts_with_another_salt_or_other_tokens_before_share_nothing() -> None:
    system = System()
    system.stored_and_evicted()
    system.ask(PROMPT, cache_salt="a")
    assert not system.loads()
    system.answer_all()
    system.ask([9, *PROMPT[1:]])
    assert not system.loads()


def test_a_prompt_begins_to_be_computed_while_its_end_is_loaded() -> None:
    prompts_s: dict[float, float] = {16: 0.02, 32: 0.04, 48: 0.06, 64: 0.08}
    for computes_first, failures in ((True, {}), (False, {}), (True, {2: "checksum"}), (False, {0: "checksum"})):
        system = System()
        system.stored_and_evicted()

        def compute_s(tokens: float, start: float) -> float:
            return prompts_s.get(tokens, 0.0)

        system.scheduler._requests.tiers._compute_s = compute_s
        system.ask(PROMPT)
        system.answer(system.loads()[0], seconds=0.08)  # as long as computing
        system.ask([*range(200, 320)])
        system.answer_all()
        system.plans.clear()
        system.outputs.clear()
        system.is_paused = not computes_first
        system.ask(PROMPT)
        [load] = system.loads()
        assert load.slots == [2, 3]
        assert [*system.prompt_rows()] == [(0, 32)]
        end = 32 + 16 * min(failures, default=2)
        system.answer(load, failures)
        if not computes_first:
            assert [*system.prompt_rows()] == [(0, 32)]  # what comes next needs what is before the load
            system.go_on()
        assert [*system.prompt_rows()] == [(0, 32), (end, 70 - end)]
        assert system.outputs[-1].finish_reason == "length"
        assert sum(system.cached_tokens()) == end - 32
        system.answer_all()
        assert system.num_free == 8


def test_a_prompt_is_computed_where_that_is_sooner_until_the_tier_is_tried_again() -> None:
    system = System()
    system.stored_and_evicted()
    system.ask(PROMPT)
    system.answer(system.loads()[0], seconds=60.0)  # slow
    system.ask([*range(200, 320)])
    assert not system.loads()
    for _ in range(400):
        if system.loads():
            break
        system.answer_all()
        system.ask(PROMPT)
        system.answer_all() if not system.loads() else None
        system.ask([*range(200, 320)])
    assert system.loads()


def test_blocks_that_wait_for_a_tier_that_fails_are_let_go() -> None:
    system = System(num_blocks=64)
    for number in range(4):  # two jobs at a time
        system.ask([*range(100 * number, 100 * number + 70)])
    assert len(system.copies) == 2
    assert system.num_free < 64
    system.answer(system.copies[0], dict.fromkeys(range(len(system.copies[0].slots)), "backend"))
    system.answer(system.copies[0])
    assert not system.copies
    assert system.num_free == 64


def test_blocks_that_wait_for_a_slow_tier_make_room_for_requests() -> None:
    system = System(num_blocks=32)
    for number in range(4):
        system.ask([*range(100 * number, 100 * number + 70)])
    assert len(system.copies) == 2  # with four blocks each; eight more wait
    assert system.num_free == 32 - 8
    system.ask([*range(400, 776)])  # which needs all the others
    assert system.outputs[-1].finish_reason == "length"
    while system.copies:
        system.answer_all()
    assert (system.stats["stored_blocks"], system.stats["skipped_blocks"]) == (8 + 23, 8)
    assert system.num_free == 32
