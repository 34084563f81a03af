"""Asynchronous Python API: a running system as one object. Runs in the event loop of the program or the API server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import zmq

from hbserve.config import Config
from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import EngineDeadError, SchedulerRestartingError, StartupError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.outputs import GenerationOutput, SampleDelta
from hbserve.frontend.text_engine import Prompt, TextEngine
from hbserve.frontend.text_pool import TextProcesses
from hbserve.import_path import check_not_importing
from hbserve.messages.admin import GetStats, Stats
from hbserve.messages.client import SchedulerReply
from hbserve.messages.supervisor import EventKind
from hbserve.model_files import read_config, read_sampling_defaults
from hbserve.model_store import with_model_folder
from hbserve.process.events import log_event
from hbserve.process.stopwatch import Start
from hbserve.rpc.cluster_key import ClusterKey
from hbserve.sampling_params import SamplingParams
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.system.auto_plan import Plan, PredictionProcess, choose
from hbserve.system.launcher import Launcher
from hbserve.system.prompt_batch import Samplings, as_batch, generate_all
from hbserve.system.running_plan import RunningPlan
from hbserve.tokenizer import ChatMessage, Tokenizer

_STATS_TIMEOUT_MS = 2_000
_STATS_TRIES = 5
"""A scheduler that ends takes the question with it."""


class DisaggregatedLLM:
    """System of scheduler and instances, started and stopped from one event loop.

    Args:
        config: flat or frozen configuration; frozen here, so that later changes have no effect.
        with_instances: False if the instances are started elsewhere and will connect.
        text_in_processes: encode and decode text in separate processes, as servers do.
        load_tokenizer: makes the tokenizer of this process, from its folder and the model's; called in a thread, while
            the other processes start.

    Attributes:
        config: what runs. From the first `start` on, a model that is given by name has its folder there, and mode
            ``auto`` has become the mode that it chose.
        running_plan: the plan of the running system, which may change; None: it is not running.

    Raises:
        ConfigError: naming the field that cannot be honoured.
    """

    def __init__(
        self,
        config: PdDisaggConfig | Config,
        with_instances: bool = True,
        text_in_processes: bool = False,
        load_tokenizer: Callable[[str, str], Tokenizer] = Tokenizer,
    ) -> None:
        self.config = config.freeze() if isinstance(config, PdDisaggConfig) else config
        self._plan: Plan | None = None
        self.running_plan: RunningPlan | None = None
        self._watching: asyncio.Task[None] | None = None
        self._key = ClusterKey.of(self.config)
        self._with_instances = with_instances
        self._launcher = Launcher(
            self.config, with_instances, self._on_scheduler_exit, self._on_dismissed, self.report_event
        )
        self._client: EngineClient | None = None
        self._engine: TextEngine | None = None
        self._text_in_processes, self._load_tokenizer = text_in_processes, load_tokenizer
        self._text: TextProcesses | None = None
        self._given_up: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start all processes and return when the system can serve requests.

        A model that is given by name is fetched first, at its first use; ``rpc.start_timeout_s`` begins after that.

        Raises:
            StartupError: naming what is missing at ``rpc.start_timeout_s``, or what failed and why.
            ModelError: if the model cannot be fetched, or config.json, generation_config.json or tokenizer is wrong.
        """
        if self._client is not None:
            raise StartupError("already started")
        self._loop = asyncio.get_running_loop()
        check_not_importing()
        self._given_up = None
        self.config = await asyncio.to_thread(with_model_folder, self.config)
        if self._with_instances and self.config.launcher == "local":
            read_config(Path(self.config.model.path))  # an instance would say what is wrong too, but seconds later
        if self._plan is None:
            self._launcher.config = self.config
            try:
                await self._make_plan()
            except BaseException:
                await self.stop()
                raise
        self._launcher.config = self.config
        deadline = time.monotonic() + self.config.rpc.start_timeout_s
        folder = Path(self.config.model.path)
        sampling_defaults = {} if self.config.model.generation_config == "none" else read_sampling_defaults(folder)
        loading: list[asyncio.Task[Any]] = []
        try:
            await asyncio.to_thread(self._launcher.set_core_apart)
            self._address = await self._launcher.start()  # first, because instances take longest
            if self._text_in_processes:
                self._text = TextProcesses(self.config, self._launcher.make_run_dir(), self.report_event)
                loading.append(asyncio.create_task(self._text.start(deadline)))
            reading = asyncio.to_thread(self._load_tokenizer, self.config.tokenizer_path, self.config.model.path)
            loading.append(asyncio.create_task(reading))
            await self._launcher.wait_ready()
            self._client = EngineClient(
                self._address,
                self.config.rpc,
                self._key,
                self._launcher.replace_scheduler,
                lambda request_id: self._launcher.forgive_scheduler(),
            )
            await self._client.connect()
            if self._given_up is not None:
                raise StartupError(self._given_up)
            ready = await self._client.wait_ready(max(1.0, deadline - time.monotonic()))
            *_, tokenizer = [await task for task in loading]
            self._engine = TextEngine(
                self._client,
                tokenizer,
                ready.max_model_len,
                ready.vocab_size,
                self._text,
                self.config.server.max_prompt_tokens if self._text_in_processes else None,
                self.config.performance.max_waiting_requests,
                sampling_defaults,
            )
            assert self._plan is not None
            self.running_plan = RunningPlan(self.config, self._plan, self._client, self.report_event)
            if self._plan.chosen_by == "auto" and self.running_plan.can_change:
                self._watching = asyncio.create_task(self.running_plan.watch())
        except BaseException:
            for task in loading:
                task.cancel()
            await asyncio.gather(*loading, return_exceptions=True)
            await self.stop()
            raise

    async def _make_plan(self) -> None:
        prediction = PredictionProcess()

        def on_places(num_instances: int, num_ranks: int) -> None:
            if not prediction.is_stopped:
                self._launcher.stand_by(num_instances, num_ranks)

        try:
            self.config, plan = await asyncio.to_thread(choose, self.config, prediction, on_places)
        finally:
            prediction.stop()  # a start that is given up does not wait for it
        self._plan, self._launcher.profile_path = plan, plan.profile_path
        self._launcher.learnt_profile = self._launcher.learnt_profile or plan.learnt_profile

    async def stop(self) -> None:
        """Abort the open requests and end all processes. May be called twice, in the event loop of the start."""
        self._check_loop()
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        self._engine = self.running_plan = None
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        text, self._text = self._text, None
        if text is not None:
            await text.stop()
        await self._launcher.stop()
        self._loop = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def plan(self) -> Plan | None:
        """What the system consists of now, and why; None before the first `start`."""
        return self._plan if self.running_plan is None else self.running_plan.plan

    @property
    def engine(self) -> TextEngine:
        """Text engine of the running system.

        Raises:
            EngineDeadError: if the system is not running.
        """
        if self._engine is None:
            raise EngineDeadError("not started; await start() first")
        return self._engine

    @property
    def text_processes(self) -> TextProcesses | None:
        """Text processes, or None if this process does their work."""
        return self._text

    @property
    def client(self) -> EngineClient:
        """Client of the scheduler.

        Raises:
            EngineDeadError: if the system is not running.
        """
        if self._client is None:
            raise EngineDeadError("not started; await start() first")
        return self._client

    @property
    def launcher(self) -> Launcher:
        """Launcher of the system's processes."""
        return self._launcher

    @property
    def latest_starts(self) -> list[Start]:
        """When and how the processes of the system were started last."""
        starts = self._launcher.latest_starts + ([] if self._text is None else self._text.latest_starts)
        return [start for start in starts if start is not None]

    @property
    def supervisors(self) -> dict[str, ProcessRotationManager]:
        """Rotation managers of the ``semi_pd`` instances, by instance name."""
        return self._launcher.supervisors

    async def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Samplings = None
    ) -> list[GenerationOutput]:
        """Generate for one prompt or several at once; strings or token ids.

        Returns:
            One output per prompt, in order.

        Raises:
            InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError
        """
        self._check_loop()
        max_waiting = self.config.performance.max_waiting_requests
        return await generate_all(self.engine, as_batch(prompts), sampling_params, max_waiting)

    async def chat(
        self, messages: Sequence[ChatMessage], sampling_params: SamplingParams | None = None
    ) -> GenerationOutput:
        """Answer a conversation, by the model's chat template. Errors as in `generate`."""
        self._check_loop()
        return await self.engine.generate_chat(messages, sampling_params or self.engine.default_sampling)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[SampleDelta]:
        """Iterate over the deltas of one request; leaving the loop early aborts it. Errors as in `generate`."""
        self._check_loop()
        return self.engine.stream(prompt, sampling_params or self.engine.default_sampling, request_id)

    def abort(self, request_id: str) -> None:
        """End a streamed request by its id; unknown ids are ignored."""
        self.engine.abort(request_id)

    def get_system_stats(self) -> dict[str, Any]:
        """Ask the scheduler for its statistics: see `hbserve.scheduler.stats.SystemStats` for the keys.

        Uses a short synchronous exchange (about a millisecond), so that any code may call it.

        Raises:
            SchedulerRestartingError: if the scheduler is being started again for longer than this waits.
            EngineDeadError: if the scheduler does not answer.
        """
        with zmq.Context() as context:
            for _ in range(_STATS_TRIES):
                if self.client.dead is not None:
                    raise self.client.dead
                with context.socket(zmq.DEALER) as socket:
                    socket.setsockopt(zmq.LINGER, 0)
                    if self._key is not None:
                        self._key.for_connecting(socket, self._address)
                    socket.connect(self._address)
                    socket.send(msgspec.msgpack.encode(GetStats(query_id=0)))
                    if socket.poll(_STATS_TIMEOUT_MS):
                        reply = msgspec.msgpack.decode(socket.recv(), type=SchedulerReply)
                        assert isinstance(reply, Stats)
                        return reply.stats
        if self.client.restarting is not None:
            raise SchedulerRestartingError(self.client.restarting)
        raise EngineDeadError("the scheduler does not answer")

    def _check_loop(self) -> None:
        """Refuse another event loop than that of the start: it would wait for ever.

        Raises:
            RuntimeError
        """
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._loop not in (None, running):
            raise RuntimeError("this system was started in another event loop; use it there, or use LLM")

    def report_event(self, kind: EventKind, subject: str, text: str) -> None:
        """Log an event of this process, and tell the scheduler, which keeps it."""
        log_event(kind, subject, text)
        if kind == "given_up" and self._engine is None:  # `start` must not wait for what cannot come any more
            self._given_up = f"{subject}: {text}"
            if self._client is not None:
                self._client.give_up_waiting(self._given_up)
        if self._client is not None and self._client.dead is None:
            self._client.report_event(kind, subject, text)

    def _on_dismissed(self, instance_id: str) -> None:
        if self._client is not None and self._client.dead is None:
            self._client.forget_instance(instance_id)

    def _on_scheduler_exit(self, reason: str) -> None:
        if self._client is not None:
            self._client.declare_dead(reason)
