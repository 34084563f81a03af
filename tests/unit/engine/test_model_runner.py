"""Step plans in, tokens out: `ModelRunner` against transformers' own greedy generation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hbserve.config import ModelConfig, from_dict
from hbserve.engine.model_runner import ModelRunner
from hbserve.errors import ConfigError
from hbserve.kv_transfer.block_parts import BlockParts
from hbserve.messages.transfer import LayerGroup, SendBlocks
from hbserve.messages.worker import PlanRow, SequenceState, StepPlan, StepResult
from hbserve.model_spec import ModelSpec
from hbserve.platform import make_platform
from hbserve.sampling_params import SamplingParams
from hbserve.worker.events import LayersStored, StepDone, StepEvent
from hbserve.worker.step_pipeline import StepPipeline
from tests.support.model_zoo import MODELS, OWN_ATTENTION, VOCAB_SIZE, save_model
from tests.support.plan_driver import GREEDY, Driver, Sequence


def make_runner(
    folder: Path, device: str = "cpu", num_blocks: int | None = 200, has_graphs: bool = True, **options: Any
) -> ModelRunner:
    """A runner on a model folder; its KV cache holds NaN wherever nothing has been written."""
    model_options = {key: options.pop(key) for key in list(options) if key in ModelConfig.__struct_fields__}
    kv_dtype, draft_model = options.pop("kv_dtype", "auto"), options.pop("draft_model", None)
    method = options.pop("method", "draft_model")
    config = from_dict(
        {
            "model": {"path": str(folder), "device": device, **model_options},
            "performance": {"num_blocks": num_blocks, "max_num_seqs": 8, **options},
            "kv_cache": {"dtype": kv_dtype},
            "cuda_graph": {"enabled": has_graphs},
            "speculation": {} if draft_model is None else {"method": method, "model": draft_model},
        }
    )
    platform = make_platform(config.model.device, gpu_id=0, num_threads=1, num_instances=1)
    platform.activate()
    runner = ModelRunner(config, config.gpu_instances[0], platform)
    runner.kv_blocks.fill_(0xFF)
    return runner


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(VOCAB_SIZE), k=length)


def transformers_greedy(model: PreTrainedModel, prompt: list[int], num_new: int, **options: Any) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, **options)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


# --- the same tokens as transformers, in float32 ---


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, name)
    runner = make_runner(tmp_path)
    prompts = [make_prompt(length) for length in (18, 1, 15, 16, 17, 100, 600)]
    expected = [transformers_greedy(model, prompt, 24) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 20, "the model repeats itself"
    batched = Driver(runner, chunk=16)
    assert batched.run(*(batched.add(prompt, 24, slot) for slot, prompt in enumerate(prompts))) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        alone = Driver(runner, chunk=512, feedback=False)
        assert alone.run(alone.add(prompt, 24)) == [tokens]


def test_results_report_the_loads_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbserve.engine.expert_loads.INTERVAL_S", 0.0)
    save_model(tmp_path, "qwen3_moe")
    runner = make_runner(tmp_path)
    row = PlanRow(slot=0, start=0, num_tokens=20, token_ids=[*range(20)], new_block_ids=[], sample=True)
    state = SequenceState(0, [0, 1], GREEDY, [], 0, 20)
    reports = [
        runner.launch(StepPlan(epoch=1, step_id=step, rows=rows, new_sequences=new, sends=[])).result().expert_tokens
        for step, (rows, new) in enumerate([([row], [state]), ([], []), ([], [])])
    ]
    first, second, third = reports
    assert first is None, "the first copy arrives later"
    assert second is not None
    assert third is not None
    assert [sum(layer) for layer in second] == [40, 0, 40], "20 tokens, 2 experts each; layer 1 is dense"
    assert not any(map(any, third))


@pytest.mark.parametrize("block_size", [1, 32, 1024])
def test_any_block_size_gives_the_same_tokens(block_size: int, tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen2_window")
    driver = Driver(make_runner(tmp_path, block_size=block_size, num_blocks=2048 // block_size), chunk=16)
    prompts = [make_prompt(70), make_prompt(33)]
    outputs = driver.run(*(driver.add(prompt, 8, slot) for slot, prompt in enumerate(prompts)))
    assert outputs == [transformers_greedy(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_prompt_longer_than_a_mask_tile_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Chunks above the backend's tile size, at the start of a prompt and behind a prefix."""
    model = save_model(tmp_path, name, max_position_embeddings=4096)
    prompt = make_prompt(2600)
    expected = transformers_greedy(model, prompt, 4)
    for chunk in (1300, 4096):
        driver = Driver(make_runner(tmp_path), chunk=chunk)
        assert driver.run(driver.add(prompt, 4)) == [expected]


