"""The whole system through `LLM`: token-for-token what transformers gives, in every mode and condition."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from hbserve import LLM, DisaggregatedLLM, PdDisaggConfig, SamplingParams
from hbserve.errors import ConfigError, EngineDeadError, InvalidRequestError, StartupError
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import VOCAB_SIZE, save_head, save_model

DEADLINE_S = 60.0

MODES = ["unified", "disaggregated"]
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 64, 100, 257, 600]
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 640,
    "num_blocks": 512,
    "log_level": "WARNING",
}


CELLS = [
    ("unified", 16, "gemma3"),
    ("unified", None, "phi3"),
    ("disaggregated", 16, "qwen3_moe"),
    ("disaggregated", None, "gemma3"),
]
"""Mode, chunk size and model of each running system; one model runs in both modes."""


class Models:
    """Random models, made when a test first needs one."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._models: dict[str, tuple[str, Any]] = {}
        self._references: dict[str, list[tuple[list[int], list[int]]]] = {}

    def model(self, name: str) -> tuple[str, Any]:
        """Return the folder and transformers' model."""
        if name not in self._models:
            folder = self._make_folder(name)
            self._models[name] = str(folder), save_model(folder, name)
        return self._models[name]

    def head(self) -> str:
        """Return the folder of a random EAGLE-3 head for any of them."""
        folder = self._make_folder("head")
        save_head(folder)
        return str(folder)

    def references(self, name: str) -> list[tuple[list[int], list[int]]]:
        """Return prompts of many lengths with their greedy continuations."""
        if name not in self._references:
            model = self.model(name)[1]
            prompts = [random_prompt(length, seed=length) for length in LENGTHS]
            self._references[name] = [(prompt, greedy_reference(model, prompt, NUM_TOKENS)) for prompt in prompts]
        return self._references[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The model of the test's cell, or Gemma 3: windows and two rotary embeddings by layer, norms at every place."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return str(parameters["llm"][2]) if "llm" in parameters else "gemma3"


@pytest.fixture
def model(models: Models, name: str) -> tuple[str, Any]:
    return models.model(name)


@pytest.fixture
def references(models: Models, name: str) -> list[tuple[list[int], list[int]]]:
    return models.references(name)


@pytest.fixture(scope="module", params=CELLS, ids=str)
def llm(request: pytest.FixtureRequest, models: Models) -> Iterator[LLM]:
    """A running system of each cell; nothing may be left behind in it."""
    mode, chunk_size, name = request.param
    drafting: dict[str, str] = {}
    if chunk_size is not None:  # by a model or a head that is always wrong
        is_head = mode == "disaggregated"
        drafter = models.head() if is_head else models.model("qwen3")[0]
        drafting = {"speculation_method": "eagle3" if is_head else "draft_model", "speculation_model": drafter}
        drafting |= {"scheduler": "tests.support.eager_drafts:EagerDrafts"}
    with LLM(models.model(name)[0], mode=mode, chunk_size=chunk_size, **SETTINGS, **drafting) as running:
        yield running
        assert_no_leaks(running)


def test_greedy_equals_transformers_batched_then_cached_then_alone(
    llm: LLM, references: list[tuple[list[int], list[int]]]
) -> None:
    prompts = [prompt for prompt, _ in references]
    expected = [tokens for _, tokens in references]
    first = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in first] == expected
    assert all(output["finish_reason"] == "length" for output in first)
    best_effort = msgspec.structs.replace(GREEDY, priority="batch")
    sampling = [best_effort if index % 2 else GREEDY for index in range(len(prompts))]
    again = llm.generate(prompts, sampling, use_tqdm=False)  # now every prompt is in the prefix cache
    assert [output["token_ids"] for output in again] == expected
    assert [output["num_cached_tokens"] for output in again] == [(length - 1) // 16 * 16 for length in LENGTHS]
    for prompt, tokens in references[::4]:
        assert llm.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"] == tokens


def test_a_shared_prefix_is_reused_and_changes_nothing(llm: LLM, model: tuple[str, Any]) -> None:
    prefix = random_prompt(90, seed=7)
    prompts = [prefix + random_prompt(20 + index, seed=index) for index in range(4)]
    llm.generate(prefix, GREEDY, use_tqdm=False)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output["num_cached_tokens"] == 80
        assert output["token_ids"] == greedy_reference(model[1], prompt, NUM_TOKENS)


def test_seeded_sampling_is_the_same_in_every_mode_chunking_and_batch(
    llm: LLM, name: str, seeded: dict[str, Any]
) -> None:
    prompts = [random_prompt(length, seed=length) for length in (3, 40, 200)]
    sampling = [
        SamplingParams(temperature=0.9, seed=11, max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=1.3, top_k=40, top_p=0.9, seed=12, max_tokens=16, ignore_eos=True),
        SamplingParams(
            temperature=0.7,
            min_p=0.02,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            seed=13,
            max_tokens=16,
            ignore_eos=True,
        ),
    ]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    alone = [llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, sampling, strict=True)]
    tokens = [output["token_ids"] for output in outputs]
    assert [output["token_ids"] for output in alone] == tokens
    assert seeded.setdefault(name, tokens) == tokens, "another mode gave other tokens for the same seeds"


