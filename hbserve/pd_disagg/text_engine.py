"""Text in, text out, over an `EngineClient`: the one place where prompts are checked, n samples are
made of one request, and tokens become text."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

import msgspec

from hbserve.errors import InvalidRequestError
from hbserve.messages import AddRequest
from hbserve.pd_disagg.engine_client import EngineClient
from hbserve.pd_disagg.generation_output import GenerationOutput, Sample, SampleDelta
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer import ChatMessage, IncrementalDetokenizer, Tokenizer

Prompt = str | list[int]
T = TypeVar("T")

SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: spreads the seeds of n samples
LONG_TEXT = 20_000  # characters; a longer prompt takes milliseconds to encode, so not in the event loop


class _OpenRequest:
    """The ids under which the scheduler knows a request's samples."""

    def __init__(self, sample_ids: list[str]) -> None:
        self.sample_ids = sample_ids
        self.aborted = False


class TextEngine:
    """Serves prompts as text or token ids; every user of a scheduler's client goes through it.

    Args:
        client: connected; the engine lives in its event loop.
        max_model_len: most tokens of prompt and output together.
        vocab_size: of the model; token ids in prompts must be below it.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, max_model_len: int, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._client = client
        self._open: dict[str, _OpenRequest] = {}
        self._serial = itertools.count()

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt that the model's chat template makes of a conversation.

        Raises:
            InvalidRequestError: if there is no template or it rejects the messages.
        """
        return await asyncio.to_thread(self.tokenizer.encode_chat, messages)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, request_id: str | None = None
    ) -> AsyncGenerator[SampleDelta]:
        """Generate; deltas of all samples as they come. Closing the iteration aborts what is open.

        Args:
            request_id: a name for `abort`, unique among the open ones; default: a random one.

        Raises:
            InvalidRequestError: before the first delta, naming the parameter that cannot be honoured.
            OverloadedError, RequestFailedError, EngineDeadError: when it happens.
        """
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        if request_id in self._open:
            raise InvalidRequestError(f"request id {request_id!r} is in use", "request_id")
        # The number keeps late outputs of an ended request from a new one of the same name.
        sample_ids = [f"{request_id}-{index}-{next(self._serial)}" for index in range(sampling.n)]
        opened = self._open[request_id] = _OpenRequest(sample_ids)
        try:
            requests = self._requests(await self._prompt_token_ids(prompt), sampling, sample_ids)
            samples = [self._sample(index, request, sampling, opened) for index, request in enumerate(requests)]
            async with aclosing(merge_streams(samples)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            del self._open[request_id]

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, request_id: str | None = None
    ) -> GenerationOutput:
        """Generate, and return when all samples are finished. Errors as in `stream`."""
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        samples = [Sample(index=index) for index in range(sampling.n)]
        num_prompt_tokens = num_cached_tokens = 0
        async with aclosing(self.stream(prompt, sampling, request_id)) as deltas:
            async for delta in deltas:
                samples[delta.index].add(delta)
                num_prompt_tokens = delta.num_prompt_tokens
                num_cached_tokens += delta.num_cached_tokens if delta.index == 0 else 0
        outputs = [sample.to_output() for sample in samples]
        first = outputs[0]
        return {
            "request_id": request_id,
            "text": first["text"],
            "token_ids": first["token_ids"],
            "finish_reason": first["finish_reason"],
            "stop_reason": first["stop_reason"],
            "logprobs": first["logprobs"],
            "num_prompt_tokens": num_prompt_tokens,
            "num_cached_tokens": num_cached_tokens,
            "samples": outputs,
        }

    async def generate_chat(
        self, messages: Sequence[ChatMessage], sampling: SamplingParams, request_id: str | None = None
    ) -> GenerationOutput:
        """`generate` the answer to a conversation, by the model's chat template."""
        return await self.generate(await self.encode_chat(messages), sampling, request_id)

    def abort(self, request_id: str) -> None:
        """End a request; its samples finish with ``abort``. Unknown ids are ignored: it may just have ended."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.aborted = True
            for sample_id in opened.sample_ids:
                self._client.abort(sample_id)

    async def _prompt_token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if len(prompt) < LONG_TEXT:
                token_ids = self.tokenizer.encode(prompt)
            else:
                token_ids = await asyncio.to_thread(self.tokenizer.encode, prompt)
        else:
            token_ids = list(prompt)
            self._check_token_ids(token_ids, "prompt")
        if not token_ids:
            raise InvalidRequestError("the prompt must not be empty", "prompt")
        if len(token_ids) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens; the model takes at most {self.max_model_len} "
                "with at least one for the output",
                "prompt",
            )
        return token_ids

    def _check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequestError(f"{param}: token ids must be integers, got {token_id!r}", param)
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"{param}: token id {token_id} is not in the vocabulary of {self.vocab_size} tokens", param
                )

    def _requests(self, token_ids: list[int], sampling: SamplingParams, sample_ids: list[str]) -> list[AddRequest]:
        """One request per sample, with everything resolved that the scheduler should not have to guess."""
        self._check_token_ids(sampling.stop_token_ids or (), "stop_token_ids")
        if sampling.stop_strings and not self.tokenizer.has_text:
            raise InvalidRequestError("stop strings need a tokenizer, and this model has none", "stop")
        room = self.max_model_len - len(token_ids)
        max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
        if max_tokens > room:
            raise InvalidRequestError(
                f"the prompt's {len(token_ids)} tokens and max_tokens={max_tokens} make "
                f"{len(token_ids) + max_tokens}; the model takes at most {self.max_model_len}. "
                f"Shorten the prompt or ask for at most {room} tokens",
                "max_tokens",
            )
        end_token_ids = set(sampling.stop_token_ids or ())
        if not sampling.ignore_eos:
            end_token_ids |= {token_id for token_id in self.tokenizer.end_token_ids if token_id < self.vocab_size}
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return [
            AddRequest(
                request_id=sample_id,
                prompt_token_ids=token_ids,
                end_token_ids=sorted(end_token_ids),
                sampling=msgspec.structs.replace(
                    sampling,
                    n=1,
                    seed=(seed + index * SEED_STRIDE) % 2**63 if index else seed,
                    max_tokens=max_tokens,
                    stop=None,  # text is this side's affair
                ),
            )
            for index, sample_id in enumerate(sample_ids)
        ]

    async def _sample(
        self, index: int, request: AddRequest, sampling: SamplingParams, opened: _OpenRequest
    ) -> AsyncGenerator[SampleDelta]:
        """One sample's deltas; the last one has a finish reason."""
        detokenizer = IncrementalDetokenizer(
            self.tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop_strings,
            min_tokens=sampling.min_tokens,
        )
        num_prompt_tokens = len(request.prompt_token_ids)
        if opened.aborted:  # before the scheduler has heard of it
            yield SampleDelta(
                index=index,
                text="",
                token_ids=[],
                logprobs=None,
                finish_reason="abort",
                stop_reason=None,
                num_prompt_tokens=num_prompt_tokens,
                num_cached_tokens=0,
            )
            return
        async with aclosing(self._client.generate(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                token_ids, finish_reason = output.token_ids, output.finish_reason
                stop_reason: str | int | None = None
                # An end token is counted, but not shown.
                num_shown = len(token_ids) - (finish_reason == "stop")
                text = ""
                for num_tokens, token_id in enumerate(token_ids[:num_shown], start=1):
                    text += detokenizer.push(token_id)
                    if detokenizer.stop_string is not None:
                        token_ids = token_ids[:num_tokens]
                        break
                if finish_reason is not None and detokenizer.stop_string is None:
                    text += detokenizer.finish()
                if finish_reason == "stop" and token_ids and token_ids[-1] in (sampling.stop_token_ids or ()):
                    stop_reason = token_ids[-1]
                if detokenizer.stop_string is not None:
                    if finish_reason is None:
                        self._client.abort(request.request_id, "stop")
                    finish_reason, stop_reason = "stop", detokenizer.stop_string
                yield SampleDelta(
                    index=index,
                    text=text,
                    token_ids=token_ids,
                    logprobs=None if output.logprobs is None else output.logprobs[: len(token_ids)],
                    finish_reason=finish_reason,
                    stop_reason=stop_reason,
                    num_prompt_tokens=num_prompt_tokens,
                    num_cached_tokens=output.num_cached_tokens,
                )
                if finish_reason is not None:
                    return


async def merge_streams(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Items of several streams, which run concurrently, as they come.

    The first error ends it. However it ends, every stream is closed when it has.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[tuple[T] | asyncio.Task[None]] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T]) -> None:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait((item,))

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    num_open = len(tasks)
    try:
        while num_open:
            event = await queue.get()
            if isinstance(event, tuple):
                yield event[0]
            else:
                event.result()
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
