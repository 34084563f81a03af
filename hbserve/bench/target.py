"""The system that a load is sent to: an engine in this process, or a server at a URL.

LoadTarget (protocol)
  ├── EngineTarget   a system that `start_engine` starts; requests go to the scheduler without HTTP
  └── HttpTarget     an OpenAI-compatible server that `connect_to_server` finds
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from hbserve import Config, DisaggregatedLLM, SamplingParams
from hbserve.bench.report import without_folders
from hbserve.errors import ConfigError, HBServeError
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.server_url import server_url
from hbserve.slo.constraints import SMAllocation

if TYPE_CHECKING:
    import aiohttp

_SPLIT_TIMEOUT_S = 30.0
_SCHEDULER_TIMEOUT_S = 30.0


class LoadTarget(Protocol):
    """A system that takes requests. All methods run in one event loop."""

    vocab_size: int
    max_model_len: int | None

    def generate(self, prompt: list[int], output_len: int, targets: dict[str, float]) -> AsyncGenerator[int]:
        """Send a request; yield the number of tokens at each arrival.

        Args:
            targets: ``ttft_ms`` and ``tpot_ms`` that the request carries; empty: none.

        Raises:
            TargetError: if the request has no complete answer; the text is the reason in a few words.
        """

    async def split(self) -> tuple[float, float, bool] | None:
        """Return prefill percent, decode percent and whether one worker mixes both; None without semi-PD."""

    async def drafts(self) -> dict[str, dict[str, int]]:
        """Return what the drafters of speculation have done so far, as in ``/stats``; empty: it does not say."""

    async def describe(self) -> dict[str, Any]:
        """Return what is measured, for the results file."""


class TargetError(Exception):
    """A request that has no complete answer."""


def split_in(status: dict[str, Any]) -> tuple[float, float, bool] | None:
    """Return the split of the first instance in a semi-PD status, as `LoadTarget.split` does."""
    for instance in status["instances"].values():
        shares = instance["current_sm_allocation"]
        return shares["prefill_percentage"], shares["decode_percentage"], shares["mixed"]
    return None


class EngineTarget:
    """A running system in this process. `start_engine` makes it.

    Args:
        sampling: parameters of every request; ``max_tokens`` and the targets are set per request.
    """

    def __init__(self, llm: DisaggregatedLLM, sampling: SamplingParams) -> None:
        self.vocab_size = llm.engine.vocab_size
        self.max_model_len: int | None = llm.engine.max_model_len
        self._llm = llm
        self._sampling = sampling

    async def generate(self, prompt: list[int], output_len: int, targets: dict[str, float]) -> AsyncGenerator[int]:
        """See `LoadTarget.generate`."""
        sampling = msgspec.structs.replace(self._sampling, max_tokens=output_len, **targets)
        try:
            async with aclosing(self._llm.stream(prompt, sampling)) as deltas:
                async for delta in deltas:
                    if delta.token_ids:
                        yield len(delta.token_ids)
        except HBServeError as error:
            raise TargetError(type(error).__name__) from error

    async def split(self) -> tuple[float, float, bool] | None:
        """Return the split of the first semi-PD instance."""
        return split_in({"instances": {name: manager.get_status() for name, manager in self._managers().items()}})

    async def set_split(self, allocation: SMAllocation) -> None:
        """Give all semi-PD instances this split; return when it is in effect."""
        for manager in self._managers().values():
            if manager.current_sm_allocation != allocation and manager.request_sm_reallocation(allocation):
                await asyncio.to_thread(manager.wait_until_settled, _SPLIT_TIMEOUT_S)

    async def restart_scheduler(self, config: Config) -> None:
        """Let the running instances serve under a scheduler of another configuration. No request may be open.

        Args:
            config: differs from the present one in ``scheduler``, ``chunked_prefill`` and ``performance`` only, and
                there in nothing that instances read.

        Raises:
            TimeoutError: if the new scheduler does not serve.
        """
        llm, launcher = self._llm, self._llm.launcher
        llm.config = launcher.config = msgspec.structs.replace(
            llm.config,
            scheduler=config.scheduler,
            chunked_prefill=config.chunked_prefill,
            performance=config.performance,
        )
        launcher.forgive_scheduler()
        launcher.scheduler.orders["config"] = msgspec.to_builtins(llm.config)
        launcher.scheduler.kill()  # the launcher starts it again, as after a crash
        async with (
            asyncio.timeout(_SCHEDULER_TIMEOUT_S),
            aclosing(self.generate([1], 1, {})) as arrivals,  # answered when the instances have registered
        ):
            async for _ in arrivals:
                pass

    def _managers(self) -> dict[str, ProcessRotationManager]:
        supervisors = self._llm.supervisors.items()
        return {name: manager for name, manager in supervisors if isinstance(manager, ProcessRotationManager)}

    async def drafts(self) -> dict[str, dict[str, int]]:
        """See `LoadTarget.drafts`."""
        counts: dict[str, dict[str, int]] = (await self._llm.client.stats())["cpu_scheduler"]["speculation"]
        return counts

    async def describe(self) -> dict[str, Any]:
        """Return the engine's whole configuration, without folders, and its statistics."""
        config: dict[str, Any] = without_folders(msgspec.to_builtins(self._llm.config))
        return {"config": config, "stats": await self._llm.client.stats()}


