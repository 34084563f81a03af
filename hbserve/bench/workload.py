"""What a benchmark asks for: prompts of random tokens, and how long each output is."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

_LAST_TOKEN = 10_000  # what nano-vllm draws up to, this token included


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

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True)
class WorkloadShape:
    """How many sequences, and how long they are."""

    num_seqs: int
    input_len: LengthRange
    output_len: LengthRange


PRESETS = {
    "nano": WorkloadShape(256, LengthRange(100, 1024), LengthRange(100, 1024)),
    "one-stream": WorkloadShape(1, LengthRange(512, 512), LengthRange(256, 256)),
    "prefill": WorkloadShape(8, LengthRange(4096, 4096), LengthRange(1, 1)),
}
"""Workloads by name: nano-vllm's own benchmark, one user alone, and prompts only."""


@dataclass(frozen=True)
class Workload:
    """A batch of requests.

    Attributes:
        prompts: token ids.
        output_lens: how many tokens each request generates, exactly.
        vocab_size: of the model; all token ids are below it.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    vocab_size: int

    @staticmethod
    def draw(shape: WorkloadShape, seed: int, vocab_size: int) -> Workload:
        """The draws of nano-vllm's ``bench.py``, in its order, with Python's generator.

        For each prompt its length, then its tokens out of 0..10000; after all prompts the output
        lengths. A smaller vocabulary folds the tokens (modulo) and leaves the lengths as they are.
        """
        random = Random(seed)
        prompts = [
            [random.randint(0, _LAST_TOKEN) % vocab_size for _ in range(_draw_length(random, shape.input_len))]
            for _ in range(shape.num_seqs)
        ]
        output_lens = [_draw_length(random, shape.output_len) for _ in range(shape.num_seqs)]
        return Workload(prompts, output_lens, vocab_size)

    def with_fresh_tokens(self, name: str) -> Workload:
        """The same lengths with other tokens, so that a prefix cache that saw this one does not help.

        Args:
            name: another one gives other tokens, the same one the same.
        """
        random = Random(name)
        last = min(_LAST_TOKEN, self.vocab_size - 1)
        prompts = [[random.randint(0, last) for _ in prompt] for prompt in self.prompts]
        return Workload(prompts, self.output_lens, self.vocab_size)

    @property
    def input_lens(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(prompt) for prompt in self.prompts]

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(self.input_lens)

    @property
    def num_output_tokens(self) -> int:
        """Of all requests."""
        return sum(self.output_lens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        return max(prompt + output for prompt, output in zip(self.input_lens, self.output_lens, strict=True))


def _draw_length(random: Random, lengths: LengthRange) -> int:
    return random.randint(lengths.low, lengths.high)
