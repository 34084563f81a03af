"""One sample of a text request: tokens of the scheduler and their text go into the request's stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import msgspec

from hbserve.errors import HBServeError, RequestFailedError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.outputs import AT_DEAD_END, SampleDelta, TextStream
from hbserve.grammar import DEAD_END
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.messages.text import OutputText, TextStreamOptions
from hbserve.process import event_loop
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer.text_service import OutputStream, TextService


class OpenSample:
    """Sample between the scheduler, which gives tokens, and the text service, which gives text.

    Args:
        index: its number in ``stream``, which gets its text.
        request: what the scheduler gets.
        sampling: the user's parameters.
    """

    def __init__(
        self,
        service: TextService,
        vocab_size: int,
        index: int,
        request: AddRequest,
        sampling: SamplingParams,
        stream: TextStream,
    ) -> None:
        self._service, self._vocab_size = service, vocab_size
        self._index, self._request = index, request
        self._sampling, self._stream = sampling, stream
        self._client: EngineClient | None = None
        self._text: OutputStream | None = None  # None: not started, or ended
        self._outputs: deque[RequestOutput] = deque()  # outputs whose text is not here yet
        self._grammar = sampling.steering_grammar
        self._all_token_ids: list[int] = []  # only with a grammar
        self._has_ended = False
        self._check: asyncio.Task[None] | None = None

    def start(self, client: EngineClient) -> None:
        """Send the request to the scheduler."""
        sampling = self._sampling
        options = TextStreamOptions(
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop_strings,
            min_tokens=sampling.min_tokens,
            include_stop=sampling.include_stop_str_in_output,
        )
        self._text = self._service.open(options, self._on_text)
        self._client = client
        client.open(self._request, self._on_output)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to close."""
        return self._has_ended and self._check is None

    def abort_unstarted(self) -> None:
        """Finish the sample, because the user has aborted the request before its start."""
        self._has_ended = True
        self._push([], OutputText(text="", num_tokens=0), "abort", None)

    def close(self, finish_reason: str = "abort") -> None:
        """End the sample: its stream is closed, or its reader needs no more of it."""
        self._end(finish_reason)
        if self._check is not None:
            self._check.cancel()

    def _end(self, finish_reason: str = "abort") -> None:
        if not self._has_ended:
            self._has_ended = True
            if self._client is not None:
                self._client.close_request(self._request.request_id, finish_reason)
            if self._text is not None:
                self._text.close()
                self._text = None  # it refers to this sample: no cycle may be left to the garbage collector

    def _on_output(self, output: RequestOutput | HBServeError) -> None:
        if isinstance(output, HBServeError):
            self._end()
            self._stream.fail(output)
        elif self._text is None:
            return  # the sample has ended
        elif output.prompt_logprobs is not None:
            self._push([], OutputText(text="", num_tokens=0), None, None, output)
        else:
            if self._sampling.max_tokens == 0 and output.token_ids:
                output = msgspec.structs.replace(output, token_ids=[], logprobs=None, finish_reason="length")
            self._outputs.append(output)
            # An end token counts as a token, but has no text unless the request wants it.
            hides_end = output.finish_reason == "stop" and not self._sampling.include_stop_str_in_output
            shown = len(output.token_ids) - hides_end
            self._text.feed(output.token_ids, max(shown, 0), output.finish_reason is not None)

    def _on_text(self, text: OutputText | HBServeError) -> None:
        if isinstance(text, HBServeError):
            self._end()
            self._stream.fail(text)
            return
        output = self._outputs.popleft()
        if self._has_ended:
            return
        token_ids, finish_reason = output.token_ids[: text.num_tokens], output.finish_reason
        stop_reason: str | int | None = None
        if text.stop_string is not None:
            finish_reason, stop_reason = "stop", text.stop_string
        elif finish_reason == "stop" and token_ids and token_ids[-1] in (self._sampling.stop_token_ids or ()):
            stop_reason = token_ids[-1]
        if finish_reason is not None:
            self._end("stop")
        if self._grammar is not None:
            self._all_token_ids += token_ids
            if finish_reason == "stop" and stop_reason is None:
                self._check = asyncio.create_task(self._finish_checked(output, text))
                return
        self._push(token_ids, text, finish_reason, stop_reason, output)

    async def _finish_checked(self, output: RequestOutput, text: OutputText) -> None:
        """Finish a sample that follows its grammar, and fail any other: a grammar may become too complex on the way."""
        assert self._grammar is not None
        try:
            token_ids = self._all_token_ids[:-1]
            problem = await self._service.check_output(self._grammar, self._vocab_size, token_ids)
        except HBServeError as error:
            problem = str(error)
        if problem is None:
            self._push(output.token_ids, text, "stop", None, output)
        elif problem == DEAD_END:
            self._push(output.token_ids, text, "length", AT_DEAD_END, output)
        else:
            self._stream.fail(RequestFailedError(problem))

    def _push(
        self,
        token_ids: list[int],
        text: OutputText,
        finish_reason: str | None,
        stop_reason: str | int | None,
        output: RequestOutput | None = None,
    ) -> None:
        logprobs = None if output is None else output.logprobs
        self._stream.push(
            SampleDelta(
                index=self._index,
                text=text.text,
                token_ids=token_ids,
                logprobs=None if logprobs is None else logprobs[: len(token_ids)],
                finish_reason=finish_reason,
                stop_reason=stop_reason,
                num_prompt_tokens=len(self._request.prompt_token_ids),
                num_cached_tokens=0 if output is None else output.num_cached_tokens,
                prompt_logprobs=None if output is None else output.prompt_logprobs,
                num_accepted=0 if output is None else min(output.num_accepted, len(token_ids)),
                num_rejected=0 if output is None else output.num_rejected,
            )
        )


async def close_all(samples: Sequence[OpenSample], turn: event_loop.SharedTurn) -> None:
    """End many samples, in several turns of the event loop."""
    for sample in samples:
        sample.close()
        if turn.is_over:
            await turn.pass_on()
