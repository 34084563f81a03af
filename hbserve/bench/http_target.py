"""An OpenAI-compatible server as the target of a load."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve.bench.target import TargetError
from hbserve.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class HttpTarget:
    """Streams completions of token ids. Made by `connect`.

    Tokens are counted by the usage of each chunk where the server sends it (``stream_options``'s
    ``continuous_usage_stats``, which vLLM, SGLang and HBServe know), else one per chunk.

    Args:
        session: with the server's address as its base.
        body: what every request has beside prompt and length.
    """

    def __init__(
        self, session: aiohttp.ClientSession, body: dict[str, Any], vocab_size: int, max_model_len: int | None
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._session = session
        self._body = body
        self._decoder = msgspec.json.Decoder(_Chunk)
        self._has_split = True

    async def generate(self, prompt: list[int], output_len: int, targets: dict[str, float]) -> AsyncGenerator[int]:
        """See `ServeTarget.generate`."""
        import aiohttp

        body = msgspec.json.encode(self._body | targets | {"prompt": prompt, "max_tokens": output_len})
        num_tokens = 0
        ended = False
        try:
            async with self._session.post("/v1/completions", data=body) as response:
                if response.status != 200:
                    answer = await response.read()
                    # What every request gets wrong is worth telling; else the number says what happened.
                    raise TargetError(f"HTTP {response.status}{_reason(answer) if response.status == 400 else ''}")
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.startswith(b"data: [DONE]"):
                        ended = True
                        continue
                    chunk = self._decoder.decode(line[6:])
                    if chunk.error is not None:
                        raise TargetError(f"in the stream: {chunk.error.code or chunk.error.message}")
                    count = self._count(chunk, num_tokens)
                    if count:
                        num_tokens += count
                        yield count
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise TargetError(type(error).__name__) from None
        if not ended:
            raise TargetError("the stream broke off")

    @staticmethod
    def _count(chunk: _Chunk, num_tokens: int) -> int:
        if chunk.usage is not None:
            return chunk.usage.completion_tokens - num_tokens
        return sum(bool(choice.text) for choice in chunk.choices)

    async def split(self) -> tuple[float, float, bool] | None:
        """From ``GET /v1/semi_pd/status``, where the server has it."""
        if not self._has_split:
            return None
        async with self._session.get("/v1/semi_pd/status") as response:
            if response.status != 200:
                self._has_split = False
                return None
            return split_in(await response.json())

    async def describe(self) -> dict[str, Any]:
        """The server's address and model."""
        return {"url": str(self._session._base_url), "model": self._body["model"]}


def _reason(answer: bytes) -> str:
    try:
        error = msgspec.json.decode(answer, type=_Chunk).error
    except msgspec.DecodeError:
        return ""
    return f": {error.message[:200]}" if error is not None else ""


def split_in(status: dict[str, Any]) -> tuple[float, float, bool] | None:
    """How the first instance in a semi-PD status is split, as in `Target.split`; None where there is none."""
    for instance in status["instances"].values():
        shares = instance["current_sm_allocation"]
        return shares["prefill_percentage"], shares["decode_percentage"], shares["mixed"]
    return None


@asynccontextmanager
async def connect(
    url: str, model: str | None, vocab_size: int, sampling: dict[str, Any], timeout_s: float
) -> AsyncIterator[HttpTarget]:
    """A target at a URL; its API key is in the environment, in ``HBSERVE_API_KEY``, if it asks for one.

    Args:
        url: with or without ``/v1``.
        model: its name there; None: the only one.
        sampling: fields of every request's body.
        timeout_s: of a whole request.

    Raises:
        ConfigError: if there is no such server or model.
    """
    try:
        import aiohttp
    except ImportError:
        raise ConfigError("--url needs aiohttp: pip install 'hbserve[bench]'") from None
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, got {url!r}")
    key = os.environ.get("HBSERVE_API_KEY")
    async with aiohttp.ClientSession(
        base,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        read_bufsize=1 << 20,
    ) as session:
        try:
            async with session.get("/v1/models") as response:
                wants_key = response.status == 401
                models = {} if wants_key else {one["id"]: one for one in (await response.json())["data"]}
        except (aiohttp.ClientError, TimeoutError, KeyError, TypeError, ValueError) as error:
            what = str(error) or type(error).__name__
            raise ConfigError(f"--url: no OpenAI-compatible server answers at {base}: {what}") from None
        if wants_key:
            raise ConfigError(f"--url: {base} asks for an API key: put it into the environment, HBSERVE_API_KEY")
        if model is None and len(models) == 1:
            [model] = models
        if model not in models:
            raise ConfigError(f"--model: {base} has {', '.join(models) or 'no model'}; name one of them")
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"model": model, "stream": True, "stream_options": options, **sampling}
        yield HttpTarget(session, body, vocab_size, models[model].get("max_model_len"))