@pytest.mark.parametrize("together", [True, False])
def test_sequences_that_share_a_prefix_share_its_blocks(together: bool, tmp_path: Path) -> None:
    """The second sequence computes only what follows; even in the very step that fills the shared blocks."""
    model = save_model(tmp_path, "qwen3")
    driver = Driver(make_runner(tmp_path))
    prefix = make_prompt(48)
    prompts = [prefix + make_prompt(5, seed) for seed in (1, 2)]
    first = driver.add(prompts[0], 12, slot=0)
    second = driver.add(prompts[1], 12, slot=1)
    second.computed = 48
    if together:
        first.block_ids = [driver.free.pop() for _ in range(4)]
        second.block_ids = first.block_ids[:3] + second.block_ids
        outputs = driver.run(first, second)
    else:
        outputs = driver.run(first)
        second.block_ids = first.block_ids[:3] + second.block_ids
        outputs += driver.run(second)
    assert outputs == [transformers_greedy(model, prompt, 12) for prompt in prompts]


def test_a_sequence_goes_on_elsewhere_from_its_blocks(tmp_path: Path) -> None:
    """Prefill on one runner, bytes of its blocks to other blocks of another, decode there: as a hand-over does."""
    model = save_model(tmp_path, "llama")
    here, there = Driver(make_runner(tmp_path)), Driver(make_runner(tmp_path))
    prompt = make_prompt(50)
    sequence = here.add(prompt, 1, slot=2)
    here.run(sequence)
    target = [there.free.pop() for _ in sequence.block_ids]
    there.runner.kv_blocks[target] = here.runner.kv_blocks[sequence.block_ids]
    moved = Sequence(prompt, 20, slot=5, block_ids=target, computed=50, output=list(sequence.output))
    there.feedback = False
    there.depth = 1
    assert there.run(moved) == [transformers_greedy(model, prompt, 20)]


def test_a_slot_is_reused_without_a_trace(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3")
    driver = Driver(make_runner(tmp_path))
    driver.run(
        driver.add(
            make_prompt(30),
            10,
            end_token_ids=[1],
            sampling=SamplingParams(seed=1, repetition_penalty=2.0, min_tokens=5, max_tokens=None, logprobs=3),
        )
    )
    again = driver.add(make_prompt(40), 10)
    assert driver.run(again) == [transformers_greedy(model, make_prompt(40), 10)]
    assert again.logprobs == [None] * 10


def test_rows_may_come_in_any_order(tmp_path: Path) -> None:
    """Results are in the plan's order, though the step computes short rows first."""
    model = save_model(tmp_path, "qwen2")
    driver = Driver(make_runner(tmp_path), chunk=16)
    prompts = [make_prompt(length) for length in (40, 3, 90, 1, 17)]
    sequences = [driver.add(prompt, 9, slot) for slot, prompt in zip((7, 1, 5, 0, 3), prompts, strict=True)]
    assert driver.run(*sequences) == [transformers_greedy(model, prompt, 9) for prompt in prompts]


# --- sampling through plans ---


def test_seeded_samples_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    runner = make_runner(tmp_path)
    samplings = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=None),
        SamplingParams(temperature=1.5, seed=2, top_k=20, max_tokens=None, logprobs=2),
        GREEDY,
        SamplingParams(temperature=1.0, seed=3, top_p=0.7, min_p=0.02, max_tokens=None),
        SamplingParams(temperature=1.0, seed=4, frequency_penalty=1.5, repetition_penalty=1.3, max_tokens=None),
        SamplingParams(temperature=1.0, seed=-5, max_tokens=None),
    ]
    batched = Driver(runner, chunk=16)
    sequences = [batched.add(make_prompt(20 + i), 15, i, sampling=s) for i, s in enumerate(samplings)]
    together = batched.run(*sequences)
    for i, sampling in enumerate(samplings):
        for feedback in (True, False):
            alone = Driver(runner, feedback=feedback)
            assert alone.run(alone.add(make_prompt(20 + i), 15, 3, sampling=sampling)) == [together[i]]
    other_seed = Driver(runner)
    changed = SamplingParams(temperature=0.8, seed=99, max_tokens=None)
    assert other_seed.run(other_seed.add(make_prompt(20), 15, sampling=changed)) != [together[0]]