@pytest.fixture(scope="module")
def seeded() -> dict[str, Any]:
    """What the first mode sampled of each model, for the others to be compared with."""
    return {}


def test_a_prediction_changes_no_token_and_saves_steps(llm: LLM) -> None:
    """Right, wrong and half right guesses, with every kind of sampling, in one batch."""
    sampling = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=21, max_tokens=30, n=2, logprobs=1, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=22, top_p=0.9, logit_bias={5: 3.0}, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=23, min_tokens=12, stop_token_ids=[*range(0, VOCAB_SIZE, 9)]),
    ]
    prompts = [random_prompt(length, seed=length) for length in (5, 33, 70, 20, 48)]
    plain = llm.generate(prompts, sampling, use_tqdm=False)
    before = llm.get_system_stats()["cpu_scheduler"]["speculation"]["prediction"]["accepted_tokens"]
    replace, rng = msgspec.structs.replace, random.Random(1)
    for wrong in (0.0, 0.3, 1.0):
        predicted = [
            replace(s, prediction=[rng.randrange(VOCAB_SIZE) if rng.random() < wrong else t for t in o["token_ids"]])
            for s, o in zip(sampling, plain, strict=True)
        ]
        outputs = llm.generate(prompts, predicted, use_tqdm=False)
        for output, expected in zip(outputs, plain, strict=True):
            assert [s["token_ids"] for s in output["samples"]] == [s["token_ids"] for s in expected["samples"]]
            assert output["finish_reason"] == expected["finish_reason"]

    # Whether drafts are worth their time is measured, so on busy cores it may take more than one request.
    half_right = [token if index % 4 else (token + 1) % VOCAB_SIZE for index, token in enumerate(plain[0]["token_ids"])]
    deadline = time.monotonic() + DEADLINE_S
    while True:
        drafts = llm.get_system_stats()["cpu_scheduler"]["speculation"]["prediction"]
        if drafts["drafted_tokens"] > drafts["accepted_tokens"] > before:
            break
        assert time.monotonic() < deadline, drafts
        [output] = llm.generate(prompts[0], replace(sampling[0], prediction=half_right), use_tqdm=False)
        assert output["token_ids"] == plain[0]["token_ids"]


def test_n_samples_differ_and_are_reproducible(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.5, n=3, seed=5, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate([4, 5, 6], sampling, use_tqdm=False)[0] for _ in range(2))
    tokens = [sample["token_ids"] for sample in first["samples"]]
    assert len({tuple(sample) for sample in tokens}) == 3
    assert [sample["token_ids"] for sample in second["samples"]] == tokens
    assert first["token_ids"] == tokens[0]


def test_stop_tokens_end_the_output_and_min_tokens_holds_them_off(
    llm: LLM, references: list[tuple[list[int], list[int]]]
) -> None:
    prompt, expected = references[4]
    stop = expected[5]
    first = expected.index(stop)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, stop_token_ids=[stop])
    output = llm.generate(prompt, sampling, use_tqdm=False)[0]
    assert output["finish_reason"] == "stop"
    assert output["token_ids"] == expected[: first + 1]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, stop_token_ids=[stop], min_tokens=first + 2)
    output = llm.generate(prompt, sampling, use_tqdm=False)[0]
    assert len(output["token_ids"]) >= first + 2
    assert stop not in output["token_ids"][: first + 1]


def test_logprobs_come_with_the_tokens(llm: LLM, references: list[tuple[list[int], list[int]]]) -> None:
    prompt, expected = references[3]
    output = llm.generate(
        prompt, SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True), use_tqdm=False
    )[0]
    assert output["logprobs"] is not None
    assert len(output["logprobs"]) == 6
    for token, logprobs in zip(expected, output["logprobs"], strict=False):
        assert max(logprobs, key=lambda t: logprobs[t]) == token
        assert len(logprobs) == 3
        assert all(value <= 0 for value in logprobs.values())


