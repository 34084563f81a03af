"""KV tiers with real processes: the same tokens as without, whatever happens to the memory, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model

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


def tier(llm: LLM) -> dict[str, Any]:
    found: dict[str, Any] = llm.get_system_stats()["kv_tiers"]["host"]
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


def ask_one_by_one(llm: LLM, cases: list[Case]) -> None:
    for prompt, answer in cases:
        [output] = llm.generate([prompt], [GREEDY], use_tqdm=False)
        assert output["token_ids"] == answer


@pytest.mark.parametrize("mode", ["unified", "disaggregated", "semi_pd"])
def test_answers_are_those_of_a_system_without_tiers(model: tuple[str, list[Case]], mode: str) -> None:
    check_answers(*model, mode=mode)


def test_a_restarted_system_loads_from_the_disk(model: tuple[str, list[Case]], tmp_path: Path) -> None:
    folder, cases = model
    settings = SETTINGS | {"num_blocks": 200, "host_bytes": 0, "disk": {"path": str(tmp_path), "bytes": 4 << 20}}
    with LLM(folder, mode="unified", **settings) as llm:
        ask_one_by_one(llm, cases)
        wait_for(lambda: llm.get_system_stats()["kv_tiers"]["disk"]["stored_blocks"] >= 5 * 9)
    [file] = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    for place in range(500_000, 1_300_000, 1024):  # the later half of the blocks
        data[place] ^= 1
    file.write_bytes(data)
    with LLM(folder, mode="unified", **settings) as llm:
        ask_one_by_one(llm, cases)
        disk = llm.get_system_stats()["kv_tiers"]["disk"]
        assert disk["loaded_blocks"] > 0
        assert disk["failures"]["checksum"] > 0
        assert_no_leaks(llm)


def check_answers(folder: str, cases: list[Case], **settings: Any) -> None:
    """Ask a system whose blocks are evicted, preempted, damaged and lost."""
    with LLM(folder, **(SETTINGS | settings)) as llm:
        ask_one_by_one(llm, cases)  # each evicts those before it
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
        wrong = tier(llm)["failures"]["checksum"]
        assert wrong > 0
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
        assert tier(llm)["failures"]["checksum"] == wrong
        assert_no_leaks(llm)
    assert not [*host_memory()]
