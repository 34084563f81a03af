"""Instances of several ranks: the same tokens as one rank gives, and one death for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hbserve import LLM, DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.engine.process_group import join_group
from hbserve.errors import ConfigError, StartupError
from hbserve.platform import make_platform
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager, SMAllocation
from tests.support.engines import assert_no_leaks, greedy_reference, needs_mooncake, random_prompt
from tests.support.model_zoo import save_head, save_model
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_language as language  # noqa: E402

DEADLINE_S = 90.0
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 256,
    "num_blocks": 160,
    "chunk_size": 48,
    "log_level": "ERROR",
}
SEEDED = [
    SamplingParams(temperature=0.9, seed=11, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.9, seed=12, max_tokens=12, ignore_eos=True),
    SamplingParams(
        temperature=0.7,
        min_p=0.02,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        seed=13,
        max_tokens=12,
        ignore_eos=True,
    ),
    SamplingParams(temperature=0, logprobs=3, max_tokens=12, ignore_eos=True),
]
SEEDED_PROMPTS = [random_prompt(length, seed=length) for length in (3, 40, 100, 50)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """One KV head, which two ranks both hold; embeddings tied."""
    folder = tmp_path_factory.mktemp("qwen3")
    return str(folder), save_model(folder, "qwen3", num_key_value_heads=1)


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """Two KV heads, one for each rank; norms over the heads of all ranks; embeddings not tied."""
    folder = tmp_path_factory.mktemp("olmo2")
    return str(folder), save_model(folder, "olmo2")


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A mixture of experts, and one expert that computes every token."""
    folder = tmp_path_factory.mktemp("qwen2_moe")
    return str(folder), save_model(folder, "qwen2_moe")


@pytest.fixture(scope="module")
def of_one_rank(model: tuple[str, Any]) -> list[Any]:
    """What an instance of one rank makes of the seeded requests."""
    with LLM(model[0], mode="unified", **SETTINGS) as llm:
        return llm.generate(SEEDED_PROMPTS, SEEDED, use_tqdm=False)


