"""POST /v1/chat/completions: the response to a conversation."""

from __future__ import annotations

from typing import Any, Self

from hbserve.frontend.outputs import Sample, SampleDelta
from hbserve.frontend.text_engine import TextEngine
from hbserve.sampling_params import SamplingParams
from hbserve.server.chat_protocol import ChatCompletionRequest
from hbserve.server.generation import Deadline, Generation
from hbserve.server.logprobs import chat_logprobs
from hbserve.server.tool_calls import ToolCallParser
from hbserve.server.tool_formats import ToolFormat, tool_format


class ChatCompletion(Generation):
    """One chat request and its response. `create` makes it.

    Args:
        prompt: token ids of the conversation.
        form: how the model writes calls of tools; None: it cannot.
    """

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
        self._parsers: list[ToolCallParser | None] = [None] * self._num_choices
        self._watched: list[ToolCallParser] = []  # of choices that end with their first call
        if body.offered_tools and form is not None:
            names = {tool.function.name for tool in body.tools or ()}
            only_one = body.parallel_tool_calls is False
            self._parsers = [
                ToolCallParser(form, names, forced=body.forces_calls, only_one=only_one) for _ in self._parsers
            ]
            if only_one and not body.forces_calls:  # a forced answer ends with its grammar
                self._watched = [ToolCallParser(form, names, only_one=True) for _ in self._parsers]

    @classmethod
    async def create(cls, engine: TextEngine, body: ChatCompletionRequest, deadline: Deadline) -> Self:
        """Check the body, and encode the conversation by the model's chat template.

        Raises:
            InvalidRequestError, RequestTimeoutError, EngineDeadError
        """
        form = tool_format(engine.tokenizer.tools_template)
        sampling = body.sampling(engine.sampling_defaults, form, engine.tokenizer.added_token_id)
        async with deadline.applied():
            prompt = await engine.text.encode_chat(body.messages, body.offered_tools, body.chat_options())
        return cls(engine, body, prompt, sampling, deadline, form)

    def _is_complete(self, delta: SampleDelta) -> bool:
        if not self._watched:
            return False
        parser = self._watched[delta.index]
        parser.feed(delta.text, last=delta.finish_reason is not None)
        return parser.num_complete_calls > 0

    def _head_of_prompt(self) -> dict[str, Any]:
        assert self._stream is not None, "the prompt is known once the request has been opened"
        return {"prompt_token_ids": self._stream.prompt_token_ids[0]} if self._body.return_token_ids else {}

    def _parse(self, index: int, text: str, finish_reason: str | None) -> tuple[str, list[dict[str, Any]], str | None]:
        """Take the calls out of a choice's new text; return text, growth of calls, and the finish reason."""
        parser = self._parsers[index]
        if parser is None:
            return text, [], finish_reason
        text, calls = parser.feed(text, last=finish_reason is not None)
        if finish_reason == "stop" and parser.ends_with_calls:
            finish_reason = "tool_calls"
        return text, calls, finish_reason

    def _choice(self, sample: Sample) -> dict[str, Any]:
        # all at once: every call is whole
        text, calls, finish_reason = self._parse(sample.index, sample.text, sample.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        token_ids = {"token_ids": sample.token_ids} if self._body.return_token_ids else {}
        return token_ids | {
            "index": sample.index,
            "message": message,
            "logprobs": sample.logprobs and chat_logprobs(self._engine.tokenizer, sample.token_ids, sample.logprobs),
            "finish_reason": finish_reason,
            "stop_reason": sample.stop_reason,
        }

    def _prompt_part(self, sample: Sample) -> dict[str, Any]:
        return self._prompt_logprobs(sample)

    def _chunk_choices(self, delta: SampleDelta, is_first: bool) -> list[dict[str, Any]]:
        choices = []
        if is_first:
            choices = [_chunk_choice(delta.index, {"role": "assistant", "content": ""}) | self._prompt_logprobs(delta)]
        text, calls, finish_reason = self._parse(delta.index, delta.text, delta.finish_reason)
        has_ids = bool(self._body.return_token_ids and delta.token_ids)
        if not text and not calls and finish_reason is None and not delta.logprobs and not has_ids:
            return choices
        choice = _chunk_choice(delta.index, {"content": text} if text else {})
        if calls:
            choice["delta"]["tool_calls"] = calls
        if delta.logprobs:
            choice["logprobs"] = chat_logprobs(self._engine.tokenizer, delta.token_ids, delta.logprobs)
        if has_ids:
            choice["token_ids"] = delta.token_ids
        if finish_reason is not None:
            choice |= {"finish_reason": finish_reason, "stop_reason": delta.stop_reason}
        return [*choices, choice]


def _chunk_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
