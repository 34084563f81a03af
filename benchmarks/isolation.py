"""``python -m benchmarks isolation``: what one client's request does to the streams of others.

A well-behaved client streams from the front over an engine that costs nothing, one token per step. Another one sends
short chats, one after the other. Beside them one attack after the other runs: large, slow or malformed requests. Before
each attack the two clients are alone for a second. The columns of the table:

    alone    longest time between two chunks while there was no attack, ms: the noise of the machine
    beside   the same during the attack
    chat     longest time until a short chat was answered, with one token, alone and beside the attack, ms
    busy     most processor time that one process on the stream's way used between two chunks, ms, and its name

A machine that has other work makes ``alone`` and ``beside`` longer, but not ``busy``: it shows a process that computes
while a stream waits. The time of all its threads counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.front import HOST, front
from benchmarks.isolation_attacks import TEMPLATE, Attack, attacks
from hbserve.bench.arguments import check_new_file
from hbserve.process import event_loop

STEP_S = 0.01
NUM_TOKENS = 100
MAX_NUM_SEQS = 128
"""Sequences that the engine runs at a time: with more, the tokens alone would be all that the front can do."""
_ON_THE_WAY = ("api", "detokenizer", "stub")
"""Processes that each token of a stream passes."""


class Gaps(NamedTuple):
    """The worst of the times between two chunks of a stream.

    Attributes:
        longest_s: the longest.
        busy: most processor time that one process used in one of them, and its name.
    """

    longest_s: float = 0.0
    busy: tuple[float, str] = (0.0, "-")

    def with_gap(self, seconds: float, used: Mapping[str, float]) -> Gaps:
        """Add a gap. ``used``: processor time by process."""
        return self.joined(Gaps(seconds, max(((s, name) for name, s in used.items()), default=self.busy)))

    def joined(self, other: Gaps) -> Gaps:
        """Add the gaps of another stream."""
        return Gaps(max(self.longest_s, other.longest_s), max(self.busy, other.busy))


class Found(NamedTuple):
    """What an attack did.

    Attributes:
        status: its answer.
        seconds: until then.
        gaps: of the other client's streams.
        chat_s: longest time until a short chat was answered.
        cpu_s: processor time of each process during the attack.
    """

    status: str
    seconds: float
    gaps: Gaps
    chat_s: float
    cpu_s: Mapping[str, float]


class Clocks:
    """Clocks of processes, which tell their processor time. ``pids``: by name."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        # How Linux names the clock of another process, see clock_getcpuclockid(3).
        self._ids = {name: (~pid << 3) | 2 for name, pid in pids.items()}

    def read(self) -> dict[str, float]:
        """Return the seconds that each process has used."""
        return {name: time.clock_gettime(clock) for name, clock in self._ids.items()}

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Return the seconds that each process has used since an earlier `read`."""
        return {name: now - before[name] for name, now in self.read().items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", default="examples/models/hbserve-demo", help="folder whose tokenizer is used")
    parser.add_argument("--num-tokenizers", type=int, default=0, help="server.num_tokenizers")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the attacks")
    parser.add_argument("--only", help="part of the names of the attacks to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print each line as soon as it is known, and return all."""
    check_new_file("--json", arguments.json)
    chosen = {name: one for name, one in attacks(arguments.scale).items() if (arguments.only or "") in name}
    found: dict[str, Any] = {}
    heads = ["attack".ljust(44), "status", "seconds", "alone, ms", "beside, ms", "chat alone", "beside, ms", "busy, ms"]
    print("{} {:>8} {:>8} {:>10} {:>10} {:>10} {:>10} {:>9}".format(*heads), flush=True)
    with (
        model_with_template(arguments.model) as folder,
        front(folder, STEP_S, arguments.num_tokenizers, MAX_NUM_SEQS) as (port, pids),
    ):
        expected, _ = event_loop.run(stream(port, Clocks({})))
        clocks = Clocks({name: pid for name, pid in pids.items() if name in _ON_THE_WAY})
        for name, make in chosen.items():
            attack = make()  # before the streams, which the same event loop reads
            alone, chat_alone_s = event_loop.run(undisturbed(port, clocks))
            one = event_loop.run(disturb(port, attack, expected, clocks))
            found[name] = {
                "status": one.status,
                "seconds": round(one.seconds, 2),
                "alone_ms": round(alone.longest_s * 1000),
                "beside_ms": round(one.gaps.longest_s * 1000),
                "chat_alone_ms": round(chat_alone_s * 1000),
                "chat_beside_ms": round(one.chat_s * 1000),
                "busy_ms": round(one.gaps.busy[0] * 1000),
                "busy": one.gaps.busy[1],
                "cpu_s": {name: round(seconds, 2) for name, seconds in one.cpu_s.items()},
            }
            form = "{status:>8} {seconds:8.2f} {alone_ms:10} {beside_ms:10} {chat_alone_ms:10} {chat_beside_ms:10} "
            line = (form + "{busy_ms:9} {busy}").format(**found[name])
            print(f"{name:44} {line}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


@contextmanager
def model_with_template(model: str) -> Iterator[str]:
    """Copy a model folder without its weights, and give it `TEMPLATE`."""
    with tempfile.TemporaryDirectory(prefix="hbserve-") as folder:
        for file in Path(model).iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".jinja"):
                shutil.copy(file, folder)
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(config | {"chat_template": TEMPLATE}))
        yield folder


