"""Random faults under load, from a seed: instances that die, stop and come back at any stage of a transfer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from typing import Any

import msgspec
import pytest

from hbserve import DisaggregatedLLM, PdDisaggConfig, SamplingParams
from tests.support.engines import assert_no_leaks, greedy_reference, needs_mooncake, random_prompt
from tests.support.model_zoo import save_model

DEADLINE_S = 60.0
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ROLES = ["prefill", "prefill", "decode", "decode"]
INSTANCES = [
    {"instance_id": f"{role}-{n % 2}", "instance_type": role, "num_threads": 1} for n, role in enumerate(ROLES)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("glm4")
    return str(folder), save_model(folder, "glm4")


@pytest.fixture(scope="module")
def references(model: tuple[str, Any]) -> list[tuple[list[int], list[int]]]:
    prompts = [random_prompt(25 + 19 * index, seed=index) for index in range(10)]
    return [(prompt, greedy_reference(model[1], prompt, NUM_TOKENS)) for prompt in prompts]


def system(model_path: str, backend: str, heartbeat_timeout_s: float) -> DisaggregatedLLM:
    sizes = {
        "shm": {"prefill-1": 2},  # one whose blocks are sorted where they arrive
        "mooncake": {"decode-1": 2},  # one for which they are put together before they leave
    }.get(backend, {})
    flat = PdDisaggConfig.from_arguments(
        model_path,
        device="cpu",
        dtype="float32",
        num_blocks=256,
        max_model_len=320,
        chunk_size=112,  # so that there are transfers of one chunk, of several, and of groups of layers
        enable_prefix_caching=False,  # or what has been sent once is not sent again
        gpu_instances=[each | {"tensor_parallel_size": sizes.get(str(each["instance_id"]), 1)} for each in INSTANCES],
        kv_transfer_backend=backend,
        kv_layer_group_bytes=1 << 12,
        kv_timeout_s=5.0,
        heartbeat_timeout_s=heartbeat_timeout_s,
        log_level="ERROR",
    )
    config = flat.freeze()
    replace = msgspec.structs.replace
    rpc = replace(config.rpc, heartbeat_interval_s=0.1, max_restarts=1000)
    return DisaggregatedLLM(replace(config, rpc=rpc, kv_transfer=replace(config.kv_transfer, max_attempts=100)))


class Load:
    """Requests that never cease, each compared with its reference as soon as it is done."""

    def __init__(self, llm: DisaggregatedLLM, references: list[tuple[list[int], list[int]]], chance: random.Random):
        self._llm, self._references, self._chance = llm, references, chance
        self.num_done = 0

    async def run(self) -> None:
        while True:
            prompt, expected = self._chance.choice(self._references)
            async with asyncio.timeout(DEADLINE_S):
                (output,) = await self._llm.generate(prompt, GREEDY)
            assert output["token_ids"] == expected
            self.num_done += 1


async def injure(llm: DisaggregatedLLM, chance: random.Random, heartbeat_timeout_s: float) -> None:
    """One schedule: at a random stage of the transfers, something happens to an instance, or to two at a time."""
    stats = await llm.client.stats()
    ready = [name for name, each in stats["gpu_instances"].items() if each["status"] == "ready"]
    wanted = sum(link["transfers"] for link in stats["kv_transfer"]["links"].values()) + chance.randrange(6)
    with contextlib.suppress(TimeoutError):  # all of one role may be away just now
        async with asyncio.timeout(0.5):
            while sum(link["transfers"] for link in stats["kv_transfer"]["links"].values()) < wanted:
                await asyncio.sleep(0.002)
                stats = await llm.client.stats()
    await asyncio.sleep(chance.uniform(0, 0.01))  # somewhere within a step, a write, a message
    for name in chance.sample(ready, min(len(ready), chance.choice([1, 1, 1, 2]))):
        pid = int(stats["gpu_instances"][name].get("pid", 0))
        with contextlib.suppress(ProcessLookupError):
            if pid and chance.random() < 0.1:
                os.kill(pid, signal.SIGKILL)
            elif pid:
                os.kill(pid, signal.SIGSTOP)
                length_s = chance.choice([0.02, 0.1, 0.3, 1.4 * heartbeat_timeout_s])
                if chance.random() < 0.05:
                    os.kill(pid, signal.SIGKILL)
                asyncio.get_running_loop().call_later(length_s, _go_on, pid)


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("backend", "num_schedules", "heartbeat_timeout_s"),
    [("nccl", 15, 0.7), ("shm", 25, 0.7), pytest.param("mooncake", 10, 2.5, marks=needs_mooncake)],
    ids=["nccl", "shm", "mooncake"],
)
async def test_random_faults_cost_no_request_no_block_and_no_link(
    model: tuple[str, Any],
    references: list[tuple[list[int], list[int]]],
    backend: str,
    num_schedules: int,
    heartbeat_timeout_s: float,
) -> None:
    chance = random.Random(f"{backend} 1")
    async with system(model[0], backend, heartbeat_timeout_s) as llm:
        load = Load(llm, references, chance)
        workers = [asyncio.create_task(load.run()) for _ in range(4)]
        try:
            for _ in range(num_schedules):
                await injure(llm, chance, heartbeat_timeout_s)
                for worker in workers:
                    if worker.done():
                        worker.result()  # raises
            aimed_at = load.num_done + 10
            async with asyncio.timeout(DEADLINE_S):
                while load.num_done < aimed_at:
                    done, _ = await asyncio.wait(workers, timeout=0.05)
                    for worker in done:
                        worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        await asyncio.to_thread(assert_no_leaks, llm, DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S):  # who was lost last may still be starting; each link heals in time
            while [link["open"] for link in llm.get_system_stats()["kv_transfer"]["links"].values()] != [True] * 4:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        outputs = await asyncio.wait_for(llm.generate([prompt for prompt, _ in references], GREEDY), DEADLINE_S)
        assert [output["token_ids"] for output in outputs] == [tokens for _, tokens in references]
        await asyncio.to_thread(assert_no_leaks, llm)
