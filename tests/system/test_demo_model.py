"""The demo model in examples/models answers held-out questions of its language, through transformers on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "models" / "hbserve-demo"
sys.path.insert(0, str(ROOT / "examples"))

import demo_language as language  # noqa: E402


class Chat:
    """The model with its tokenizer, answering batches of questions greedily."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER, padding_side="left", local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True).eval()

    def answers(self, questions: list[language.Question]) -> list[str]:
        prompts = [
            self.tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
            for question in questions
        ]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        output = self.model.generate(**inputs, max_new_tokens=160)
        texts: list[str] = self.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts

    def accuracy(self, questions: list[language.Question]) -> float:
        right = 0
        for start in range(0, len(questions), 10):
            batch = questions[start : start + 10]
            right += sum(text == question.answer for text, question in zip(self.answers(batch), batch, strict=True))
        return right / len(questions)


@pytest.fixture(scope="module")
def chat() -> Iterator[Chat]:
    # One thread is the fastest for a model of this size, above all when other work shares the cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Chat(torch.bfloat16)
    torch.set_num_threads(threads)


def test_folder_is_small_and_complete() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20


def test_shape_suits_the_kernels_and_tensor_parallelism(chat: Chat) -> None:
    config = chat.model.config
    assert config.model_type == "qwen3"
    assert config.head_dim == 64
    assert config.num_attention_heads % 2 == 0
    assert config.num_key_value_heads % 2 == 0
    assert config.tie_word_embeddings


def test_chat_template_is_chatml(chat: Chat) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.tokenizer.eos_token == "<|im_end|>"
    assert chat.tokenizer.encode("<|im_end|>") == [chat.model.config.eos_token_id]


@pytest.mark.parametrize(
    "text", ["naïve café", "你好 世界", "🙂 tab\t and\r\nlines  ", "\x00\x7f", "int main() { return 0; }"]
)
def test_tokenizer_keeps_any_text(chat: Chat, text: str) -> None:
    assert chat.tokenizer.decode(chat.tokenizer.encode(text)) == text


@pytest.mark.parametrize("turns", [1, 3])
def test_recall_of_held_out_pairs(chat: Chat, turns: int) -> None:
    rng = Random(11 + turns)
    questions = [language.recall_question(rng, num_pairs, turns=turns) for num_pairs in range(5, 105, 5)]
    assert chat.accuracy(questions) >= 0.95


def test_recall_reaches_the_whole_prompt(chat: Chat) -> None:
    rng = Random(12)
    questions = [language.recall_question(rng, 100, position=position) for position in range(0, 100, 5)]
    assert chat.accuracy(questions) >= 0.95


def test_recall_behind_a_long_conversation(chat: Chat) -> None:
    rng = Random(15)
    questions = [language.recall_question(rng, 40, turns=2, other_turns=others) for others in range(6, 31, 3)]
    longest = chat.tokenizer.apply_chat_template(questions[-1].messages, return_dict=False)
    assert len(longest) > 1200
    assert chat.accuracy(questions) >= 0.95


@pytest.mark.parametrize(
    ("make", "least"),
    [
        pytest.param(lambda rng: language.unknown_question(rng, rng.randint(1, 40)), 0.9, id="unknown"),
        pytest.param(lambda rng: language.copy_question(rng, rng.randint(1, 24)), 0.9, id="copy-words"),
        pytest.param(lambda rng: language.copy_question(rng, rng.randint(1, 8), numbers=True), 0.9, id="copy-numbers"),
        pytest.param(language.count_question, 0.9, id="count"),
        pytest.param(language.sum_question, 0.95, id="sum"),
    ],
)
def test_other_held_out_questions(chat: Chat, make: Callable[[Random], language.Question], least: float) -> None:
    rng = Random(13)
    assert chat.accuracy([make(rng) for _ in range(20)]) >= least


def test_facts(chat: Chat) -> None:
    assert chat.accuracy(language.fact_questions()) >= 0.95


def test_float32_gives_the_same_answers(chat: Chat) -> None:
    rng = Random(14)
    questions = [language.recall_question(rng, rng.randint(2, 60)) for _ in range(10)]
    assert Chat(torch.float32).answers(questions) == chat.answers(questions)


def test_questions_are_reproducible_and_stay_in_their_half() -> None:
    assert language.recall_question(Random(3), 20) == language.recall_question(Random(3), 20)
    pairs = language._draw_pairs(Random(4), 50, held_out=True)
    assert all(language.is_held_out(key, value) for key, value in pairs)
    pairs = language._draw_pairs(Random(4), 50, held_out=False)
    assert not any(language.is_held_out(key, value) for key, value in pairs)
