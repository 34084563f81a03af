"""POST /v1/completions: the response to a prompt."""

from __future__ import annotations

from typing import Any, Self

from hbserve.frontend.outputs import Sample, SampleDelta
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.base import TokenLogprobs
from hbserve.server.bodies.json_route import beside_loop
from hbserve.server.generation import Deadline, Generation
from hbserve.server.logprobs import CompletionLogprobs, with_top
from hbserve.server.protocol import CompletionRequest


class Completion(Generation):
    """One completion request and its response. `create` makes it."""

    _body: CompletionRequest

    @classmethod
    async def create(cls, engine: TextEngine, body: CompletionRequest, deadline: Deadline) -> Self:
        """Check the body. Raises `InvalidRequestError`."""
        return await beside_loop(engine, body, lambda: cls(engine, body, deadline))

    def __init__(self, engine: TextEngine, body: CompletionRequest, deadline: Deadline) -> None:
        super().__init__(
            engine, body, body.prompts, body.sampling(engine.sampling_defaults), deadline, "cmpl", "text_completion"
        )
        self.param_names = {"grammar": body.grammar_param}
        self._echoes: dict[int, str] = {}  # by prompt: all its choices begin with the same
        self._logprobs = [
            CompletionLogprobs(engine.tokenizer, self._sampling.skip_special_tokens)
            for _ in range(self._num_choices if self._sampling.logprobs is not None else 0)
        ]

    def _choice(self, sample: Sample) -> dict[str, Any]:
        return self._part(sample, self._echo(sample) + sample.text, True)

    def _chunk_choices(self, delta: SampleDelta, is_first: bool) -> list[dict[str, Any]]:
        text = self._echo(delta) + delta.text if is_first else delta.text
        has_news = text or delta.finish_reason or delta.logprobs or delta.prompt_logprobs
        if not (has_news or self._stream_options.continuous_usage_stats or self._body.return_token_ids):
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
        choice = {
            "index": part.index,
            "text": text,
            "logprobs": self._logprobs[part.index].add(token_ids, entries) if entries else None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = part.token_ids
            if is_first:
                choice["prompt_token_ids"] = self._prompt_token_ids(part)
        return choice | self._prompt_logprobs(part) if is_first else choice

    def _echo(self, part: Sample | SampleDelta) -> str:
        """Return the text of a choice's prompt if the client wants it before the output; else an empty string."""
        if not self._body.echo:
            return ""
        number = part.index // self._sampling.n
        prompt = self._prompts[number]
        if isinstance(prompt, str) and not self._sampling.truncate_prompt_tokens:
            return prompt
        if number not in self._echoes:
            kept = self._prompt_token_ids(part)
            text = self._engine.tokenizer.decode(kept, skip_special_tokens=self._sampling.skip_special_tokens)
            self._echoes[number] = text
        return self._echoes[number]
