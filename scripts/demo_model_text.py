"""Text of the demo model: its tokenizer, and messages as its chat template writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import demo_language as language

__all__ = ["END_OF_TEXT", "TURN_END", "TURN_START", "VOCABULARY_SIZE", "language", "render", "train_tokenizer"]

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY_SIZE = 1024
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Words, single digits and punctuation (each with the space before it) and white space form their own pieces.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def render(messages: Iterable[language.Message]) -> str:
    """Write messages in ChatML, exactly as the chat template does (rendering that would be far too slow)."""
    return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the language; all 256 bytes are in it, so it can encode any text."""

    def texts() -> Iterator[str]:
        rng = Random(seed)
        for _ in range(4000):
            for message in language.training_conversation(rng, 500):
                yield f"{message['role']}\n"
                yield message["content"]
        for question in language.fact_questions() * 40:
            yield question.answer
        # Every key becomes a single token, which makes recall much easier to learn.
        yield from [f" {word}" for word in language.WORDS] * 500

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )
