"""The engine on a GPU through the public API: every backend answers right, with and without CUDA graphs."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from hbserve import LLM, DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.config import from_dict
from hbserve.engine.capture import Parts, capture_in_parts, capturing, run_through, run_to_capture
from hbserve.engine.model_runner import ModelRunner
from hbserve.messages.worker import TO_BE_DRAFTED
from hbserve.platform import make_platform
from tests.support.engines import assert_no_leaks, random_prompt
from tests.support.model_zoo import save_head
from tests.support.paths import ROOT
from tests.support.plan_driver import GREEDY as GREEDY_DRIVER
from tests.support.plan_driver import Driver, Sequence

DEMO = str(ROOT / "examples" / "models" / "hbserve-demo")
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language  # noqa: E402

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=64)
SETTINGS: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "num_blocks": 4096, "log_level": "WARNING"}
EAGER = {"scheduler": "tests.support.eager_drafts:EagerDrafts"}


def recall(count: int) -> list[language.Question]:
    rng = random.Random(7)
    return [language.recall_question(rng, rng.randint(3, 150)) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": "flashinfer"},
        {"attention_backend": "flashinfer", "cuda_graph_enabled": False},
        {"attention_backend": "flashinfer", "cuda_graph_max_seq_len": 100},
        {"attention_backend": "flashinfer", "chunk_size": 48},
        {"attention_backend": "flash_attn", "num_blocks": 512},
        {"attention_backend": "flash_attn", "num_blocks": 512, "cuda_graph_enabled": False},
        {"attention_backend": "sdpa"},
        {"attention_backend": "sdpa", "cuda_graph_enabled": False},
        {"mode": "disaggregated", "gpu_instances": "one card"},
        pytest.param(
            {"mode": "disaggregated", "chunk_size": 64},
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: KV goes by NCCL"),
            id="nccl",
        ),
    ],
    ids=str,
)
def test_recall_is_right_in_bf16(options: dict[str, Any]) -> None:
    if options.get("gpu_instances") == "one card":  # both processes use GPU 0, and KV goes through host memory
        instances = [{"instance_id": role, "instance_type": role, "gpu_id": 0} for role in ("prefill", "decode")]
        options = options | {"gpu_instances": instances}
    questions = recall(100)
    with LLM(DEMO, **({"mode": "unified"} | SETTINGS | options)) as llm:
        for _ in range(2):  # the second round comes from the prefix cache
            outputs = llm.chat([question.messages for question in questions], GREEDY, use_tqdm=False)
            right = sum(o["text"] == question.answer for o, question in zip(outputs, questions, strict=True))
            assert right >= 95
        assert_no_leaks(llm)


@pytest.mark.parametrize("backend", ["flashinfer", "flash_attn", "triton", "sdpa"])
def test_prompts_that_share_blocks_of_one_step_are_answered_right(backend: str) -> None:
    questions = [question for question in recall(25) for _ in range(4)]
    num_blocks = 512 if backend == "flash_attn" else 4096
    with LLM(DEMO, mode="unified", **(SETTINGS | {"attention_backend": backend, "num_blocks": num_blocks})) as llm:
        outputs = llm.chat([question.messages for question in questions], GREEDY, use_tqdm=False)
        right = sum(o["text"] == question.answer for o, question in zip(outputs, questions, strict=True))
        assert right >= 95
        assert_no_leaks(llm)
        if backend != "flash_attn":  # its blocks are longer than these prompts
            assert llm.get_system_stats()["cpu_scheduler"]["cached_prompt_tokens"] > 0


def test_seeded_sampling_is_the_same_with_and_without_graphs() -> None:
    questions = recall(40)
    sampling = [
        SamplingParams(temperature=0.8, seed=index, max_tokens=24, top_p=0.95 if index % 3 == 0 else 1.0)
        for index in range(40)
    ]
    tokens = []
    for enabled in (True, False):
        with LLM(DEMO, mode="unified", cuda_graph_enabled=enabled, **SETTINGS) as llm:
            outputs = llm.chat([question.messages for question in questions], sampling, use_tqdm=False)
            tokens.append([output["token_ids"] for output in outputs])
    # Eager and captured steps pad differently, so logits differ by rounding; the noise must be the same.
    same = sum(a == b for a, b in zip(*tokens, strict=True))
    assert same >= 38


@pytest.mark.parametrize("has_graphs", [True, False])
def test_predictions_change_no_token(has_graphs: bool) -> None:
    """Right and wrong guesses, in decode graphs and eagerly, greedy, sampled and with penalties."""
    questions = recall(40)
    sampling = [
        SamplingParams(
            temperature=0.8 * (index % 2),
            seed=index,
            max_tokens=24,
            top_p=0.95 if index % 3 == 0 else 1.0,
            frequency_penalty=0.3 if index % 4 == 0 else 0.0,
        )
        for index in range(40)
    ]
    rng = random.Random(1)
    with LLM(DEMO, mode="unified", cuda_graph_enabled=has_graphs, **EAGER, **SETTINGS) as llm:
        messages = [question.messages for question in questions]
        plain = llm.chat(messages, sampling, use_tqdm=False)
        predicted = [
            msgspec.structs.replace(s, prediction=[t if rng.random() < 0.7 else 5 for t in output["token_ids"]])
            for s, output in zip(sampling, plain, strict=True)
        ]
        for batch in (40, 4, 1):
            outputs = llm.chat(messages[:batch], predicted[:batch], use_tqdm=False)
            same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(outputs, plain, strict=False))
            assert same >= batch - 2
        drafts = llm.get_system_stats()["cpu_scheduler"]["speculation"]["prediction"]
        assert 0 < drafts["accepted_tokens"] < drafts["drafted_tokens"]
        assert_no_leaks(llm)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "disaggregated", "gpu_instances": "one card"},
        pytest.param(
            {"tensor_parallel_size": 2},
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
            id="two ranks",
        ),
    ],
    ids=str,
)
def test_answers_are_right_while_graphs_are_captured_and_after(
    options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The first batches run with few graphs; the others are captured between requests, none of which goes wrong."""
    if "gpu_instances" in options:
        instances = [{"instance_id": role, "instance_type": role, "gpu_id": 0} for role in ("prefill", "decode")]
        options = options | {"gpu_instances": instances}
    questions = recall(60)
    seen = ""

    def answers(llm: LLM, count: int) -> list[list[int]]:
        outputs = llm.chat([question.messages for question in questions[:count]], GREEDY, use_tqdm=False)
        right = sum(o["text"] == question.answer for o, question in zip(outputs, questions, strict=False))
        assert right >= 0.95 * count - 1
        return [output["token_ids"] for output in outputs]

    settings: dict[str, Any] = {"mode": "unified", "max_num_seqs": 64} | SETTINGS | options
    with LLM(DEMO, **settings | {"log_level": "INFO"}) as llm:
        first = answers(llm, 60)
        deadline = time.monotonic() + 100
        while "captured the remaining graphs of decode steps" not in seen:
            assert time.monotonic() < deadline, seen[-2000:]
            answers(llm, random.randint(1, 20))
            time.sleep(0.7)  # a worker captures when it has had nothing to do for half a second
            seen += capfd.readouterr().err
        again = answers(llm, 60)
        assert sum(a == b for a, b in zip(first, again, strict=True)) >= 57
        assert_no_leaks(llm)
    assert "captured decode graphs for 3 batch sizes up to 64" in seen


