"""POST /v1/chat/completions: the response to a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from hbserve.frontend.outputs import Sample, SampleDelta
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.text import ChatOptions
from hbserve.sampling_params import SamplingParams
from hbserve.server.answers.reasoning import ReasoningParser, reasoning_parser
from hbserve.server.answers.tool_calls import ToolCallParser
from hbserve.server.answers.tool_formats import ToolFormat, tool_format
from hbserve.server.bodies.json_route import beside_loop
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.generation import Deadline, Generation
from hbserve.server.logprobs import chat_logprobs


@dataclass(frozen=True)
class AnswerGrowth:
    """Growth of a choice: its reasoning, its text, and its calls as `ToolCallParser.feed` returns them."""

    reasoning: str
    text: str
    calls: list[dict[str, Any]]
    finish_reason: str | None


class ChatCompletion(Generation):
    """One chat request and its response. `create` makes it.

    Args:
        prompt: token ids of the conversation.
        form: how the model writes calls of tools; None: it cannot.
    """

    _body: ChatCompletionRequest

    def __init__(
        self,
        engine: TextEngine,
        body: ChatCompletionRequest,
        prompt: list[int],
        sampling: SamplingParams,
        deadline: Deadline,
        form: ToolFormat | None,
    ) -> None:
        object_name = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(engine, body, [prompt], sampling, deadline, "chatcmpl", object_name)
        self.param_names = {"prompt": "messages", "grammar": body.grammar_param}
        if body.max_tokens is None:
            self.param_names["max_tokens"] = "max_completion_tokens"
        self._reasoning = [self._reasoning_parser(prompt) for _ in range(self._num_choices)]
        self._parsers: list[ToolCallParser | None] = [None] * self._num_choices
        self._watched: list[ToolCallParser] = []  # of choices that end with their first call
        self._watched_reasoning = [self._reasoning_parser(prompt) for _ in range(self._num_choices)]
        if body.offers_tools and form is not None:
            names = {tool.function.name for tool in body.tools or ()}
            only_one = body.parallel_tool_calls is False
            self._parsers = [
                ToolCallParser(form, names, forced=body.forces_calls, only_one=only_one) for _ in self._parsers
            ]
            if only_one and not body.forces_calls:  # a forced answer ends with its grammar
                self._watched = [ToolCallParser(form, names, only_one=True) for _ in self._parsers]
                self._may_end_early = True

    @classmethod
    async def create(cls, engine: TextEngine, body: ChatCompletionRequest, deadline: Deadline) -> Self:
        """Check the body, and encode the conversation by the model's chat template.

        Raises:
            InvalidRequestError, RequestTimeoutError, EngineDeadError
        """
        form = tool_format(engine.tokenizer.tools_template)

        def prepared() -> tuple[SamplingParams, list[dict[str, Any]] | None, ChatOptions]:
            sampling = body.sampling(engine.sampling_defaults, form, engine.tokenizer.added_token_id)
            return sampling, body.offered_tools, body.chat_options()

        async with deadline.applied():
            sampling, tools, options = await beside_loop(engine, body, prepared)
            prompt = await engine.text.encode_chat(body.messages, tools, options, body.is_light)
        return cls(engine, body, prompt, sampling, deadline, form)

    def _is_complete(self, delta: SampleDelta) -> bool:
        parser, reasoning, last = self._watched[delta.index], self._watched_reasoning[delta.index], delta.finish_reason
        text = delta.text if reasoning is None else reasoning.feed(delta.text, (), last is not None)[1]
        parser.feed(text, last=last is not None)
        return parser.num_complete_calls > 0

    def _head_of_prompt(self) -> dict[str, Any]:
        assert self._stream is not None, "the prompt is known once the request has been opened"
        return {"prompt_token_ids": self._stream.prompt_token_ids[0]} if self._body.return_token_ids else {}

    def _reasoning_parser(self, prompt: list[int]) -> ReasoningParser | None:
        if self._sampling.grammar is not None:
            return None  # it describes the whole output
        tokenizer, template = self._engine.tokenizer, self._body.chat_template
        return reasoning_parser(tokenizer, template or tokenizer.tools_template, prompt)

    def _parse(self, part: Sample | SampleDelta) -> AnswerGrowth:
        """Take reasoning and calls out of a choice's new text."""
        text, finish_reason = part.text, part.finish_reason
        last = finish_reason is not None
        reasoning = ""
        calls: list[dict[str, Any]] = []
        if (thinking := self._reasoning[part.index]) is not None:
            reasoning, text = thinking.feed(text, part.token_ids, last)
        if (parser := self._parsers[part.index]) is not None:
            text, calls = parser.feed(text, last=last)
            if finish_reason == "stop" and parser.ends_with_calls:
                finish_reason = "tool_calls"
        return AnswerGrowth(reasoning, text, calls, finish_reason)

    def _completion_details(self) -> dict[str, int]:
        num_tokens = sum(parser.num_tokens for parser in self._reasoning if parser is not None)
        return super()._completion_details() | ({"reasoning_tokens": num_tokens} if num_tokens else {})

    def _choice(self, sample: Sample) -> dict[str, Any]:
        # all at once: every call is whole
        new = self._parse(sample)
        message: dict[str, Any] = {"role": "assistant", "content": new.text if new.text or not new.calls else None}
        if new.reasoning and self._body.include_reasoning is not False:
            message["reasoning_content"] = new.reasoning
        if new.calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in new.calls]
        token_ids = {"token_ids": sample.token_ids} if self._body.return_token_ids else {}
        return token_ids | {
            "index": sample.index,
            "message": message,
            "logprobs": sample.logprobs and chat_logprobs(self._engine.tokenizer, sample.token_ids, sample.logprobs),
            "finish_reason": new.finish_reason,
            "stop_reason": sample.stop_reason,
        }

    def _prompt_part(self, sample: Sample) -> dict[str, Any]:
        return self._prompt_logprobs(sample)

    def _chunk_choices(self, delta: SampleDelta, is_first: bool) -> list[dict[str, Any]]:
        choices = []
        if is_first:
            choices = [_chunk_choice(delta.index, {"role": "assistant", "content": ""}) | self._prompt_logprobs(delta)]
        new = self._parse(delta)
        parts = {"content": new.text, "tool_calls": new.calls}
        if self._body.include_reasoning is not False:
            parts["reasoning_content"] = new.reasoning
        parts = {name: part for name, part in parts.items() if part}
        has_ids = bool(self._body.return_token_ids and delta.token_ids)
        if not parts and new.finish_reason is None and not delta.logprobs and not has_ids:
            return choices
        choice = _chunk_choice(delta.index, parts)
        if delta.logprobs:
            choice["logprobs"] = chat_logprobs(self._engine.tokenizer, delta.token_ids, delta.logprobs)
        if has_ids:
            choice["token_ids"] = delta.token_ids
        if new.finish_reason is not None:
            choice |= {"finish_reason": new.finish_reason, "stop_reason": delta.stop_reason}
        return [*choices, choice]


def _chunk_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
