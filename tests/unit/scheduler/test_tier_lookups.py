"""Lookups of new prompts in a store, in the scheduler's core: a test plays the worker. Blocks have 16 tokens."""

from __future__ import annotations

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.kv_cache.block_contents import extend_block_hashes
from hbserve.messages.client import AbortRequest, AddRequest
from hbserve.messages.tiers import FindBlocks, FoundBlocks, TierInfo
from hbserve.scheduler.core_io import ConnectionBroke, FromClient, FromWorker, Start
from hbserve.scheduler.scheduler import CpuScheduler
from tests.support.hellos import hello
from tests.unit.scheduler.test_tiers import DEMO, PROMPT, TIMEOUT_S, System

STORE = TierInfo(name="store", memory="s", num_slots=64, by_name=True)


class StoreSystem(System):
    def __init__(self, num_blocks: int = 8) -> None:
        super().__init__(num_blocks, STORE)

    def found(self, lookup: FindBlocks, number: int, error: str | None = None) -> None:
        """The worker answers a lookup."""
        self.lookups.remove(lookup)
        self.step(
            FromWorker(1, FoundBlocks(epoch=self.epoch, lookup_id=lookup.lookup_id, num_found=number, error=error))
        )

    def num_open(self) -> int:
        return len(self.scheduler._requests._lookups)


def test_what_a_lookup_finds_is_loaded_and_the_rest_is_computed() -> None:
    system = StoreSystem()
    system.ask(PROMPT)
    [lookup] = system.lookups
    assert (lookup.tier, len(lookup.keys)) == ("store", 4)
    assert not system.plans
    assert not system.copies
    system.found(lookup, 3)
    [load] = system.loads()
    assert load.keys == lookup.keys[:3]
    assert load.checksums == [[], [], []]  # the store has them
    system.answer(load)
    assert [*system.prompt_rows()] == [(48, 22)]
    assert system.cached_tokens() == [48]
    assert system.stats["saved_prompt_tokens"] == 48
    [store] = system.copies
    assert store.keys == lookup.keys[3:]  # what is there is not stored again


def test_what_is_known_is_not_looked_up() -> None:
    system = StoreSystem()
    system.ask(PROMPT)
    system.found(system.lookups[0], 0)
    system.answer_all()
    system.ask(PROMPT)  # the pool has it
    system.ask([*PROMPT[:40], *range(300, 330)])  # of which the pool has two blocks
    [lookup] = system.lookups
    assert len(lookup.keys) == 2
    system.found(lookup, 0)
    system.answer_all()
    system.ask([*range(400, 520)])  # evicts
    system.found(system.lookups[0], 0)
    system.answer_all()
    system.ask(PROMPT)  # the directory has it
    assert not system.lookups
    assert len(system.loads()) == 1


def test_a_request_waits_for_its_lookup_no_longer_than_the_deadline_and_the_store_rests() -> None:
    system = StoreSystem()
    system.ask(PROMPT)
    system.step(seconds=0.9 * TIMEOUT_S)
    assert not system.plans
    system.step(seconds=0.2 * TIMEOUT_S)
    assert [*system.prompt_rows()] == [(0, 70)]
    assert system.num_open() == 0
    assert system.stats["failures"] == {"lookup": 1}
    assert system.scheduler._events.counts["tier_failed"] == 1
    system.found(system.lookups[0], 4)  # too late
    system.ask([*range(500, 600)])
    assert not system.lookups
    assert len(system.outputs) == 4
    system.step(seconds=11.0)
    system.ask([*range(600, 700)])
    assert len(system.lookups) == 1


def test_a_request_waits_for_its_lookup_no_longer_than_a_part_of_the_time_to_compute() -> None:
    system = StoreSystem()
    system.scheduler._requests.tiers._compute_s = lambda tokens, start: tokens / 640  # 0.1 s
    system.ask(PROMPT)
    system.step(seconds=0.02)
    assert not system.plans
    assert system.scheduler._clock.next_call < system.now + 0.01
    system.step(seconds=0.01)
    assert [*system.prompt_rows()] == [(0, 70)]
    system.ask([*range(400, 520)])  # evicts
    for lookup in list(system.lookups):
        system.found(lookup, 3 if len(lookup.keys) == 4 else 0)  # late, and of use all the same
    system.answer_all()
    assert not system.stats["failures"]
    system.ask(PROMPT)
    assert len(system.loads()) == 1


