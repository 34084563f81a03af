"""Text in, text out, over an `EngineClient`: checks prompts, makes n samples of a request, turns tokens into text.

Runs in the event loop of the API server, or of the program that embeds it. The path of one sample:

    prompt ── tokenize ──► AddRequest ──► scheduler
    reader ◄── TextStream ◄── text service ◄── RequestOutput ◄──┘
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from hbserve.errors import ContextLengthError, HBServeError, InvalidRequestError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.open_sample import OpenSample, close_all
from hbserve.frontend.outputs import GenerationOutput, Sample, SampleDelta, TextStream, logprobs_by_id
from hbserve.messages.client import AddRequest
from hbserve.messages.text import DEFAULT_CHAT, ChatOptions
from hbserve.process import event_loop
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer import ChatMessage, Tokenizer
from hbserve.tokenizer.text_service import LocalText, TextService

Prompt = str | list[int]

SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: spreads the seeds of n samples


_MIN_MAX_CHARS = 1_000_000
"""Characters that any prompt may have: encoding them takes about a second."""
_MAX_CHARS_PER_TOKEN = 32
"""Characters per token of the context that a longer prompt may have. A few tokens of white space are longer."""
_MIN_MAX_TOKENS = 131_072
"""Tokens that the prompts of one body may have in any case; with a longer context twice as many as it holds."""
_MANY_SAMPLES = 32
"""Samples from which on a request gives other requests their turn while it begins; beginning one takes 30 µs."""
_MAX_CLOSES_AT_ONCE = 64
"""Samples of a closed request that end at once; ending them takes 20 µs each. The others end in later turns."""


class _OpenRequest:
    """Request that has not ended, with the ids that its samples have at the scheduler."""

    def __init__(self) -> None:
        self.sample_ids: list[str] = []
        self.is_aborted = False
        self.stream: TextStream | None = None


def _check_kind(prompt: object) -> None:
    """Refuse what Python could read as token ids and the caller did not mean so, such as bytes or a dictionary."""
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        kind = f"{type(prompt).__module__}.{type(prompt).__qualname__}"
        raise InvalidRequestError(f"a prompt must be text or a list of token ids, got {kind}", "prompt")


class TextEngine:
    """Engine that serves prompts given as text or token ids; all users of an `EngineClient` go through it.

    Args:
        client: connected client; the engine lives in its event loop.
        max_model_len: maximum of prompt and output tokens together.
        vocab_size: size of the model's vocabulary; token ids in prompts must be below it.
        text: service that encodes and decodes; default: this process.
        max_prompt_tokens: longer prompts are refused; default: the context length.
        max_samples: requests with more samples are refused, since not all could wait; default: no limit.
        sampling_defaults: sampling parameters, by name, of requests that do not give them.

    Attributes:
        turn: time of the event loop that all requests with many samples share.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        max_model_len: int,
        vocab_size: int,
        text: TextService | None = None,
        max_prompt_tokens: int | None = None,
        max_samples: int | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.sampling_defaults = dict(sampling_defaults or {})
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.text = text or LocalText(tokenizer)
        self.turn = event_loop.SharedTurn()
        chars_per_token = min(_MAX_CHARS_PER_TOKEN, tokenizer.longest_token)
        self.text.max_chars = max(_MIN_MAX_CHARS, max_model_len * chars_per_token)
        self.text.max_tokens = max(_MIN_MAX_TOKENS, 2 * max_model_len)
        # Files may name ids that the model does not have, such as -1 for none.
        self._end_token_ids = frozenset(id_ for id_ in tokenizer.end_token_ids if 0 <= id_ < vocab_size)
        self._client = client
        self._open: dict[str, _OpenRequest] = {}
        self._num_samples = 0
        self._serial = itertools.count()
        self._max_prompt_tokens = max_prompt_tokens
        self._max_samples = max_samples
        self._ended: HBServeError | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def default_sampling(self) -> SamplingParams:
        """Sampling parameters of a request that gives none."""
        return SamplingParams(**self.sampling_defaults)

    async def open(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        request_id: str | None = None,
        waits_since: float | None = None,
    ) -> TextStream:
        """Start generating for prompts that belong together.

        Args:
            request_id: name for `abort`, unique among the open requests; default: a random one.
            waits_since: when the time to the first token began, on the monotonic clock; None: now.

        Returns:
            A stream that the caller must close; its sample ``p * n + i`` is sample i of prompt p.

        Raises:
            InvalidRequestError: naming the parameter that cannot be honoured.
            EngineDeadError: if the scheduler has ended.
        """
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        waits_since = time.monotonic() if waits_since is None else waits_since
        if request_id in self._open:
            raise InvalidRequestError(f"request id {request_id!r} is in use", "request_id")
        num_samples = len(prompts) * sampling.n
        if self._max_samples is not None and num_samples > self._max_samples:
            what = f"{num_samples} samples at once are more than the queue holds"
            limit = f"{self._max_samples}: performance.max_waiting_requests"
            raise InvalidRequestError(f"{what} ({limit})", "n" if sampling.n > 1 else "prompt")
        opened = self._open[request_id] = _OpenRequest()
        self._num_samples += num_samples
        samples: list[OpenSample] = []

        def close() -> None:
            self._open.pop(request_id, None)
            self._num_samples -= num_samples
            still_open = [sample for sample in samples if not sample.has_ended]
            for sample in still_open[:_MAX_CLOSES_AT_ONCE]:
                sample.close()
            if len(still_open) > _MAX_CLOSES_AT_ONCE:
                closing = asyncio.create_task(close_all(still_open[_MAX_CLOSES_AT_ONCE:], self.turn))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

        stream = opened.stream = TextStream(num_samples, close, lambda index: samples[index].close("stop"))
        is_large = num_samples >= _MANY_SAMPLES
        try:
            grammar = await self._check_sampling(sampling)
            prediction = await self._prediction_token_ids(sampling.prediction)
            # What the scheduler gets, checked once for all samples. It handles no text.
            sent = msgspec.structs.replace(sampling, n=1, stop=None, grammar=grammar, bad_words=None, prediction=None)
            for prompt in prompts:
                token_ids = await self._prompt_token_ids(prompt, sampling)
                if is_large and self.turn.is_over:
                    await self.turn.pass_on()
                stream.prompt_token_ids.append(token_ids)
                # The serial number keeps late outputs of an ended request out of a new request with the same id.
                ids = [f"{request_id}-{len(samples) + i}-{next(self._serial)}" for i in range(sampling.n)]
                opened.sample_ids += ids
                age_s = time.monotonic() - waits_since
                for request in self._requests(token_ids, sampling, sent, prediction, ids, age_s):
                    samples.append(OpenSample(self.text, self.vocab_size, len(samples), request, sampling, stream))
            if self._ended is not None:
                raise self._ended
            for sample in samples:
                if is_large and self.turn.is_over:
                    await self.turn.pass_on()
                if opened.is_aborted:  # before the scheduler knows the request
                    sample.abort_unstarted()
                else:
                    sample.start(self._client)
        except BaseException:
            stream.close()
            raise
        return stream

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, request_id: str | None = None
    ) -> AsyncGenerator[SampleDelta]:
        """Generate, and yield the deltas of all samples. Closing the iteration aborts samples that are not finished.

        Raises:
            InvalidRequestError: before the first delta, naming the parameter that cannot be honoured.
            OverloadedError, RequestFailedError, EngineDeadError: at any delta.
        """
        stream = await self.open([prompt], sampling, request_id)
        async with aclosing(stream.deltas()) as deltas:
            async for delta in deltas:
                yield delta

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, request_id: str | None = None
    ) -> GenerationOutput:
        """Generate, and return when all samples are finished. Errors as in `stream`."""
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        samples = [Sample(index=index) for index in range(sampling.n)]
        num_prompt_tokens = num_cached_tokens = 0
        stream = await self.open([prompt], sampling, request_id)
        async with aclosing(stream.deltas()) as deltas:
            async for delta in deltas:
                samples[delta.index].add(delta)
                num_prompt_tokens = delta.num_prompt_tokens
                num_cached_tokens += delta.num_cached_tokens if delta.index == 0 else 0
        outputs = [sample.to_output() for sample in samples]
        prompt_logprobs: list[dict[int, float] | None] | None = None
        if sampling.prompt_logprobs is not None:
            (token_ids,) = stream.prompt_token_ids
            scored = samples[0].prompt_logprobs or []  # fewer than the prompt's tokens if the request was aborted
            prompt_logprobs = [None, *logprobs_by_id(token_ids[1 : 1 + len(scored)], scored)]
        return GenerationOutput(
            request_id=request_id,
            text=outputs[0]["text"],
            token_ids=outputs[0]["token_ids"],
            finish_reason=outputs[0]["finish_reason"],
            stop_reason=outputs[0]["stop_reason"],
            logprobs=outputs[0]["logprobs"],
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
            samples=outputs,
        )

    async def generate_chat(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams,
        request_id: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        options: ChatOptions = DEFAULT_CHAT,
    ) -> GenerationOutput:
        """Generate the answer to a conversation, by the model's chat template. Errors as in `stream`."""
        return await self.generate(await self.text.encode_chat(messages, tools, options), sampling, request_id)

    def abort(self, request_id: str) -> None:
        """End a request; its samples finish with ``abort``. Unknown ids are ignored: the request may have ended."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.is_aborted = True
            for sample_id in opened.sample_ids:
                self._client.abort(sample_id)

    def end_all(self, error: HBServeError) -> None:
        """End every open request, and refuse every later one, with this error."""
        self._ended = error
        for opened in list(self._open.values()):
            if opened.stream is not None:
                opened.stream.fail(error)

    @property
    def num_open(self) -> int:
        """Number of requests that have not ended."""
        return len(self._open)

    @property
    def num_open_samples(self) -> int:
        """Number of samples of these requests, those that have not begun included."""
        return self._num_samples

    async def _prompt_token_ids(self, prompt: Prompt, sampling: SamplingParams) -> list[int]:
        if isinstance(prompt, str):
            token_ids = await self.text.encode(prompt)
            if token_ids and max(token_ids) >= self.vocab_size:
                raise InvalidRequestError(
                    f"the tokenizer writes the prompt with token id {max(token_ids)}, which is not in the model's "
                    f"vocabulary of {self.vocab_size} tokens",
                    "prompt",
                )
        else:
            _check_kind(prompt)
            token_ids = list(prompt)
        if not token_ids:
            raise InvalidRequestError("the prompt must not be empty", "prompt")
        num_kept = sampling.truncate_prompt_tokens
        if num_kept == -1:
            num_output = 1 if sampling.max_tokens is None else sampling.max_tokens
            num_kept = max(1, self.max_model_len - num_output)
        if num_kept:
            token_ids = token_ids[-num_kept:]
        if self._max_prompt_tokens is not None and len(token_ids) > self._max_prompt_tokens:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens; this server takes at most {self._max_prompt_tokens}", "prompt"
            )
        if len(token_ids) >= self.max_model_len + (sampling.max_tokens == 0):
            raise ContextLengthError(
                f"this model's maximum context length is {self.max_model_len} tokens; the prompt has {len(token_ids)}, "
                "and at least one is for the output, unless max_tokens is 0",
                "prompt",
            )
        if not isinstance(prompt, str):
            self.check_token_ids(token_ids, "prompt")  # last, because it takes longest
        return token_ids

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Check that token ids are in the model's vocabulary.

        Raises:
            InvalidRequestError: naming ``param``.
        """
        if not token_ids or (
            set(map(type, token_ids)) == {int} and 0 <= min(token_ids) <= max(token_ids) < self.vocab_size
        ):
            return
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequestError(f"{param}: token ids must be integers, got {token_id!r}", param)
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"{param}: token id {token_id} is not in the vocabulary of {self.vocab_size} tokens", param
                )

    async def _check_sampling(self, sampling: SamplingParams) -> str | None:
        """Check parameters that need the tokenizer; return the grammar to follow, which may differ from the given."""
        self.check_token_ids(sampling.stop_token_ids or (), "stop_token_ids")
        self.check_token_ids(list(sampling.logit_bias or ()), "logit_bias")
        if sampling.stop_strings and not self.tokenizer.has_text:
            raise InvalidRequestError("stop strings need a tokenizer, and this model has none", "stop")
        for stop in sampling.stop_strings if sampling.skip_special_tokens else ():
            hidden = None if self.tokenizer.hidden_token_id(stop) is not None else self.tokenizer.hidden_text_in(stop)
            if hidden is not None:
                raise InvalidRequestError(
                    f"stop: {stop!r} can never match, because the special token {hidden!r} is not part of the text; "
                    f"stop at {hidden!r} alone, or set skip_special_tokens to false",
                    "stop",
                )
        allowed = sampling.allowed_token_ids or ()
        self.check_token_ids(allowed, "allowed_token_ids")
        ends = self._end_token_ids | set(sampling.stop_token_ids or ())
        if allowed and sampling.min_tokens and ends.issuperset(allowed):
            rule = "must hold more than end tokens, because of min_tokens"
            raise InvalidRequestError(f"allowed_token_ids {rule}", "allowed_token_ids")
        grammar = sampling.steering_grammar
        if grammar is None:
            return None
        param = "bad_words" if sampling.bad_words else "grammar"
        if not self._end_token_ids:
            raise InvalidRequestError(f"the model names no end token, which {param} needs", param)
        try:
            return await self.text.check_grammar(grammar, self.vocab_size)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param) from error

    async def _prediction_token_ids(self, prediction: str | list[int] | None) -> list[int] | None:
        if isinstance(prediction, str):
            try:
                token_ids = await self.text.encode(prediction, add_special_tokens=False)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prediction: {error}", "prediction") from error
        else:
            token_ids = list(prediction or ())
        self.check_token_ids(token_ids, "prediction")
        return token_ids[: self.max_model_len] or None

    def _requests(
        self,
        token_ids: list[int],
        sampling: SamplingParams,
        sent: SamplingParams,
        prediction: list[int] | None,
        sample_ids: list[str],
        age_s: float,
    ) -> list[AddRequest]:
        """Make one request per sample, with all defaults resolved.

        Args:
            sent: parameters for the scheduler, but for the sample's seed and a default number of tokens.
        """
        max_output = self.max_model_len - len(token_ids)
        max_tokens = max_output if sampling.max_tokens is None else sampling.max_tokens
        if max_tokens > max_output:
            raise ContextLengthError(
                f"this model's maximum context length is {self.max_model_len} tokens; the prompt's {len(token_ids)} "
                f"and max_tokens={max_tokens} make {len(token_ids) + max_tokens}. "
                f"Shorten the prompt or ask for at most {max_output} tokens",
                "max_tokens",
            )
        end_token_ids = set(sampling.stop_token_ids or ())
        if not sampling.ignore_eos:
            end_token_ids |= self._end_token_ids
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        if sent.max_tokens != max_tokens:  # with 0 the scheduler gives one token, which `OpenSample` drops
            sent = msgspec.structs.replace(sent, max_tokens=max_tokens)
        requests = []
        for index, sample_id in enumerate(sample_ids):
            own = copy.copy(sent)  # `replace` would check all parameters again, which takes 30 µs
            msgspec.structs.force_setattr(own, "seed", (seed + index * SEED_STRIDE) % 2**63 if index else seed)
            requests.append(
                AddRequest(
                    request_id=sample_id,
                    prompt_token_ids=token_ids,
                    end_token_ids=sorted(end_token_ids),
                    sampling=own,
                    age_s=age_s,
                    predicted_token_ids=prediction,
                )
            )
        return requests
