"""The requests of the offline benchmark: prompts of random tokens, and the length of each output."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

_LAST_TOKEN = 10_000  # the highest token id that nano-vllm draws


@dataclass(frozen=True)
class LengthRange:
    """Lengths in tokens, drawn uniformly; both ends included."""

    low: int
    high: int

    @staticmethod
    def parse(text: str) -> LengthRange:
        """Read ``low:high``, or one number for both.

        Raises:
            ValueError: if it is neither.
        """
        low, _, high = text.partition(":")
        high = high or low
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
            raise ValueError(f"{text!r} is no range of lengths; write for example 100:1024, or 512")
        return LengthRange(int(low), int(high))

    def draw(self, random: Random) -> int:
        """Draw one length."""
        return random.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True)
class BatchShape:
    """Number and lengths of the sequences of a batch."""

    num_seqs: int
    input_len: LengthRange
    output_len: LengthRange


PRESETS = {
    "nano": BatchShape(256, LengthRange(100, 1024), LengthRange(100, 1024)),
    "one-stream": BatchShape(1, LengthRange(512, 512), LengthRange(256, 256)),
    "prefill": BatchShape(8, LengthRange(4096, 4096), LengthRange(1, 1)),
}
"""Shapes by name: nano-vllm's own benchmark, a single user, and prompts only."""


@dataclass(frozen=True)
class RequestBatch:
    """Requests that are all there at once.

    Attributes:
        prompts: token ids, all below ``vocab_size``.
        output_lens: tokens that each request generates, exactly.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    vocab_size: int

    @staticmethod
    def draw(shape: BatchShape, seed: int, vocab_size: int) -> RequestBatch:
        """Draw as nano-vllm's ``bench.py`` does, in its order, with Python's generator.

        For each prompt its length, then its tokens out of 0..10000; after all prompts the output
        lengths. A smaller vocabulary folds the tokens (modulo) and leaves the lengths as they are.
        """
        random = Random(seed)
        prompts = [
            [random.randint(0, _LAST_TOKEN) % vocab_size for _ in range(shape.input_len.draw(random))]
            for _ in range(shape.num_seqs)
        ]
        output_lens = [shape.output_len.draw(random) for _ in range(shape.num_seqs)]
        return RequestBatch(prompts, output_lens, vocab_size)

    def with_fresh_tokens(self, name: str) -> RequestBatch:
        """Return the same lengths with other tokens, so that the prefix cache holds none of the prompts.

        Args:
            name: seed of the tokens.
        """
        random = Random(name)
        last = min(_LAST_TOKEN, self.vocab_size - 1)
        prompts = [[random.randint(0, last) for _ in prompt] for prompt in self.prompts]
        return RequestBatch(prompts, self.output_lens, self.vocab_size)

    @property
    def input_lens(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.input_lens)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        return max(prompt + output for prompt, output in zip(self.input_lens, self.output_lens, strict=True))