@pytest.mark.parametrize("feedback", [True, False])
def test_repetition_penalty_equals_transformers(feedback: bool, tmp_path: Path) -> None:
    """Over prompt and output, the tokens counted on the device as they are sampled."""
    model = save_model(tmp_path, "qwen3")
    driver = Driver(make_runner(tmp_path), chunk=16, feedback=feedback)
    sampling = SamplingParams(temperature=0, repetition_penalty=1.7, max_tokens=None)
    prompts = [make_prompt(length) for length in (30, 64)]
    expected = [transformers_greedy(model, prompt, 30, repetition_penalty=1.7) for prompt in prompts]
    assert expected != [transformers_greedy(model, prompt, 30) for prompt in prompts], "the penalty changes nothing"
    sequences = [driver.add(prompt, 30, slot, sampling=sampling) for slot, prompt in enumerate(prompts)]
    assert driver.run(*sequences) == expected


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_counts_on_the_device_equal_those_of_a_fresh_state(penalty: str, tmp_path: Path) -> None:
    """A worker that has seen every token agrees with one that gets the history at every step."""
    save_model(tmp_path, "qwen3")
    penalties: dict[str, Any] = {penalty: 2.0}
    sampling = SamplingParams(temperature=0, max_tokens=None, **penalties)
    kept = Driver(make_runner(tmp_path))
    expected = kept.run(kept.add(make_prompt(25), 40, sampling=sampling))
    stateless = Driver(make_runner(tmp_path), feedback=False)
    sequence = stateless.add(make_prompt(25), 40, sampling=sampling)
    while not sequence.done:
        sequence.installed = False
        plan, _ = stateless.plan([sequence])
        sequence.output += stateless.runner.launch(plan).result().token_ids
    assert [sequence.output] == expected
    plain = Driver(make_runner(tmp_path))
    assert plain.run(plain.add(make_prompt(25), 40)) != expected, "the penalty changes nothing"