async def undisturbed(port: int, clocks: Clocks) -> tuple[Gaps, float]:
    """Stream while nothing else but short chats runs; return the gaps, and the longest time of a chat."""
    streaming = asyncio.create_task(stream(port, clocks))
    chat_s = await _chats_until(port, streaming)
    return (await streaming)[1], chat_s


async def disturb(port: int, attack: Attack, expected: str, clocks: Clocks) -> Found:
    """Run an attack beside a client that streams ``expected``, again and again.

    Raises:
        AssertionError: if a stream of the other client does not end with the right text.
    """
    is_streaming = asyncio.Event()
    began, before = time.monotonic(), clocks.read()
    attacking = asyncio.create_task(_attack(port, attack, is_streaming))
    chatting = asyncio.create_task(_chats_until(port, attacking))
    all_gaps = Gaps()
    while not attacking.done():
        text, gaps = await stream(port, clocks, is_streaming.set)
        assert text == expected, f"the other client's text is {text!r}, not {expected!r}"
        all_gaps = all_gaps.joined(gaps)
    status, ended = attacking.result()
    return Found(status, ended - began, all_gaps, await chatting, clocks.since(before))


async def stream(port: int, clocks: Clocks, on_token: Callable[[], object] = lambda: None) -> tuple[str, Gaps]:
    """Stream a completion; return its text and the gaps between its chunks."""
    reader, writer = await asyncio.open_connection(HOST, port)
    body = {"model": "bench", "prompt": "x", "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True}
    writer.write(_head("/v1/completions", content := json.dumps(body).encode()) + content)
    text, gaps, last, before = "", Gaps(), 0.0, clocks.read()
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        now = time.monotonic()
        if last:
            gaps = gaps.with_gap(now - last, clocks.since(before))
        last, before = now, clocks.read()
        text += json.loads(line[6:])["choices"][0]["text"]
        on_token()
    writer.close()
    return text, gaps


async def _chats_until(port: int, other: asyncio.Task[Any]) -> float:
    """Send short chats, one after the other, until another task is done; return the longest time of one."""
    longest_s = 0.0
    body = {"model": "bench", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    content = json.dumps(body).encode()
    while not other.done():
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(_head("/v1/chat/completions", content) + content)
        answer = await reader.read()
        writer.close()
        assert b" 200 " in answer[:20], answer
        longest_s = max(longest_s, time.monotonic() - began)
        await asyncio.sleep(0.05)
    return longest_s


async def _attack(port: int, attack: Attack, is_streaming: asyncio.Event) -> tuple[str, float]:
    await is_streaming.wait()

    async def send(path: str, body: bytes) -> str:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(_head(path, body))
        content = memoryview(body)
        try:
            for start in range(0, len(content), 1 << 17):
                writer.write(content[start : start + (1 << 17)])
                await writer.drain()
        except ConnectionError:
            pass  # it was refused before its end
        try:
            status = (await reader.readline()).split(b" ")[1].decode()
            while await reader.read(1 << 16):
                pass
        except (ConnectionError, IndexError):
            status = "closed"
        writer.close()
        return status

    status = await attack(send)
    return status, time.monotonic()


def _head(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
