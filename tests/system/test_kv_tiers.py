"""KV tiers with real processes: the same tokens as without, whatever happens to the memory, and nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from hbserve import LLM, SamplingParams
from hbserve.config import StoreTierConfig
from hbserve.kv_tiers.base import BlockName, KVTierContext
from hbserve.kv_tiers.mooncake import MooncakeTier
from tests.support.engines import HAS_MOONCAKE, assert_no_leaks, greedy_reference, needs_mooncake, random_prompt
from tests.support.model_zoo import save_model
from tests.support.store_process import StoreProcess, running_store

DEADLINE_S = 60.0
NUM_TOKENS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "block_size": 16,
    "num_blocks": 24,
    "max_model_len": 320,
    "max_num_seqs": 8,
    "chunk_size": 64,
    "log_level": "ERROR",
    "host_bytes": 4 << 20,
    "scheduler": "tests.support.always_loads:AlwaysLoads",
}


Case = tuple[list[int], list[int]]
"""A prompt and its answer."""


def make_model(folder: Path) -> tuple[str, list[Case]]:
    """A model, and prompts with their answers; a pool holds two of them."""
    reference = save_model(folder, "qwen3")
    prompts = [random_prompt(150 + index, seed=index) for index in range(5)]
    return str(folder), [(prompt, greedy_reference(reference, prompt, NUM_TOKENS)) for prompt in prompts]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Case]]:
    return make_model(tmp_path_factory.mktemp("qwen3"))


class Filled(NamedTuple):
    """What a system that has ended leaves behind: it was asked all cases.

    ``disk``: ``kv_cache.disk``. ``store``: None without Mooncake.
    """

    disk: dict[str, Any]
    store: StoreProcess | None

    @property
    def store_settings(self) -> dict[str, Any]:
        """The store's part of a system's settings."""
        return {} if self.store is None else {"store": self.store.settings}


@pytest.fixture(scope="module")
def filled(model: tuple[str, list[Case]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    folder, cases = model
    disk = {"path": str(tmp_path_factory.mktemp("disk")), "bytes": 4 << 20}
    running = running_store(tmp_path_factory.mktemp("store")) if HAS_MOONCAKE else nullcontext(None)
    with running as store:
        filled = Filled(disk, store)
        settings = SETTINGS | {"num_blocks": 200, "host_bytes": 0, "disk": disk} | filled.store_settings
        with LLM(folder, mode="unified", **settings) as llm:
            ask_one_by_one(llm, cases)
            tiers = llm.get_system_stats()["kv_tiers"]
            wait_for(lambda: all(tier(llm, name)["stored_blocks"] >= 5 * 9 for name in tiers))
        yield filled


def tier(llm: LLM, name: str = "host") -> dict[str, Any]:
    found: dict[str, Any] = llm.get_system_stats()["kv_tiers"][name]
    return found


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def host_memory() -> Iterator[int]:
    """Descriptors of the memory that this process, the launcher, owns for its instances."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if "hbserve-kv-host" in os.readlink(entry):
                yield int(entry.name)
        except FileNotFoundError:
            continue


def flip_bytes() -> None:
    """Change one byte in every block of the host's memory."""
    [descriptor] = host_memory()
    for offset in range(0, os.fstat(descriptor).st_size, 512):
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, offset)[0] ^ 16]), offset)