def test_no_end_token_before_min_tokens(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3")
    runner = make_runner(tmp_path)
    prompt = make_prompt(10)
    free = transformers_greedy(model, prompt, 12)
    end, other_end = free[5], free[2]
    assert end not in free[:5]
    for min_tokens in (5, 6):  # it comes as the sixth token, if it may
        driver = Driver(runner, chunk=4)
        sampling = SamplingParams(temperature=0, min_tokens=min_tokens, max_tokens=None)
        (output,) = driver.run(driver.add(prompt, 12, end_token_ids=[end], sampling=sampling))
        assert (output[5] == end) == (min_tokens == 5)
        driver = Driver(runner, chunk=4)
        (output,) = driver.run(driver.add(prompt, 12, end_token_ids=[end, other_end], sampling=sampling))
        assert not {end, other_end} & set(output[:min_tokens])
        expected = transformers_greedy(model, prompt, 12, eos_token_id=[end, other_end], min_new_tokens=min_tokens)
        assert output[: len(expected)] == expected


def test_logprobs_are_those_of_the_model(tmp_path: Path) -> None:
    """Before penalties and temperature, and only for the rows that ask."""
    model = save_model(tmp_path, "qwen2")
    driver = Driver(make_runner(tmp_path))
    asks = driver.add(
        make_prompt(12), 5, 1, sampling=SamplingParams(temperature=2.0, seed=5, logprobs=4, max_tokens=None)
    )
    barely = driver.add(make_prompt(9), 5, 2, sampling=SamplingParams(temperature=0, logprobs=0, max_tokens=None))
    silent = driver.add(make_prompt(9), 5, 0)
    driver.run(silent, asks, barely)
    assert silent.logprobs == [None] * 5
    with torch.inference_mode():
        expected = model(torch.tensor([asks.tokens])).logits[0].log_softmax(-1)
    for index, (token, logprobs) in enumerate(zip(asks.output, asks.logprobs, strict=True)):
        row = expected[len(asks.prompt) - 1 + index]
        assert logprobs is not None
        assert logprobs.token == pytest.approx(row[token].item(), abs=1e-4)
        assert logprobs.top == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert logprobs.top_ids == row.topk(4).indices.tolist()
    for logprobs in barely.logprobs:
        assert logprobs is not None
        assert (logprobs.top_ids, logprobs.top) == ([], [])


# --- plans without work, and plans that are wrong ---


def launch(runner: ModelRunner, *rows: PlanRow, new_sequences: list[SequenceState] | None = None) -> StepResult:
    plan = StepPlan(epoch=4, step_id=9, rows=list(rows), new_sequences=new_sequences or [], sends=[])
    return runner.launch(plan).result()


def state(slot: int = 0, block_ids: list[int] | None = None, sampling: SamplingParams = GREEDY) -> SequenceState:
    return SequenceState(
        slot=slot,
        block_ids=[0] if block_ids is None else block_ids,
        sampling=sampling,
        end_token_ids=[],
        min_end_position=0,
        num_prompt_tokens=1,
    )


def row(slot: int = 0, start: int = 0, token_ids: list[int] | None = None, **options: Any) -> PlanRow:
    count = options.pop("num_tokens", 1 if token_ids is None else len(token_ids))
    filled: dict[str, Any] = {"new_block_ids": [], "sample": True} | options
    return PlanRow(slot=slot, start=start, num_tokens=count, token_ids=token_ids, **filled)


def test_a_plan_that_samples_nothing_gives_an_empty_result(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    runner = make_runner(tmp_path)
    for rows in ([], [row(token_ids=[1, 2], sample=False)]):
        result = launch(runner, *rows, new_sequences=[state()])
        assert (result.epoch, result.step_id, result.token_ids, result.logprobs) == (4, 9, [], None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(slot=8, token_ids=[1])], "slots.*not all in 0..7"),
        ([row(slot=3, token_ids=[1])], r"slots \[3\] have no sequence"),
        ([row(token_ids=[1]), row(token_ids=[1])], "not all different"),
        ([row(token_ids=[])], "a row has no tokens"),
        ([row(start=-1, token_ids=[1])], "before position 0"),
        ([row(token_ids=[1] * 17)], r"slots \[0\] have positions beyond their block tables"),
        ([row(token_ids=[1], new_block_ids=[200])], "not in 0..199"),
        ([row(token_ids=[1], new_block_ids=[1] * 64)], "65 blocks are more than the longest sequence has, 64"),
        ([row(token_ids=[VOCAB_SIZE])], "outside the vocabulary"),
        ([row(token_ids=[-1])], "negative"),
        ([row(token_ids=[1, 2], num_tokens=3)], "announce 3 tokens and hold 2"),
        ([row(start=1)], r"slots \[0\] have sampled no token for the position they start at"),
        ([row(start=1, num_tokens=2)], "only a row of one token can be fed back"),
    ],
)
def test_a_wrong_plan_fails_loudly(rows: list[PlanRow], message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(AssertionError, match=message):
        launch(make_runner(tmp_path), *rows, new_sequences=[state()])


def test_a_token_is_fed_back_only_where_it_belongs(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    runner = make_runner(tmp_path)
    launch(runner, row(token_ids=[1, 2]), new_sequences=[state()])
    with pytest.raises(AssertionError, match="no token for the position"):
        launch(runner, row(start=3))
    with pytest.raises(AssertionError, match="no token for the position"):
        launch(runner, row(start=2), new_sequences=[state()])


def test_a_step_reads_no_token_that_is_not_in_the_vocabulary(tmp_path: Path) -> None:
    """Where logits are not numbers, a sampler finds no token; its lookup would end the GPU's context."""
    save_model(tmp_path, "qwen3")
    runner = make_runner(tmp_path)
    launch(runner, row(token_ids=[1, 2]), new_sequences=[state()])
    runner._table.last_token_ids.fill_(1 << 40)
    assert 0 <= launch(runner, row(start=2)).token_ids[0] < VOCAB_SIZE
    runner._table.last_token_ids.fill_(1 << 40)
    given, slots = torch.tensor([-1, 5]), torch.tensor([0, 0])
    decoder = runner._decoder
    expected = decoder.embedding[torch.tensor([VOCAB_SIZE - 1, 5])]
    assert torch.equal(decoder.embed_next(given, runner._table.last_token_ids, slots).total, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (state(slot=-1), "slot -1 is not in 0..7"),
        (state(block_ids=[-1]), "not in 0..199"),
        (state(sampling=SamplingParams()), "without a seed"),
        (state(sampling=SamplingParams(seed=1, presence_penalty=1.0)), "penalties need the history"),
    ],
)
def test_a_wrong_state_fails_loudly(wrong: SequenceState, message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(AssertionError, match=message):
        launch(make_runner(tmp_path), new_sequences=[wrong])


# --- sizes ---


def test_sizes_follow_configuration_and_model(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    runner = make_runner(tmp_path)
    assert (runner.layout.block_size, runner.num_blocks, runner.max_model_len) == (16, 200, 1024)
    assert runner.kv_blocks.shape == (200, 3 * 2 * 16 * 2 * 32 * 4)
    assert make_runner(tmp_path, max_model_len=100).max_model_len == 100
    assert make_runner(tmp_path, num_blocks=10).max_model_len == 160
    assert make_runner(tmp_path, block_size=32, num_blocks=4).max_model_len == 128
    assert make_runner(tmp_path, num_blocks=None).num_blocks == 8 * 1024 // 16
    assert make_runner(tmp_path, num_blocks=None, dtype="bfloat16").layout.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1025}, "max_model_len: 1025 tokens are more than the model's own limit, 1024"),
        ({"max_model_len": 161, "num_blocks": 10}, "num_blocks: 10 blocks gives a KV cache of 160 tokens, fewer than"),
        ({"num_blocks": 1 << 30}, "a KV cache of 1073741824 blocks takes .* GiB free"),
        ({"num_blocks": None, "memory_fraction": 1e-9}, "memory_fraction: 1e-09 of .* KV cache of 0 tokens"),
        ({"attention_backend": "flash_attn"}, "flash_attn needs a CUDA device"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(ConfigError, match=message):
        make_runner(tmp_path, **options)


def test_dummy_weights_serve_from_config_alone(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    (tmp_path / "model.safetensors").unlink()
    outputs = []
    for seed in (0, 0):
        driver = Driver(make_runner(tmp_path, load_format="dummy", seed=seed))
        outputs.append(driver.run(driver.add(make_prompt(20), 5)))
    assert outputs[0] == outputs[1]


# --- on a GPU ---


def first_near_tie(model: PreTrainedModel, prompt: list[int], output: list[int], gap: float) -> int:
    """Index of the first output token whose lead over the runner-up is below ``gap``."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output], device=model.device)).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    near = (best[:, 0] - best[:, 1] < gap).nonzero()
    return int(near[0]) if len(near) else len(output)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers_on_cuda(name: str, tmp_path: Path) -> None:
    """In float32, up to the first token that rounding may decide.

    Logits are of the order of ten and float32 matrix products of this size, in whatever order,
    differ by less than 1e-4 of that; a lead of 1e-2 is safe by a factor of ten.
    """
    model = save_model(tmp_path, name).cuda()
    runner = make_runner(tmp_path, device="cuda", attention_backend="sdpa")
    # with longrope transformers has other angles for contexts below this, HBServe one set for all contexts of a model
    config = model.config.get_text_config()
    has_two_sets = (config.rope_parameters or {}).get("rope_type") == "longrope"
    shortest = config.original_max_position_embeddings if has_two_sets else 0
    prompts = [make_prompt(length) for length in (18, 1, 15, 16, 17, 100, 600) if length > shortest]
    driver = Driver(runner, chunk=16)
    outputs = driver.run(*(driver.add(prompt, 24, slot) for slot, prompt in enumerate(prompts)))
    compared = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = transformers_greedy(model, prompt, 24)
        sure = first_near_tie(model, prompt, expected, gap=1e-2)
        assert output[:sure] == expected[:sure]
        compared += sure
    assert compared > 6 * len(prompts)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_choose_the_tokens_of_eager_ones(name: str, tmp_path: Path) -> None:
    """In float16, until a near tie: padding of a captured step may choose another kernel for a product."""
    save_model(tmp_path, name, dtype=torch.float16)
    spec = ModelSpec.load(tmp_path)
    if features := spec.uncaptured_features:
        pytest.skip(f"not captured: {', '.join(features)}")
    if spec.experts is not None and spec.activation not in ("silu", "clamped_swiglu"):
        pytest.skip(f"not captured: experts with the activation {spec.activation}")
    outputs = []
    for has_graphs in (True, False):
        runner = make_runner(tmp_path, device="cuda", dtype="float16", has_graphs=has_graphs)
        assert (runner._graphs is not None) == has_graphs
        driver = Driver(runner, chunk=48)
        prompts = [make_prompt(length) for length in (1, 18, 100)]
        outputs.append(driver.run(*(driver.add(prompt, 24, slot) for slot, prompt in enumerate(prompts))))
    num_equal = 0
    for captured, eager in zip(*outputs, strict=True):
        differs = [a != b for a, b in zip(captured, eager, strict=True)]
        num_equal += differs.index(True) if True in differs else len(captured)
    assert num_equal >= 36, outputs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_serve_on_cuda(dtype: str, tmp_path: Path) -> None:
    """Sampled, penalised and greedy rows in one batch, with plans in flight; the same twice."""
    save_model(tmp_path, "llama")
    samplings = [
        GREEDY,
        SamplingParams(temperature=0.9, seed=1, top_k=30, top_p=0.9, max_tokens=None, logprobs=3),
        SamplingParams(temperature=0.9, seed=2, frequency_penalty=1.0, min_tokens=10, max_tokens=None),
    ]
    outputs = []
    for _ in range(2):
        driver = Driver(
            make_runner(tmp_path, device="cuda", dtype=dtype, num_blocks=None, memory_fraction=0.01), chunk=16
        )
        sequences = [
            driver.add(make_prompt(40 + i), 30, i, sampling=s, end_token_ids=[7]) for i, s in enumerate(samplings)
        ]
        outputs.append(driver.run(*sequences))
        assert all(logprobs is not None for logprobs in sequences[1].logprobs)
    assert outputs[0] == outputs[1]
    assert all(0 <= token < VOCAB_SIZE for output in outputs[0] for token in output)


def test_a_group_of_layers_is_reported_when_it_is_in_the_cache_and_the_next_one_is_not(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    runner = make_runner(tmp_path)
    groups = [LayerGroup(index=index, count=3) for index in range(3)]
    order: dict[str, Any] = {"request_id": "t", "targets": [], "block_ids": [0], "generations": [0]}
    state = SequenceState(
        slot=0, block_ids=[0, 1], sampling=GREEDY, end_token_ids=[], min_end_position=0, num_prompt_tokens=32
    )
    plan = StepPlan(
        epoch=0,
        step_id=1,
        rows=[PlanRow(slot=0, start=0, num_tokens=32, token_ids=make_prompt(32), new_block_ids=[], sample=True)],
        new_sequences=[state],
        sends=[SendBlocks(transfer_id="t", target_block_ids=[0], layers=layers, **order) for layers in groups],
    )
    events: list[Any] = []
    parts = [BlockParts(runner.kv_blocks).of_layers(layers).kv_blocks for layers in groups]

    def post(event: StepEvent) -> None:
        if isinstance(event, LayersStored):
            group = event.group
            events.append((group, [bool((part[:2] != 0xFF).any()) for part in parts], parts[group][:2].clone()))
        else:
            events.append(type(event))

    pipeline = StepPipeline(runner, post)
    pipeline.launch(plan)
    pipeline.close()
    assert [event if event is StepDone else event[:2] for event in events] == [
        (0, [True, False, False]),
        (1, [True, True, False]),
        (2, [True, True, True]),
        StepDone,
    ]
    for (_, _, seen), part in zip(events[:3], parts, strict=True):
        assert torch.equal(seen, part[:2])
