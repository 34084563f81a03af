"""Where CUDA graphs are captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from hbserve.platform.cuda_driver import upload_graph


def run_to_capture(run: Callable[[], object]) -> None:
    """Run once what will be captured, so that all it compiles or loads at its first call is there.

    As little of it as has all of that: others' steps run on the same device.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def capturing(graph: Any, pool: Any) -> Iterator[None]:
    """As `torch.cuda.graph`, which before each capture gives all memory that is cached back to the driver.

    To give it back and get it again takes time, and others on the device feel it. The graph is on the device
    afterwards: its first replay takes no longer than others.

    Args:
        pool: of the graph's memory; None: a new one.
    """
    stream = capture_stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(*(() if pool is None else (pool,)))
        try:
            yield
        finally:
            graph.capture_end()
    upload_graph(graph, stream)


def capture_stream() -> Any:
    """The stream to capture on: the current one where a process has a share of the device.

    A graph's kernels run where the stream they were captured on would run them, whichever stream
    the graph is launched into. The device's default stream cannot be captured.
    """
    current: Any = torch.cuda.current_stream()
    return current if current != torch.cuda.default_stream() else _own_stream()


@cache
def _own_stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