def ask_one_by_one(llm: LLM, cases: list[Case], salt: str | None = None) -> None:
    """Ask, and compare the answers; under another salt no tier has anything."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, cache_salt=salt)
    for prompt, answer in cases:
        [output] = llm.generate([prompt], [sampling], use_tqdm=False)
        assert output["token_ids"] == answer


@pytest.mark.parametrize("mode", ["unified", "disaggregated", "semi_pd"])
def test_answers_are_those_of_a_system_without_tiers(model: tuple[str, list[Case]], filled: Filled, mode: str) -> None:
    check_answers(*model, mode=mode, **filled.store_settings)


def test_a_restarted_system_loads_from_the_disk_and_trusts_neither_it_nor_a_store_of_its_own(
    model: tuple[str, list[Case]], filled: Filled
) -> None:
    folder, cases = model
    [file] = Path(filled.disk["path"]).iterdir()
    data = bytearray(file.read_bytes())
    for place in range(500_000, 1_300_000, 1024):  # the later half of the blocks
        data[place] ^= 1
    file.write_bytes(data)
    wrong = {"backend": "tests.support.own_tiers:WrongTier", "bytes": 4 << 20}
    settings = SETTINGS | {"num_blocks": 200, "host_bytes": 0, "disk": filled.disk, "store": wrong}
    with LLM(folder, mode="unified", **settings) as llm:
        ask_one_by_one(llm, cases)
        assert tier(llm, "disk")["loaded_blocks"] > 0
        assert tier(llm, "disk")["failures"]["checksum"] > 0
        for salt in "abcdef":
            ask_one_by_one(llm, cases[:1], salt)
            time.sleep(0.25)  # it has rested
        failures = tier(llm, "store")["failures"]
        assert failures.keys() >= {"checksum", "backend", "lookup"}
        assert tier(llm, "store")["saved_prompt_tokens"] == 0
        assert llm.get_system_stats()["events"]["tier_failed"] >= 3
        assert_no_leaks(llm)


@needs_mooncake
def test_a_store_that_is_damaged_stopped_and_killed_changes_no_answer(
    model: tuple[str, list[Case]], filled: Filled
) -> None:
    folder, cases = model
    store = filled.store
    assert store is not None
    settings = SETTINGS | {"host_bytes": 0, "store": store.settings}
    with LLM(folder, mode="unified", **settings) as llm:
        ask_one_by_one(llm, cases)
        loaded = tier(llm, "store")["loaded_blocks"]
        assert loaded >= 15
        assert store.flip_bytes() > 100
        ask_one_by_one(llm, cases)
        assert tier(llm, "store")["failures"]["checksum"] > 0
        ask_one_by_one(llm, cases)  # wrong values were removed, and right ones stored
        assert tier(llm, "store")["loaded_blocks"] > loaded

        # The memory's process ends while blocks are copied to and from it.
        memory = store.pid_of("mooncake_client")
        store.signal("mooncake_client", signal.SIGSTOP)
        killer = threading.Timer(0.5, store.signal, ("mooncake_client", signal.SIGKILL))
        killer.start()
        ask_one_by_one(llm, cases)
        ask_one_by_one(llm, cases[:2], "a")
        killer.join()
        store.wait_restarted("mooncake_client", memory)

        # The master does not answer, and ends.
        master, lookups = store.pid_of("mooncake_master"), tier(llm, "store")["failures"].get("lookup", 0)
        store.signal("mooncake_master", signal.SIGSTOP)

        def is_late() -> bool:
            ask_one_by_one(llm, cases[:1], str(time.monotonic()))
            return bool(tier(llm, "store")["failures"].get("lookup", 0) > lookups)

        wait_for(is_late)
        store.signal("mooncake_master", signal.SIGKILL)
        store.wait_restarted("mooncake_master", master)

        # The same system uses the new store.
        def is_stored_again() -> bool:
            stored = tier(llm, "store")["stored_blocks"]
            ask_one_by_one(llm, cases[:1], str(time.monotonic()))
            return bool(tier(llm, "store")["stored_blocks"] > stored)

        wait_for(is_stored_again)
        assert_no_leaks(llm)


@needs_mooncake
def test_a_store_evicts_and_says_what_is_missing(filled: Filled) -> None:
    config = StoreTierConfig(**filled.store_settings["store"])
    store = MooncakeTier(KVTierContext(config, 1 << 20, 5.0))
    values = torch.randint(0, 256, (8, 1 << 20), dtype=torch.uint8)
    found = torch.zeros_like(values)
    store.register(values)
    store.register(found)
    names = [BlockName(f"evicts-{number}") for number in range(48)]  # three times what fits
    for first in range(0, len(names), 8):
        assert set(store.put(names[first : first + 8], values).values()) <= {"full"}
    assert store.put(names[-1:], values[7:]) in ({}, {0: "full"})
    assert not store.contains([BlockName("other")])[0]
    gone = 0
    for first in range(0, len(names), 8):
        failures = store.get(names[first : first + 8], found)
        assert set(failures.values()) <= {"missing"}
        gone += len(failures)
        there = [place for place in range(8) if place not in failures]
        assert torch.equal(found[there], values[there])
    assert 32 <= gone < 48
    store.remove(names)
    assert not any(store.contains(names))


def check_answers(folder: str, cases: list[Case], expects_stored: bool = True, **settings: Any) -> None:
    """Ask a system whose blocks are evicted, preempted, damaged and lost.

    Args:
        expects_stored: another system has left the blocks in the store, if there is one.
    """
    with LLM(folder, **(SETTINGS | settings)) as llm:
        ask_one_by_one(llm, cases)  # each evicts those before it
        if "store" in settings and expects_stored:
            assert tier(llm, "store")["loaded_blocks"] >= 15  # another system has stored them
            assert tier(llm, "store")["failures"].keys() <= {"lookup"}  # late on a busy machine
        ask_one_by_one(llm, cases)
        loaded = tier(llm)["loaded_blocks"]
        assert loaded >= 15
        assert llm.get_system_stats()["cpu_scheduler"]["cached_prompt_tokens"] >= loaded * 16
        # All at once: some wait, some are preempted, some load while others compute.
        outputs = llm.generate([prompt for prompt, _ in cases] * 2, GREEDY, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [answer for _, answer in cases] * 2
        wait_for(lambda: tier(llm)["blocks"] == tier(llm)["stored_blocks"] - tier(llm)["evicted_blocks"])
        flip_bytes()
        ask_one_by_one(llm, cases)
        assert tier(llm)["failures"]["checksum"] > 0
        assert llm.get_system_stats()["events"]["tier_failed"] > 0
        assert_no_leaks(llm)
        # The memory of the device is lost. That of the host is not.
        before = tier(llm)["loaded_blocks"]
        instances = llm.get_system_stats()["gpu_instances"]
        for name, instance in instances.items():
            supervisor = llm.supervisors.get(name)
            holder = supervisor.get_status()["resident_manager"]["resident_process"] if supervisor else instance
            os.kill(holder["pid"], signal.SIGKILL)
        ask_one_by_one(llm, cases)
        assert tier(llm)["loaded_blocks"] > before
        assert_no_leaks(llm)
    assert not [*host_memory()]