@pytest.fixture(scope="module", params=["unified", "disaggregated"])
def llm(
    request: pytest.FixtureRequest, model: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """Systems of two ranks per instance; nothing may be left behind in them."""
    settings = SETTINGS | {"kv_transfer_backend": "tests.support.faulty_transfers:FailsOnceOnRank1"}
    settings |= {"scheduler": "tests.support.eager_drafts:EagerDrafts"}
    drafting = {"speculation_method": "draft_model", "speculation_model": model[0]}
    if request.param == "unified":
        head = tmp_path_factory.mktemp("head")
        save_head(head)
        drafting = {"speculation_method": "eagle3", "speculation_model": str(head)}
    with LLM(model[0], mode=request.param, tensor_parallel_size=2, **settings, **drafting) as running:
        yield running
        drafts = running.get_system_stats()["cpu_scheduler"]["speculation"]
        assert request.param == "unified" or drafts["draft_model"]["accepted_tokens"] > 0
        assert_no_leaks(running)


def test_greedy_equals_transformers_and_so_it_does_from_the_prefix_cache(llm: LLM, model: tuple[str, Any]) -> None:
    lengths = [1, 15, 16, 17, 33, 100, 180]
    prompts = [random_prompt(length, seed=length) for length in lengths]
    expected = [greedy_reference(model[1], prompt, NUM_TOKENS) for prompt in prompts]
    first = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in first] == expected
    again = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in again] == expected
    assert [output["num_cached_tokens"] for output in again] == [(length - 1) // 16 * 16 for length in lengths]


def test_seeded_sampling_equals_that_of_one_rank(llm: LLM, of_one_rank: list[Any]) -> None:
    outputs = llm.generate(SEEDED_PROMPTS, SEEDED, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [output["token_ids"] for output in of_one_rank]
    for ours, theirs in zip(outputs[-1]["logprobs"] or [], of_one_rank[-1]["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_transfers_count_the_bytes_of_all_ranks(llm: LLM) -> None:
    stats = llm.get_system_stats()
    for instance in stats["gpu_instances"].values():
        # 3 layers, keys and values, 16 tokens, one head of 32 floats on each of two ranks; a head has one layer more
        num_layers = 4 if instance["role"] == "unified" else 3
        assert instance["kv_blocks"]["block_bytes"] == num_layers * 2 * 16 * 32 * 4 * 2
    before = sum(link["bytes"] for link in stats["kv_transfer"]["links"].values())
    llm.generate(random_prompt(40, seed=77), GREEDY, use_tqdm=False)
    stats = llm.get_system_stats()
    after = sum(link["bytes"] for link in stats["kv_transfer"]["links"].values())
    if "decode-0" in stats["gpu_instances"]:
        assert sum(stats["kv_transfer"]["links"]["prefill-0->decode-0"]["failures"].values()) >= 1
        assert after - before == 3 * stats["gpu_instances"]["decode-0"]["kv_blocks"]["block_bytes"]


@pytest.mark.parametrize(
    ("sizes", "backend"), [((2, 1), "shm"), pytest.param((1, 2), "mooncake", marks=needs_mooncake)], ids=["2-1", "1-2"]
)
def test_prefill_and_decode_may_have_different_numbers_of_ranks(
    expert_model: tuple[str, Any], sizes: tuple[int, int], backend: str
) -> None:
    """The two ranks have some experts each, the one rank has all."""
    instances = [
        {"instance_id": role, "instance_type": role, "num_threads": 1, "tensor_parallel_size": size}
        for role, size in zip(("prefill", "decode"), sizes, strict=True)
    ]
    prompts = [random_prompt(length, seed=length) for length in (1, 16, 17, 100, 180)]
    settings = SETTINGS | {"kv_transfer_backend": backend, "kv_verify": True, "gpu_instances": instances}
    settings |= {"kv_layer_group_bytes": 1 << 12, "expert_parallel": True}
    with LLM(expert_model[0], mode="disaggregated", **settings) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_no_leaks(llm)  # by then the senders have reported their last transfers
        (of_many,) = llm.get_system_stats()["kv_transfer"]["links"].values()
        prompts.append(random_prompt(90, seed=90))
        outputs += llm.generate(prompts[-1], GREEDY, use_tqdm=False)
        assert_no_leaks(llm)
        stats = llm.get_system_stats()
        (link,) = stats["kv_transfer"]["links"].values()
        # layer 1 is dense; a report is due after a second
        assert {*stats["gpu_instances"]["prefill"].get("expert_tokens", {"0": 0, "2": 0})} == {"0", "2"}
    assert [o["token_ids"] for o in outputs] == [greedy_reference(expert_model[1], p, NUM_TOKENS) for p in prompts]
    assert not link["failures"], "with checksums that hold"
    assert link["transfers"] == of_many["transfers"] + 1 + 3, "of a lone prompt the last chunk leaves layer by layer"


def test_preemption_changes_no_token(expert_model: tuple[str, Any]) -> None:
    prompts = [random_prompt(40 + index, seed=100 + index) for index in range(8)]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = [greedy_reference(expert_model[1], prompt, 40) for prompt in prompts]
    settings = SETTINGS | {"num_blocks": 20, "max_model_len": 128, "decode_headroom_tokens": 0, "expert_parallel": True}
    with LLM(expert_model[0], mode="unified", tensor_parallel_size=2, **settings) as llm:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        assert llm.get_system_stats()["cpu_scheduler"]["preemptions"] > 0
        assert_no_leaks(llm)
    assert [output["token_ids"] for output in outputs] == expected


# --- one death for all ---------------------------------------------------------------------------


@asynccontextmanager
async def system(model_path: str, **settings: Any) -> AsyncIterator[DisaggregatedLLM]:
    arguments = SETTINGS | {"mode": "unified", "tensor_parallel_size": 2, "kv_timeout_s": 10.0} | settings
    arguments["host_bytes"] = 16 << 20
    async with DisaggregatedLLM(PdDisaggConfig.from_arguments(model_path, **arguments)) as llm:
        yield llm


def pid_of(llm: DisaggregatedLLM, instance: str) -> int:
    return int(llm.get_system_stats()["gpu_instances"][instance]["pid"])


def other_ranks_of(pid: int) -> list[int]:
    """The processes in the group of rank 0."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid != int(entry.parent.name):
                found.append(int(entry.parent.name))
    return found


def title_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (its new parent may be slow to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def wait_for(what: Any, deadline_s: float = DEADLINE_S) -> None:
    """Poll until ``what()`` holds."""
    async with asyncio.timeout(deadline_s):
        while not what():  # noqa: ASYNC110, other processes set no events
            await asyncio.sleep(0.02)


async def test_a_rank_that_dies_under_load_costs_its_instance_and_no_request(untied_model: tuple[str, Any]) -> None:
    num_tokens = 60
    prompts = [random_prompt(20 + 20 * index, seed=index) for index in range(6)]
    expected = [greedy_reference(untied_model[1], prompt, num_tokens) for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    async with system(untied_model[0], mode="disaggregated") as llm:
        work = asyncio.create_task(llm.generate(prompts, sampling))
        for victim in ("decode-0", "prefill-0"):
            rank_0 = pid_of(llm, victim)
            (rank_1,) = other_ranks_of(rank_0)
            assert [title_of(pid) for pid in (rank_0, rank_1)] == [f"hbserve-{victim}-TP0", f"hbserve-{victim}-TP1"]
            await wait_for(lambda v=victim: llm.get_system_stats()["gpu_instances"][v]["steps"] >= 3)
            os.kill(rank_1, signal.SIGKILL)
            await wait_for(lambda pid=rank_0: not is_running(pid))
        outputs = await asyncio.wait_for(work, DEADLINE_S)
        assert [output["token_ids"] for output in outputs] == expected
        await asyncio.to_thread(assert_no_leaks, llm)
        stats = llm.get_system_stats()
        assert [instance["restarts"] for instance in stats["gpu_instances"].values()] == [1, 1]
        firsts = [pid_of(llm, name) for name in stats["gpu_instances"]]
        ranks = [*firsts, *(rank for first in firsts for rank in other_ranks_of(first))]
        assert len(ranks) == 4
    assert not any(is_running(pid) for pid in ranks)


async def test_workers_that_share_devices_rotate_and_are_replaced_with_all_their_ranks(
    model: tuple[str, Any], of_one_rank: list[Any]
) -> None:
    expected = [output["token_ids"] for output in of_one_rank]
    split = {"prefill_percentage": 50, "decode_percentage": 60, "ladder": {"prefill": [], "decode": []}}
    async with system(model[0], mode="semi_pd", num_sleepers=1, **split) as llm:
        manager = llm.supervisors["semi-0"]
        assert isinstance(manager, ProcessRotationManager)
        is_over = asyncio.Event()

        async def ask() -> int:
            """Over and over; how often."""
            rounds = 0
            while rounds == 0 or not is_over.is_set():
                outputs = await llm.generate(SEEDED_PROMPTS, SEEDED)
                assert [output["token_ids"] for output in outputs] == expected
                rounds += 1
            return rounds

        def pids() -> dict[str, list[int]]:
            return {worker["role"]: worker["rank_pids"] for worker in manager.get_status()["workers"]}

        first = pids()
        asking = asyncio.create_task(ask())
        manager.request_sm_reallocation(SMAllocation(50, 80))
        assert await asyncio.to_thread(manager.wait_until_settled, DEADLINE_S)
        second = pids()
        assert second["prefill"] == first["prefill"]
        assert len(set(second["decode"] + first["decode"])) == 4, "both ranks of the phase have changed"
        os.kill(second["decode"][1], signal.SIGKILL)
        await wait_for(lambda: manager.get_status()["statistics"]["replaced_workers"] == 1)
        assert await asyncio.to_thread(manager.wait_until_settled, DEADLINE_S)
        third = pids()
        assert third["prefill"] == first["prefill"]
        assert not set(third["decode"]) & set(second["decode"])
        is_over.set()
        assert await asyncio.wait_for(asking, DEADLINE_S) > 1
        status = manager.get_status()
        assert status["statistics"]["rotations"] == 1
        assert status["statistics"]["recoveries"] == 0
        residents = [rank["resident_process"]["pid"] for rank in status["resident_manager"]["ranks"]]
        assert len(set(residents)) == 2
        await asyncio.to_thread(assert_no_leaks, llm)
        everybody = {*residents}.union(*first.values(), *second.values(), *third.values())
        everybody |= {child for sleeper in status["sleepers"] for child in other_ranks_of(sleeper["pid"])}
    assert not any(is_running(pid) for pid in everybody)


async def test_a_rank_whose_step_fails_says_why_and_its_instance_starts_again(
    untied_model: tuple[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TEST_MARKER", str(tmp_path / "marker"))
    expected = greedy_reference(untied_model[1], [1, 2, 3], NUM_TOKENS)
    backend = "tests.support.faulty_transfers:BreaksOneStepOfRank1"
    async with system(untied_model[0], mode="disaggregated", kv_transfer_backend=backend, log_level="WARNING") as llm:
        outputs = await asyncio.wait_for(llm.generate([1, 2, 3], GREEDY), DEADLINE_S)
        assert outputs[0]["token_ids"] == expected
        assert sum(each["restarts"] for each in llm.get_system_stats()["gpu_instances"].values()) == 1
    assert "-0: a step failed: rank 1: RuntimeError('a wire is loose')" in capfd.readouterr().err


async def test_a_rank_that_cannot_begin_is_named_at_start(untied_model: tuple[str, Any]) -> None:
    backend = "tests.support.faulty_transfers:CannotStartOnRank1"
    with pytest.raises(StartupError, match="-0: rank 1: no wire is left"):
        async with system(untied_model[0], mode="disaggregated", kv_transfer_backend=backend):
            pass


async def test_no_rank_outlives_rank_0_however_it_ends(untied_model: tuple[str, Any]) -> None:
    async with system(untied_model[0]) as llm:
        for number in (signal.SIGKILL, signal.SIGTERM):
            await wait_for(lambda: llm.get_system_stats()["gpu_instances"]["unified-0"]["status"] == "ready")
            rank_0 = pid_of(llm, "unified-0")
            (rank_1,) = other_ranks_of(rank_0)
            os.kill(rank_1, signal.SIGTERM)  # is not for it: rank 0 decides
            assert len((await llm.generate([1, 2, 3], GREEDY))[0]["token_ids"]) == NUM_TOKENS
            os.kill(rank_0, number)
            await wait_for(lambda pids=(rank_0, rank_1): not any(is_running(pid) for pid in pids))
            await wait_for(lambda pid=rank_0: llm.get_system_stats()["gpu_instances"]["unified-0"].get("pid") != pid)


def test_what_cannot_be_shared_is_refused(tmp_path: Path, untied_model: tuple[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size: must be 1, 2, 4 or 8, got 3"):
        LLM(untied_model[0], tensor_parallel_size=3)
    save_model(tmp_path, "llama", intermediate_size=97)
    with pytest.raises(StartupError, match="intermediate_size 97 cannot be shared evenly by 2"):
        LLM(str(tmp_path), mode="unified", tensor_parallel_size=2, **SETTINGS)


def test_each_rank_has_a_transfer_port_of_its_own(untied_model: tuple[str, Any]) -> None:
    taken: dict[str, Any] = {"instance_id": "a", "instance_type": "prefill", "port": 7003}
    instances = [taken, {"instance_id": "b", "instance_type": "decode"}]
    flat = PdDisaggConfig(untied_model[0], tensor_parallel_size=2, kv_port=7000, gpu_instances=instances)
    with pytest.raises(ConfigError, match=r"kv_port: address 127.0.0.1:7003 is already taken"):
        flat.freeze()


@pytest.mark.parametrize("shape", [(5, 1), (3, 4)])
def test_what_ranks_gather_has_contiguous_rows_in_their_order(shape: tuple[int, int]) -> None:
    """Kernels read it as such; of one column of each rank torch would make a strided view."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    mine = [torch.randn(shape) for _ in range(2)]

    def gather(rank: int) -> torch.Tensor:
        platform = make_platform("cpu", 0, 1, 1, rank, 2)
        group = join_group(platform, rank, 2, port, listener.detach() if rank == 0 else None, 30)
        return group.gather(mine[rank])

    with ThreadPoolExecutor(2) as pool:
        for gathered in pool.map(gather, range(2), timeout=60):
            assert gathered.is_contiguous()
            assert torch.equal(gathered, torch.cat(mine, dim=1))


# --- on GPUs -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path) -> None:
    """In float32, where the sums of two ranks differ too little from those of one to change a token."""
    save_model(tmp_path, "qwen3")
    settings = SETTINGS | {"device": "cuda"}
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 100, 180)]
    with LLM(str(tmp_path), mode="unified", **settings) as one:
        expected = one.generate(prompts, GREEDY, use_tqdm=False)
        expected_seeded = one.generate(SEEDED_PROMPTS, SEEDED, use_tqdm=False)
    with LLM(str(tmp_path), mode="unified", tensor_parallel_size=2, **settings) as two:
        outputs = two.generate(prompts, GREEDY, use_tqdm=False)
        outputs_seeded = two.generate(SEEDED_PROMPTS, SEEDED, use_tqdm=False)
        assert_no_leaks(two)
    assert [output["token_ids"] for output in outputs] == [output["token_ids"] for output in expected]
    assert [o["token_ids"] for o in outputs_seeded] == [o["token_ids"] for o in expected_seeded]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_bfloat16_agree_with_one_on_the_first_logprobs(tmp_path: Path) -> None:
    """With the kernels and graphs that float32 does not have, and one KV head that both ranks hold."""
    save_model(tmp_path, "qwen3", head_dim=128, num_key_value_heads=1)
    settings = SETTINGS | {"device": "cuda", "dtype": "bfloat16", "mode": "unified"}
    sampling = SamplingParams(temperature=0, logprobs=20, max_tokens=1)
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 100, 180)]
    found = []
    for size in (1, 2):
        with LLM(str(tmp_path), tensor_parallel_size=size, **settings) as llm:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            found.append([(output["logprobs"] or [])[0] for output in outputs])
            assert len(llm.generate(prompts[1], GREEDY, use_tqdm=False)[0]["token_ids"]) == NUM_TOKENS
    for one, two in zip(*found, strict=True):
        common = one.keys() & two.keys()
        assert len(common) >= 15
        for token in common:
            assert one[token] == pytest.approx(two[token], abs=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_many_at_once_get_right_answers_from_two_gpus() -> None:
    """Captured decode steps of many rows, in which each rank proposes a token for every row."""
    rng = random.Random(5)
    questions = [language.recall_question(rng, rng.randint(3, 150)) for _ in range(100)]
    sampling = SamplingParams(temperature=0, max_tokens=64)
    with LLM(
        str(EXAMPLES / "models" / "hbserve-demo"),
        mode="unified",
        device="cuda",
        dtype="bfloat16",
        tensor_parallel_size=2,
    ) as llm:
        outputs = [output["text"] for output in llm.chat([q.messages for q in questions], sampling, use_tqdm=False)]
    assert sum(text == question.answer for text, question in zip(outputs, questions, strict=True)) >= 95


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_disaggregated_on_four_gpus(tmp_path: Path) -> None:
    reference = save_model(tmp_path, "qwen3")
    prompts = [random_prompt(length, seed=length) for length in (1, 17, 100, 180)]
    settings = SETTINGS | {"device": "cuda"}
    with LLM(str(tmp_path), mode="disaggregated", tensor_parallel_size=2, **settings) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_no_leaks(llm)
    assert [o["token_ids"] for o in outputs] == [greedy_reference(reference, p, NUM_TOKENS) for p in prompts]