def test_a_lookup_that_fails_lets_its_request_go_at_once() -> None:
    system = StoreSystem(64)
    system.ask(PROMPT)
    system.ask([*range(300, 400)])
    for lookup in list(system.lookups):
        system.found(lookup, 0, "no such store")
    assert len(system.outputs) == 4
    assert system.scheduler._events.counts["tier_failed"] == 1  # once for both


def test_a_lookup_delays_no_other_request_and_ends_with_its_own() -> None:
    system = StoreSystem(64)
    name = system.ask(PROMPT)
    system.ask([1, 2, 3])  # has no full block
    assert len(system.outputs) == 2
    system.step(FromClient(b"c", AbortRequest(request_id=name)))
    system.found(system.lookups[0], 4)
    assert system.num_open() == 0
    assert not system.loads()
    system.ask(PROMPT)
    assert len(system.loads()) == 1


def test_a_store_that_has_failed_is_asked_again_for_what_it_was_known_to_hold() -> None:
    """It may have been started anew: a load of what it held would be in vain, and nothing would be stored again."""
    system = StoreSystem()
    system.ask(PROMPT)
    system.found(system.lookups[0], 0)
    system.answer_all()
    assert system.stats["blocks"] == 4
    system.ask([*range(400, 520)])  # evicts
    system.found(system.lookups[0], 0, "no such store")
    assert system.stats["blocks"] == 0
    system.step(seconds=11.0)
    system.ask(PROMPT)
    assert not system.loads()
    [lookup] = system.lookups
    assert len(lookup.keys) == 4
    system.found(lookup, 0)
    [store] = system.copies
    assert store.keys == lookup.keys


def test_the_loss_of_the_worker_ends_its_lookups() -> None:
    system = StoreSystem()
    system.ask(PROMPT)
    system.step(ConnectionBroke(1))
    assert system.num_open() == 0
    system.begin()
    assert [*system.prompt_rows()] == [(0, 70)]
    assert "lookup" not in system.stats["failures"]


def test_a_block_that_was_evicted_after_the_lookup_is_computed() -> None:
    system = StoreSystem()
    system.ask(PROMPT)
    system.found(system.lookups[0], 4)
    system.answer(system.loads()[0], {1: "missing"})
    assert [*system.prompt_rows()] == [(16, 54)]
    assert system.stats["failures"] == {"missing": 1}
    assert not system.scheduler._events.counts["tier_failed"]  # stores evict all the time
    [store] = system.copies
    assert len(store.keys) == 1


def test_a_store_gets_more_blocks_at_once_than_memory() -> None:
    system = StoreSystem(num_blocks=100)
    system.is_paused = True
    system.ask([*range(1, 41)], max_tokens=100)
    system.found(system.lookups[0], 0)
    withheld, system._withheld = system._withheld, []
    system.step(*withheld)
    system.step(seconds=0.1)
    assert not system.copies  # two blocks of 1 MiB
    system.step(seconds=0.1)
    [store] = system.copies
    assert len(store.keys) == 2


def test_what_instances_know_together_is_looked_up_where_none_knows_it_alone() -> None:
    """Two instances on two hosts: each host's memory has half of the prompt, and no instance reaches both."""
    instances = [{"instance_id": name, "instance_type": "unified"} for name in "ab"]
    config = PdDisaggConfig.from_arguments(str(DEMO), mode="unified", device="cpu", gpu_instances=instances).freeze()
    scheduler = CpuScheduler(config, {name: f"tcp://{name}:1" for name in "ab"}, Start(now=50.0, time_ns=1000))
    for connection, name in enumerate("ab", 1):
        host = TierInfo(name="host", memory=name, num_slots=8)
        arrival = hello(instance_id=name, epoch=connection, arena_epoch=connection, tiers=[host, STORE])
        scheduler.step(50.0, [FromWorker(connection, arrival)])
    keys: list[bytes] = []
    extend_block_hashes(keys, PROMPT, 16, None)
    tiers = scheduler._requests.tiers._tiers
    tiers["host", "a"].directory.add_found(keys[:2])
    tiers["host", "b"].directory.add_found(keys[2:4])

    def lookups(now: float, name: str) -> list[FindBlocks]:
        sampling = SamplingParams(temperature=0, max_tokens=2)
        request = AddRequest(request_id=name, prompt_token_ids=PROMPT, end_token_ids=[], sampling=sampling)
        outbox = scheduler.step(now, [FromClient(b"c", request)])
        return [command for _, command in outbox.to_workers if isinstance(command, FindBlocks)]

    [lookup] = lookups(50.1, "r")
    assert lookup.keys == keys[2:4]
    tiers["host", "a"].rest(50.2)
    [lookup] = lookups(50.3, "s")
    assert lookup.keys == keys[:4]
