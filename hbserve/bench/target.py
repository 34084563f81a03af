"""What a load is sent to: a URL, or an engine in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol


class ServeTarget(Protocol):
    """Takes requests. Its methods run in one event loop."""

    vocab_size: int
    max_model_len: int | None

    def generate(self, prompt: list[int], output_len: int, targets: dict[str, float]) -> AsyncGenerator[int]:
        """Send a request; yields the number of tokens with each arrival of some.

        Args:
            targets: ``ttft_ms`` and ``tpot_ms`` to send along, where the server is to know them.

        Raises:
            TargetError: in few words, why there is no answer.
        """

    async def split(self) -> tuple[float, float, bool] | None:
        """The prefill and decode shares of the device, percent, whether they are mixed; None: no such thing."""

    async def describe(self) -> dict[str, Any]:
        """What is being measured, for the results file."""


class TargetError(Exception):
    """A request has no answer, or not all of it."""


Connect = Callable[[], Any]
"""Makes an asynchronous context manager of a `ServeTarget`."""
