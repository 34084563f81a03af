"""POST /v1/completions: the response to a prompt."""

from __future__ import annotations

from typing import Any

from hbserve.frontend.outputs import Sample, SampleDelta
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.base import TokenLogprobs
from hbserve.server.generation import Deadline, Generation
from hbserve.server.logprobs import CompletionLogprobs, with_top
from hbserve.server.protocol import CompletionRequest


class Completion(Generation):
    """One completion request and its response."""

    _body: CompletionRequest

    def __init__(self, engine: TextEngine, body: CompletionRequest, deadline: Deadline) -> None:
        super().__init__(
            engine, body, body.prompts, body.sampling(engine.sampling_defaults), deadline, "cmpl", "text_completion"
        )
        self._logprobs = [
            CompletionLogprobs(engine.tokenizer, self._sampling.skip_special_tokens)
            for _ in range(self._num_choices if self._sampling.logprobs is not None else 0)
        ]

    def _choice(self, sample: Sample) -> dict[str, Any]:
        return self._part(sample, self._echo(sample.index) + sample.text, True)

    def _chunk_choices(self, delta: SampleDelta, is_first: bool) -> list[dict[str, Any]]:
        text = self._echo(delta.index) + delta.text if is_first else delta.text
        has_news = text or delta.finish_reason or delta.logprobs or delta.prompt_logprobs
        if not (has_news or self._stream_options.continuous_usage_stats):
            return []
        return [self._part(delta, text, is_first)]

    def _part(self, part: Sample | SampleDelta, text: str, is_first: bool) -> dict[str, Any]:
        token_ids: list[int] = []
        entries: list[TokenLogprobs | None] = []
        if self._logprobs and self._body.echo and is_first:
            entries += [None, *with_top(part.prompt_logprobs or (), self._sampling.logprobs or 0)]
            token_ids += self._prompt_token_ids(part)[: len(entries)]
        if part.logprobs:
            token_ids += part.token_ids
            entries += part.logprobs
        logprobs = self._logprobs[part.index].add(token_ids, entries) if entries else None
        return {
            "index": part.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        } | (self._prompt_logprobs(part) if is_first else {})

    def _echo(self, index: int) -> str:
        """Return the text of a choice's prompt if the client wants it before the output; else an empty string."""
        if not self._body.echo:
            return ""
        prompt = self._prompts[index // self._sampling.n]
        if isinstance(prompt, str):
            return prompt
        return self._engine.tokenizer.decode(prompt, skip_special_tokens=self._sampling.skip_special_tokens)