def test_one_token_needs_no_decode(llm: LLM, references: list[tuple[list[int], list[int]]]) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    outputs = llm.generate([prompt for prompt, _ in references], sampling, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [tokens[:1] for _, tokens in references]


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([], GREEDY, "prompt"),
        ([VOCAB_SIZE], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ([1] * 640, GREEDY, "prompt"),
        ([1] * 630, GREEDY, "max_tokens"),
        ([1], SamplingParams(max_tokens=4, stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_lost(
    llm: LLM, prompt: list[int], sampling: SamplingParams, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate([prompt], sampling, use_tqdm=False)
    assert caught.value.param == param
    for wrong in (None, 5, b"abc", {"prompt_token_ids": [1]}, {"a", "b"}):
        with pytest.raises(TypeError, match="a prompt is a string or a list of token ids"):
            llm.generate(wrong, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sampling_params must be"):
        llm.generate([prompt], {"temperature": 0})  # type: ignore[arg-type]
    for kind in (torch.tensor([1, 2]), b"abc", {"prompt": "a"}, {1}, 5.5):
        with pytest.raises(InvalidRequestError, match="a prompt must be text or a list of token ids, got "):
            llm.generate([kind], GREEDY)  # type: ignore[arg-type]
    assert llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0]["finish_reason"] == "length"


@pytest.mark.parametrize("mode", MODES)
def test_preemption_by_recompute_changes_no_token(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]], mode: str
) -> None:
    prompts = [random_prompt(40 + index, seed=100 + index) for index in range(10)]
    num_tokens = 60
    expected = [greedy_reference(model[1], prompt, num_tokens) for prompt in prompts]
    settings = SETTINGS | {"num_blocks": 24, "max_model_len": 128, "decode_headroom_tokens": 0}
    settings |= {"scheduler": "tests.support.dawdler:Dawdler"}  # plans that wait change nothing either
    with LLM(model[0], mode=mode, **settings) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        predicted = [  # every other request; each fifth guess is wrong
            msgspec.structs.replace(sampling, prediction=[0 if i % 5 == 4 else t for i, t in enumerate(tokens)])
            if index % 2
            else sampling
            for index, tokens in enumerate(expected)
        ]
        outputs = llm.generate(prompts, predicted, use_tqdm=False)
        assert llm.get_system_stats()["cpu_scheduler"]["preemptions"] > 0
        assert_no_leaks(llm)
    assert [output["token_ids"] for output in outputs] == expected


# Those that differ in what lies in a block and in who sees it; the forward pass of all is tested in unit/models.
@pytest.mark.parametrize("name", ["qwen3_head256", "qwen2_window", "gemma2"])
def test_architectures_disaggregated(name: str, tmp_path: Path) -> None:
    reference = save_model(tmp_path, name, sharded=True)
    prompts = [random_prompt(length, seed=length) for length in (1, 50, 130)]
    # more prompts than may wait: some are held back, and none is refused
    with LLM(str(tmp_path), mode="disaggregated", chunk_size=48, max_waiting_requests=2, **SETTINGS) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_no_leaks(llm)
    assert [output["token_ids"] for output in outputs] == [
        greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts
    ]


def test_several_prefill_and_several_decode_instances(
    model: tuple[str, Any], references: list[tuple[list[int], list[int]]]
) -> None:
    roles = ["prefill", "prefill", "decode", "decode"]
    instances = [{"instance_id": f"i{n}", "instance_type": role, "num_threads": 1} for n, role in enumerate(roles)]
    settings = SETTINGS | {"scheduler": "tests.support.dawdler:Dawdler"}
    with LLM(model[0], gpu_instances=instances, chunk_size=64, **settings) as llm:
        outputs = llm.generate([prompt for prompt, _ in references] * 2, GREEDY, use_tqdm=False)
        stats = llm.get_system_stats()
        assert_no_leaks(llm)
    assert [output["token_ids"] for output in outputs] == [tokens for _, tokens in references] * 2
    assert all(instance["steps"] > 0 for instance in stats["gpu_instances"].values()), "an instance did nothing"


def test_two_engines_live_on_one_host(model: tuple[str, Any], references: list[tuple[list[int], list[int]]]) -> None:
    prompt, expected = references[5]
    with LLM(model[0], mode="disaggregated", **SETTINGS) as one, LLM(model[0], mode="unified", **SETTINGS) as two:
        assert one.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"] == expected
        assert two.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"] == expected


def test_whole_prompts_without_chunking(model: tuple[str, Any], references: list[tuple[list[int], list[int]]]) -> None:
    settings = SETTINGS | {"chunked_prefill_enabled": False, "max_num_batched_tokens": 64}
    with LLM(model[0], mode="unified", **settings) as llm:
        outputs = llm.generate([prompt for prompt, _ in references], GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [tokens for _, tokens in references]


def test_no_step_has_more_tokens_than_configured(model: tuple[str, Any]) -> None:
    num_seqs, num_tokens = 4, 12
    with LLM(model[0], mode="unified", **(SETTINGS | {"max_num_batched_tokens": 2})) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate([[token] for token in range(1, num_seqs + 1)], sampling, use_tqdm=False)
        steps = llm.get_system_stats()["gpu_instances"]["unified-0"]["steps"]
        predicted = [msgspec.structs.replace(sampling, prediction=output["token_ids"]) for output in outputs]
        again = llm.generate([[token] for token in range(1, num_seqs + 1)], predicted, use_tqdm=False)
        more_steps = llm.get_system_stats()["gpu_instances"]["unified-0"]["steps"] - steps
    assert [len(output["token_ids"]) for output in outputs] == [num_tokens] * num_seqs
    assert [output["token_ids"] for output in again] == [output["token_ids"] for output in outputs]
    assert min(steps, more_steps) >= num_seqs * num_tokens / 2


def test_dummy_weights_need_only_a_config_and_a_closed_llm_says_so(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with LLM(str(tmp_path), mode="unified", load_format="dummy", **SETTINGS) as llm:
        assert len(llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0]["token_ids"]) == NUM_TOKENS
    llm.close()  # once more is no harm
    for use in (lambda: llm.generate([1], GREEDY), lambda: llm.chat([{"role": "user"}]), llm.get_system_stats):
        with pytest.raises(EngineDeadError, match="this LLM has been closed"):
            use()


async def test_another_event_loop_is_refused_and_does_not_wait_for_ever(model: tuple[str, Any]) -> None:
    def in_another_loop(use: Callable[[], Coroutine[Any, Any, object]]) -> None:
        with pytest.raises(RuntimeError, match="started in another event loop"):
            asyncio.run(use())

    async with DisaggregatedLLM(PdDisaggConfig(model[0], mode="unified", **SETTINGS)) as llm:

        async def stream() -> None:
            async for _ in llm.stream([1], GREEDY):
                pass

        for use in (lambda: llm.generate([1], GREEDY), lambda: llm.chat([{"role": "user"}]), stream, llm.stop):
            await asyncio.to_thread(in_another_loop, use)
        assert len(await llm.generate([1, 2, 3], GREEDY)) == 1
    await asyncio.to_thread(lambda: asyncio.run(llm.stop()))  # there is nothing to do any more


def test_a_fork_leaves_the_system_to_its_process(model: tuple[str, Any]) -> None:
    with LLM(model[0], mode="unified", **SETTINGS) as llm:
        before = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)

        def exit_code(what: Callable[[], object]) -> int:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    what()
                    code = 2
                except EngineDeadError as error:
                    code = 3 if "belongs to process" in str(error) else 4
                finally:
                    os._exit(code)
            deadline = time.monotonic() + DEADLINE_S
            while time.monotonic() < deadline:
                if (done := os.waitpid(pid, os.WNOHANG))[0]:
                    return os.waitstatus_to_exitcode(done[1])
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the fork hangs")

        assert exit_code(lambda: llm.generate([1], GREEDY)) == 3
        assert exit_code(llm.get_system_stats) == 3
        assert exit_code(llm.close) == 2
        assert llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0]["token_ids"] == before[0]["token_ids"]


def test_what_cannot_start_says_why(model: tuple[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        LLM(str(tmp_path / "missing"))
    with pytest.raises(TypeError, match="did you mean 'num_blocks'"):
        LLM(model[0], num_block=3)
    save_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StartupError, match="safetensors"):
        LLM(str(tmp_path), mode="unified", **SETTINGS)


def test_a_worker_whose_backend_cannot_be_imported_says_so_once_and_obeys_no_more(
    model: tuple[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Pings go on meanwhile; a worker that obeyed one of them would fail at the transfers that it does not have."""
    settings = SETTINGS | {"kv_transfer_backend": "no.such:Backend", "max_restarts": 0}
    config = PdDisaggConfig.from_arguments(model[0], mode="disaggregated", **settings).freeze()
    rpc = msgspec.structs.replace(config.rpc, heartbeat_interval_s=0.001)
    with pytest.raises(StartupError, match=r"cannot import 'no\.such:Backend'|too often to start it again"):
        asyncio.run(DisaggregatedLLM(msgspec.structs.replace(config, rpc=rpc)).start())
    log = capfd.readouterr().err
    assert "cannot import 'no.such:Backend'" in log
    assert "Traceback" not in log


def test_a_worker_that_dies_without_a_word_ends_the_start_when_it_is_given_up(model: tuple[str, Any]) -> None:
    backend = "tests.support.vanishing_backend:VanishingBackend"
    with pytest.raises(StartupError, match="exit code 70, too often to start it again"):
        LLM(model[0], mode="disaggregated", kv_transfer_backend=backend, max_restarts=0, **SETTINGS)
