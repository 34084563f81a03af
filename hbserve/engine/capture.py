"""The capture of CUDA graphs: compilation, warm-up, memory and stream."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from hbserve.platform.cuda_driver import upload_graph
from hbserve.platform.cuda_share import is_of_share

_MAX_COMPILERS = 8
T = TypeVar("T")
Parts = Generator[None, None, T]
"""Work that yields after each part, so that other work can go on in between, and returns its result at the end."""


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Compile and load the Triton kernels that this thread launches in the body, several at a time; run none of them.

    One after the other they take 10 s of an 8B model's first start on a machine. Their outputs stay undefined, so the
    body must not use one as an index or a length. Later launches find the kernels compiled.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    launch, owner = JITFunction.run, threading.get_ident()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        is_own = threading.get_ident() == owner  # other threads move KV with kernels of theirs
        return launch(kernel, *args, grid=grid, warmup=warmup or is_own, **options)

    size = min(_MAX_COMPILERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(size, "compile", initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        mode = AsyncCompileMode(pool)
        JITFunction.run = compile_only
        try:
            with mode:
                yield
        finally:
            JITFunction.run = launch
        # The attribute makes Triton load the kernel, and compile its launcher.
        list(pool.map(lambda kernel: kernel.result().run, mode.future_kernels.values()))


def run_to_capture(run: Callable[[], object]) -> None:
    """Run once what will be captured, so that it compiles or loads everything that it needs.

    ``run`` should be the smallest part that does so: steps of other workers run on the same device.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def capturing(graph: Any, pool: Any) -> Iterator[None]:
    """Capture the body, as `torch.cuda.graph` does, but keep torch's cached memory.

    `torch.cuda.graph` gives that memory back to the driver before each capture. To give it back and get it again takes
    time and delays the other workers on the device. The graph is uploaded to the device here, so that its first replay
    takes no longer than the next ones. Other threads may allocate memory, open handles and copy meanwhile: only what
    this thread does can spoil the capture.

    Args:
        pool: that the graph takes its memory from; None: a new one.
    """
    with _begun(graph, pool, "thread_local") as stream, torch.cuda.stream(stream):
        yield


def capture_in_parts(graph: Any, pool: Any, parts: Parts[T]) -> Parts[T]:
    """Capture what ``parts`` does, as `capturing`, and yield after each part.

    Between two parts this thread may launch other work, on any stream but the `capture_stream`.
    """
    with _begun(graph, pool, "relaxed") as stream:
        while True:
            with torch.cuda.stream(stream):
                try:
                    next(parts)
                except StopIteration as end:
                    result: T = end.value
                    break
            yield
    return result


@contextmanager
def _begun(graph: Any, pool: Any, mode: str) -> Iterator[Any]:
    stream = capture_stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(*(() if pool is None else (pool,)), capture_error_mode=mode)
    try:
        yield stream
    finally:
        with torch.cuda.stream(stream):
            graph.capture_end()
    upload_graph(graph, stream)


def run_through(parts: Parts[T]) -> T:
    """Do all parts at once, and return their result."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            result: T = end.value
            return result


def capture_stream() -> Any:
    """Return the stream to capture on: the current stream in a process that has a share of the device, else another.

    A graph's kernels run on the multiprocessors of the stream on which they were captured, not of the stream the graph
    is launched into.
    """
    current: Any = torch.cuda.current_stream()
    return current if is_of_share(current) else _own_stream()


def can_capture_beside_steps() -> bool:
    """Whether this thread may launch steps between the parts of a capture."""
    return bool(capture_stream() != torch.cuda.current_stream())


@cache
def _own_stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