def test_other_threads_may_allocate_during_a_capture() -> None:
    x, ends = torch.ones(1 << 20, device="cuda"), threading.Event()
    failures: list[Exception] = []

    def allocate() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for size in range(
                    2 << 20, 300 << 20, 2 << 20
                ):  # each larger than all before, so none comes from a cache
                    torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
                    torch.empty(size >> 6, dtype=torch.uint8, pin_memory=True)
                    torch.cuda.current_stream().synchronize()
                    if ends.is_set():
                        break
        except Exception as error:
            failures.append(error)

    def step() -> torch.Tensor:
        y = x
        for _ in range(50):
            y = y + x
        return y

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for _ in range(20):
            graph: Any = torch.cuda.CUDAGraph()
            run_to_capture(step)
            with capturing(graph, None):
                y = step()
            graph.replay()
            assert (y == 51).all()
    finally:
        ends.set()
        thread.join()
    assert not failures


def test_steps_may_run_between_the_parts_of_a_capture() -> None:
    x = torch.ones(1 << 10, device="cuda")

    def parts() -> Parts[torch.Tensor]:
        y = x
        for _ in range(20):
            y = y + x
            yield
        return y

    with torch.cuda.stream(torch.cuda.Stream()):
        first: Any = torch.cuda.CUDAGraph()
        one = run_through(capture_in_parts(first, None, parts()))
        second: Any = torch.cuda.CUDAGraph()
        capture, kept = capture_in_parts(second, first.pool(), parts()), []
        for number in range(20):
            next(capture)
            first.replay()
            size = (2 + number) << 20  # larger than all before, so none comes from a cache
            kept.append(torch.full((size,), number, dtype=torch.float32, device="cuda"))
            assert float(one.sum() + kept[-1][-1]) == 21 * len(x) + number
        two = run_through(capture)
        second.replay()
        assert (two == 21).all()
        assert all((tensor == number).all() for number, tensor in enumerate(kept))