@asynccontextmanager
async def start_engine(config: Config, sampling: SamplingParams) -> AsyncIterator[EngineTarget]:
    """Start a system; end it when the body ends.

    Raises:
        HBServeError: if the system cannot start.
    """
    async with DisaggregatedLLM(config) as llm:
        yield EngineTarget(llm, sampling)


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    text: str | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class HttpTarget:
    """A server that streams completions of token ids. `connect_to_server` makes it.

    The usage field of each chunk counts the tokens where the server sends it (``stream_options``'s
    ``continuous_usage_stats``: vLLM, SGLang and HBServe do). Otherwise a chunk with text counts as one token.

    Args:
        session: its base URL is the server's address.
        body: fields of every request beside prompt and length.
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
        """See `LoadTarget.generate`."""
        import aiohttp

        body = msgspec.json.encode(self._body | targets | {"prompt": prompt, "max_tokens": output_len})
        num_tokens = 0
        ended = False
        try:
            async with self._session.post("/v1/completions", data=body) as response:
                if response.status != 200:
                    answer = await response.read()
                    # Every request makes the mistake behind a 400, so its text is shown. Other codes say enough.
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
                    count = _count_tokens(chunk, num_tokens)
                    if count:
                        num_tokens += count
                        yield count
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise TargetError(type(error).__name__) from None
        if not ended:
            raise TargetError("the stream broke off")

    async def split(self) -> tuple[float, float, bool] | None:
        """Ask ``GET /v1/semi_pd/status``; a server that refuses once is not asked again."""
        if not self._has_split:
            return None
        async with self._session.get("/v1/semi_pd/status") as response:
            if response.status != 200:
                self._has_split = False
                return None
            return split_in(await response.json())

    async def drafts(self) -> dict[str, dict[str, int]]:
        """Ask ``GET /stats``; other servers have no such route, or have something else there."""
        async with self._session.get("/stats") as response:
            try:
                counts: dict[str, dict[str, int]] = (await response.json())["cpu_scheduler"]["speculation"]
            except (ValueError, TypeError, KeyError):  # aiohttp's ContentTypeError is a ValueError
                return {}
            return counts

    async def describe(self) -> dict[str, Any]:
        """Return the server's address and model."""
        return {"url": str(self._session._base_url), "model": self._body["model"]}


def _count_tokens(chunk: _Chunk, num_tokens: int) -> int:
    """Return how many tokens a chunk adds to the ``num_tokens`` before it."""
    if chunk.usage is not None:
        return chunk.usage.completion_tokens - num_tokens
    return sum(bool(choice.text) for choice in chunk.choices)


def _reason(answer: bytes) -> str:
    try:
        error = msgspec.json.decode(answer, type=_Chunk).error
    except msgspec.DecodeError:
        return ""
    return f": {error.message[:200]}" if error is not None else ""


@asynccontextmanager
async def connect_to_server(
    url: str, model: str | None, vocab_size: int, sampling: dict[str, Any], timeout_s: float
) -> AsyncIterator[HttpTarget]:
    """Connect to a server; the environment variable ``HBSERVE_API_KEY`` is its key where it asks for one.

    Args:
        url: with or without ``/v1``.
        model: its name at the server; None: the only one.
        sampling: fields of every request's body.
        timeout_s: limit of a whole request.

    Raises:
        ConfigError: if there is no such server or model.
    """
    try:
        import aiohttp
    except ImportError:
        raise ConfigError("--url needs aiohttp: pip install 'hbserve[bench]'") from None
    base = server_url(url).geturl().removesuffix("/v1")
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
                models = {} if wants_key else {entry["id"]: entry for entry in (await response.json())["data"]}
        except (aiohttp.ClientError, TimeoutError, KeyError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(f"--url: no OpenAI-compatible server answers at {base}: {reason}") from None
        if wants_key:
            raise ConfigError(f"--url: {base} asks for an API key: put it into the environment, HBSERVE_API_KEY")
        if model is None and len(models) == 1:
            [model] = models
        if model not in models:
            raise ConfigError(f"--model: {base} has {', '.join(models) or 'no model'}; name one of them")
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"model": model, "stream": True, "stream_options": options, **sampling}
        yield HttpTarget(session, body, vocab_size, models[model].get("max_model_len"))
