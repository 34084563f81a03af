"""Drafts change no token: whatever a drafter guesses, the runner samples what it samples without drafts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from hbserve.engine.model_runner import ModelRunner
from hbserve.messages.worker import TO_BE_DRAFTED
from hbserve.sampling_params import SamplingParams
from tests.support.model_zoo import VOCAB_SIZE, save_head, save_model
from tests.support.plan_driver import Driver, Sequence
from tests.unit.engine.test_model_runner import make_prompt, make_runner

NUM_NEW = 40
END_TOKENS = [3, 4]
ALL_SAMPLING = [
    SamplingParams(temperature=0, max_tokens=None),
    SamplingParams(temperature=0, repetition_penalty=1.6, logprobs=2, max_tokens=None),
    SamplingParams(temperature=0.8, seed=1, presence_penalty=1.0, frequency_penalty=1.5, max_tokens=None),
    SamplingParams(temperature=0.9, seed=2, top_k=40, top_p=0.9, min_p=0.01, min_tokens=20, max_tokens=None),
    SamplingParams(temperature=1.0, seed=3, logit_bias={7: 4.0, 9: -100.0}, logprobs=0, max_tokens=None),
    SamplingParams(temperature=1.0, seed=4, allowed_token_ids=[*range(20, 60)], max_tokens=None),
]


@pytest.mark.parametrize("model", ["qwen3", "qwen2_window"])
def test_whatever_is_guessed_the_tokens_are_the_same(model: str, tmp_path: Path) -> None:
    """Right, random, half right and no guesses, of any length, in one batch with rows of every kind of sampling."""
    save_model(tmp_path, model)
    runner = make_runner(tmp_path)
    prompts = [make_prompt(length) for length in (3, 16, 31, 33, 20, 5)]

    def add_all(driver: Driver) -> list[Sequence]:
        return [
            driver.add(prompt, NUM_NEW, slot, sampling=sampling, end_token_ids=END_TOKENS)
            for slot, (prompt, sampling) in enumerate(zip(prompts, ALL_SAMPLING, strict=True))
        ]

    plain = Driver(runner, chunk=16)
    expected = add_all(plain)
    outputs = plain.run(*expected)
    for share_right in (0.0, 0.7, 1.0):
        rng = random.Random(f"{share_right}")

        def draft(sequence: Sequence, limit: int, rng: random.Random = rng, share: float = share_right) -> list[int]:
            done = len(sequence.output)
            right = outputs[sequence.slot][done : done + min(rng.choice((0, 1, 2, 5, 15)), limit)]
            return [token if rng.random() < share else rng.randrange(VOCAB_SIZE) for token in right]

        driver = Driver(runner, chunk=16, drafter=draft)
        sequences = add_all(driver)
        assert driver.run(*sequences) == outputs
        for sequence, alone in zip(sequences, expected, strict=True):
            for got, wanted in zip(sequence.logprobs, alone.logprobs, strict=True):
                assert (got is None) == (wanted is None)
                if got is not None and wanted is not None:
                    assert got.top_ids == wanted.top_ids
                    assert [got.token, *got.top] == pytest.approx([wanted.token, *wanted.top], abs=1e-4)
        assert driver.num_drafted > 100
        if share_right == 1.0:
            assert driver.num_accepted == driver.num_drafted
        else:
            assert driver.num_accepted < driver.num_drafted


@pytest.mark.parametrize("model", ["qwen3", "another", "head"])
def test_a_draft_model_changes_no_token_and_the_model_itself_is_always_right(model: str, tmp_path: Path) -> None:
    """The model drafts for itself, or another one or a random head does, with kept and with missing KV, for every kind
    of sampling.
    """
    save_model(tmp_path / "model", "qwen3")
    if model == "head":
        save_head(tmp_path / "draft")
    else:
        save_model(tmp_path / "draft", "llama" if model == "another" else model)
    options: dict[str, Any] = {"kv_dtype": "fp8", "quantization": "fp8"} if model == "another" else {}
    options |= {"method": "auto"} if model == "head" else {}
    runner = make_runner(tmp_path / "model", draft_model=str(tmp_path / "draft"), **options)
    prompts = [make_prompt(length) for length in (3, 16, 31, 33, 20, 5)]
    outputs, rates = [], []
    for drafts in (False, True):
        rng = random.Random(2)

        def draft(sequence: Sequence, limit: int, rng: random.Random = rng) -> list[int]:
            if rng.random() < 0.05:
                sequence.num_read = 0  # as if its KV were lost
            return [TO_BE_DRAFTED] * min(rng.choice((0, 1, 2, 5, 15)), limit)

        driver = Driver(runner, chunk=16, drafter=draft if drafts else None, rereads=model == "head")
        outputs.append(
            driver.run(
                *(
                    driver.add(prompt, 24, slot, sampling=sampling, end_token_ids=END_TOKENS)
                    for slot, (prompt, sampling) in enumerate(zip(prompts, ALL_SAMPLING, strict=True))
                )
            )
        )
        rates.append(driver.num_accepted / max(driver.num_drafted, 1))
    assert outputs[0] == outputs[1]
    assert rates[1] < 1  # penalties, biases and truncation change what the model would say
    plain = [driver.add(prompt, 24, slot) for slot, prompt in enumerate(prompts)]
    driver.num_drafted = driver.num_accepted = 0
    driver.run(*plain)
    assert driver.num_drafted > 60
    if model == "qwen3":
        assert driver.num_accepted == driver.num_drafted
    if model == "head":
        check_that_blocks_bring_what_a_head_reads(
            runner, make_runner(tmp_path / "model", draft_model=str(tmp_path / "draft"), **options)
        )


def check_that_blocks_bring_what_a_head_reads(here: ModelRunner, there: ModelRunner) -> None:
    """What a transfer or a tier moves is the bytes of blocks: the head guesses there what it guesses here."""
    sender, local = Driver(here), Driver(here, drafter=draft_all, rereads=True)
    receiver = Driver(there, drafter=draft_all, rereads=True)
    for length in (1, 2, 31, 33, 48):
        prompt = make_prompt(length)
        computed = sender.add(prompt, 1)
        sender.run(computed)
        moved = receiver.add(prompt, 24)
        moved.block_ids += [receiver.free.pop() for _ in computed.block_ids[1:]]
        for source, target in zip(computed.block_ids, moved.block_ids, strict=True):
            there.kv_blocks[target] = here.kv_blocks[source]
        moved.output, moved.computed = list(computed.output), length
        local.guesses.clear()
        receiver.guesses.clear()
        [expected] = local.run(local.add(prompt, 24))
        assert receiver.run(moved) == [expected]
        assert receiver.guesses == local.guesses


def draft_all(sequence: Sequence, limit: int) -> list[int]:
    return [TO_BE_DRAFTED] * min(3, limit)