@pytest.mark.parametrize("has_graphs", [True, False])
def test_a_draft_model_is_right_where_it_is_the_model_itself(has_graphs: bool) -> None:
    """Its passes are captured or eager; a sequence now and then has nothing that was read before."""
    config = from_dict(
        {
            "model": {"path": DEMO, "device": "cuda", "dtype": "bfloat16"},
            "performance": {"num_blocks": 512, "max_num_seqs": 8},
            "cuda_graph": {"enabled": has_graphs},
            "speculation": {"method": "draft_model", "model": DEMO},
        }
    )
    platform = make_platform("cuda", gpu_id=0, num_threads=1, num_instances=1)
    platform.activate()
    runner = ModelRunner(config, config.gpu_instances[0], platform)
    prompts = [random_prompt(length, seed=length) for length in (3, 16, 31, 200, 5)]
    rng, outputs = random.Random(2), []

    def draft(sequence: Sequence, limit: int) -> list[int]:
        if rng.random() < 0.1:
            sequence.num_read = 0
        return [TO_BE_DRAFTED] * min(rng.choice((0, 1, 2, 7)), limit)

    for drafter in (None, draft):
        driver = Driver(runner, chunk=64, drafter=drafter)
        seeded = SamplingParams(temperature=0.8, seed=3, max_tokens=None)
        sequences = [
            driver.add(prompt, 60, slot, sampling=GREEDY_DRIVER if slot % 2 else seeded)
            for slot, prompt in enumerate(prompts)
        ]
        outputs.append(driver.run(*sequences))
    # Rounding decides near ties, and a sequence may go on differently behind one.
    assert sum(a == b for a, b in zip(*outputs, strict=True)) >= 3
    assert driver.num_accepted > 0.8 * driver.num_drafted > 100


def test_an_eagle_head_guesses_the_same_in_graphs_and_changes_no_token(tmp_path: Path) -> None:
    """A random head; a sequence now and then has nothing that was read before."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "rms_norm_eps": 1e-6}
    save_head(tmp_path, **sizes)
    prompts = [random_prompt(length, seed=length) for length in (3, 16, 31, 200, 5)]
    outputs: list[list[list[int]]] = []
    guessed: list[dict[tuple[int, ...], list[int]]] = []
    for has_graphs in (True, False):
        config = from_dict(
            {
                "model": {"path": DEMO, "device": "cuda", "dtype": "bfloat16"},
                "performance": {"num_blocks": 512, "max_num_seqs": 8},
                "cuda_graph": {"enabled": has_graphs},
                "speculation": {"method": "eagle3", "model": str(tmp_path)},
            }
        )
        platform = make_platform("cuda", gpu_id=0, num_threads=1, num_instances=1)
        platform.activate()
        runner = ModelRunner(config, config.gpu_instances[0], platform)
        rng = random.Random(2)

        def draft(sequence: Sequence, limit: int, rng: random.Random = rng) -> list[int]:
            if rng.random() < 0.1:
                sequence.num_read = 0
            return [TO_BE_DRAFTED] * min(rng.choice((0, 1, 2, 7)), limit)

        for drafter in (None, draft):
            driver = Driver(runner, chunk=64, drafter=drafter, rereads=True)
            seeded = SamplingParams(temperature=0.8, seed=3, max_tokens=None)
            sequences = [
                driver.add(prompt, 60, slot, sampling=GREEDY_DRIVER if slot % 2 else seeded)
                for slot, prompt in enumerate(prompts)
            ]
            outputs.append(driver.run(*sequences))
        guessed.append({(slot, *tokens): guesses for slot, tokens, guesses in driver.guesses})
    # Rounding decides near ties, and a sequence may go on differently behind one.
    for others in outputs[1:]:
        assert sum(a == b for a, b in zip(outputs[0], others, strict=True)) >= 3
    firsts = [(guessed[0][key], guessed[1][key]) for key in guessed[0].keys() & guessed[1].keys()]
    assert sum(a == b for a, b in firsts) > 0.8 * len(firsts) > 40


async def test_random_load_with_preemption_aborts_and_shared_prefixes_leaks_nothing() -> None:
    """Run for ``HBSERVE_SOAK_S`` seconds; by default for one round."""
    deadline = time.monotonic() + float(os.environ.get("HBSERVE_SOAK_S", "0"))
    config = PdDisaggConfig.from_arguments(
        DEMO, mode="unified", **(SETTINGS | {"num_blocks": 160, "max_num_seqs": 64, "decode_headroom_tokens": 0})
    )
    rng = random.Random(3)
    prefixes = [random_prompt(rng.randint(50, 400), seed=index) for index in range(4)]
    async with DisaggregatedLLM(config) as llm:

        async def one(index: int) -> None:
            await asyncio.sleep(rng.random() * 5)
            prompt = rng.choice(prefixes) + random_prompt(rng.randint(1, 300), seed=100 + index)
            sampling = SamplingParams(temperature=rng.choice([0, 1]), max_tokens=rng.randint(1, 200), ignore_eos=True)
            stop_after = rng.randint(1, 100) if index % 4 == 0 else None
            stream = llm.stream(prompt, sampling)
            count = 0
            async for delta in stream:
                count += len(delta.token_ids)
                if stop_after is not None and count >= stop_after:
                    break
            else:
                assert count == sampling.max_tokens
            await stream.aclose()

        while True:
            await asyncio.wait_for(asyncio.gather(*(one(index) for index in range(300))), 200)
            if time.monotonic() > deadline:
                break
        assert llm.get_system_stats()["cpu_scheduler"]["preemptions"] > 0
        await asyncio.to_thread(assert_no_leaks, llm)
