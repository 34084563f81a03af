"""Synchronous Python API."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar

from tqdm import tqdm

from hbserve.config.flat import PdDisaggConfig
from hbserve.errors import EngineDeadError
from hbserve.frontend.outputs import GenerationOutput
from hbserve.frontend.text_engine import Prompt
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.system.disaggregated_llm import DisaggregatedLLM
from hbserve.system.prompt_batch import Samplings, as_batch, generate_all
from hbserve.tokenizer import ChatMessage

T = TypeVar("T")


class LLM:
    """Running system behind plain function calls.

    A thread (``hbserve-llm``) runs the event loop; scheduler and instances are processes. The system ends with the
    ``with`` block, with `close`, or at the latest with the program.

    Args:
        model: folder in Hugging Face layout.
        mode: ``unified``, ``disaggregated`` or ``semi_pd``. Default: from the types of ``gpu_instances``, else
            ``disaggregated``.
        arguments: any field of `PdDisaggConfig`.

    Raises:
        TypeError: naming an unknown argument and the nearest valid one.
        ConfigError, ModelError, StartupError: naming the setting at fault, or the part that did not start.
    """

    def __init__(self, model: str, *, mode: str | None = None, **arguments: Any) -> None:
        self._llm = DisaggregatedLLM(PdDisaggConfig.from_arguments(str(model), mode=mode, **arguments))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hbserve-llm", daemon=True)
        self._thread.start()
        self._is_closed = False
        self._pid = os.getpid()
        # The thread is a daemon because an ending interpreter joins other threads before it calls atexit.
        atexit.register(self.close)
        try:
            self._run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Samplings = None,
        use_tqdm: bool = True,
    ) -> list[GenerationOutput]:
        """Generate for one prompt or several at once, given as strings or token ids.

        Args:
            sampling_params: one for all prompts, or one per prompt.
            use_tqdm: show a progress bar.

        Returns:
            One output per prompt, in order.

        Raises:
            InvalidRequestError, OverloadedError, RequestFailedError, EngineDeadError
        """
        return self._run(self._generate(as_batch(prompts), sampling_params, use_tqdm))

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: Samplings = None,
        use_tqdm: bool = True,
    ) -> list[GenerationOutput]:
        """Answer one conversation or several, by the model's chat template; otherwise like `generate`."""
        self._check_open()
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        encode = self._llm.engine.tokenizer.encode_chat
        prompts: list[Prompt] = [encode(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self._run(self._generate(prompts, sampling_params, use_tqdm))

    def get_system_stats(self) -> dict[str, Any]:
        """Ask the scheduler for its statistics: see `hbserve.scheduler.stats.SystemStats` for the keys."""
        self._check_open()
        return self._llm.get_system_stats()

    @property
    def supervisors(self) -> dict[str, ProcessRotationManager]:
        """Rotation managers of the ``semi_pd`` instances, by instance name."""
        return self._llm.supervisors

    async def _generate(
        self, prompts: list[Prompt], sampling_params: Samplings, use_tqdm: bool
    ) -> list[GenerationOutput]:
        max_waiting = self._llm.config.performance.max_waiting_requests
        with tqdm(total=len(prompts), desc="Generating", unit="req", disable=not use_tqdm) as bar:
            return await generate_all(self._llm.engine, prompts, sampling_params, max_waiting, bar.update)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_open()
        except EngineDeadError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # also at Ctrl-C the requests must end
            future.cancel()
            raise

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise EngineDeadError(f"this LLM belongs to process {self._pid}; a fork of it needs one of its own")
        if self._is_closed:
            raise EngineDeadError("this LLM has been closed")

    def close(self) -> None:
        """End all processes. May be called twice; in a fork of the process it has no effect."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._llm.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
