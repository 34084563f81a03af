"""POST /v1/completions: the response to a prompt."""

from __future__ import annotations

from typing import Any

from hbserve.frontend.outputs import Sample, SampleDelta
from hbserve.frontend.text_engine import TextEngine
from hbserve.server.generation import Deadline, Generation
from hbserve.server.logprobs import CompletionLogprobs
from hbserve.server.protocol import CompletionRequest


class Completion(Generation):
    """One completion request and its response."""

    _body: CompletionRequest

    def __init__(self, engine: TextEngine, body: CompletionRequest, deadline: Deadline) -> None:
        super().__init__(engine, body, body.prompts, body.sampling(), deadline, "cmpl", "text_completion")
        self._logprobs = [
            CompletionLogprobs(engine.tokenizer, self._sampling.skip_special_tokens)
            for _ in range(self._num_choices if self._sampling.logprobs is not None else 0)
        ]

    def _choice(self, sample: Sample) -> dict[str, Any]:
        return self._part(sample, self._echo(sample.index) + sample.text)

    def _chunk_choices(self, delta: SampleDelta, is_first: bool) -> list[dict[str, Any]]:
        text = self._echo(delta.index) + delta.text if is_first else delta.text
        if not (text or delta.finish_reason or delta.logprobs or self._stream_options.continuous_usage_stats):
            return []
        return [self._part(delta, text)]

    def _part(self, part: Sample | SampleDelta, text: str) -> dict[str, Any]:
        logprobs = None
        if part.logprobs:
            logprobs = self._logprobs[part.index].add(part.token_ids, part.logprobs)
        return {
            "index": part.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }

    def _echo(self, index: int) -> str:
        """Return the text of a choice's prompt if the client wants it before the output; else an empty string."""
        if not self._body.echo:
            return ""
        prompt = self._prompts[index // self._sampling.n]
        if isinstance(prompt, str):
            return prompt
        return self._engine.tokenizer.decode(prompt, skip_special_tokens=self._sampling.skip_special_tokens)
