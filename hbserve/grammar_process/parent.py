"""The side of the process that has grammars: starts, feeds, watches and replaces the grammar process.

A grammar process that ends, or works too long on one thing, is replaced, and its successor gets the state of every
output again. What it worked on at its end may be the cause:

    one thing alone took too long  ──►  that request fails
    other ends                     ──►  what it worked on becomes suspect, and suspects run one at a time
    an end at work on a suspect    ──►  that request fails

Methods may be called from any thread; none waits for the grammar process but `Follower.wait`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hbserve.errors import HBServeError, InvalidRequestError, RequestFailedError
from hbserve.grammar_process.worker import LENGTH_BYTES
from hbserve.messages.grammar import (
    CheckOutput,
    FeedOutput,
    FollowOutput,
    ForgetOutput,
    GrammarCommand,
    GrammarFailed,
    GrammarReply,
    Mask,
    OutputChecked,
    WorkBegun,
)
from hbserve.process import child
from hbserve.process.events import OnEvent, log_event
from hbserve.process.parent import ChildProcess

logger = logging.getLogger(__name__)

_MODULE = "hbserve.grammar_process.worker"
MAX_WORK_CPU_S = 5.0
"""Processor time for one mask, or for one check of a grammar."""
MAX_WORK_S = 30.0
"""Time for the same on a busy machine, or if the process does not compute at all; also until it begins some work."""
_MAX_START_S = 120.0
"""Time until a new process begins its first work."""
_LOOK_S = 1.0
_MAX_FAILED_STARTS = 3
_PAUSE_S = 10.0
"""Time between two starts after so many have failed."""
_TOO_COSTLY = "the grammar is too complex: its process took too much time or memory; make it smaller"


class Follower:
    """One output in its grammar; made by `GrammarProcess.follow`.

    Attributes:
        error: why there can be no mask any more.
        forced: see `Mask`; of the last mask.
    """

    def __init__(
        self, process: GrammarProcess, number: int, grammar: str, end_token_ids: list[int], token_ids: Sequence[int]
    ) -> None:
        self.error: str | None = None
        self.forced: list[int] = []
        self.number = number
        self.is_suspect = False
        self._process = process
        self._grammar, self._end_token_ids = grammar, end_token_ids
        self._token_ids = list(token_ids)
        self._is_done = threading.Event()
        self._is_slow = False
        self._mask: npt.NDArray[np.int32] | None = None
        self._draft: list[int] = []
        self._num_looked_at = 0  # tokens of the draft
        self._draft_masks: npt.NDArray[np.int32] | None = None  # behind those of them that the grammar allows

    @property
    def is_open(self) -> bool:
        """Whether the grammar process has to answer."""
        return not self._is_done.is_set()

    def command(self) -> FollowOutput:
        """Return the command with which a grammar process begins."""
        return FollowOutput(
            number=self.number,
            grammar=self._grammar,
            end_token_ids=self._end_token_ids,
            token_ids=self._token_ids,
            is_suspect=self.is_suspect,
            draft=self._draft,
        )

    def feed(self, token_ids: Sequence[int], draft: Sequence[int] = ()) -> None:
        """Add tokens, and have the mask after them computed, and those along a draft of the next ones."""
        with self._process.lock:
            self._token_ids += token_ids
            if self.error is None:
                if token_ids:
                    self._mask = None
                self._draft, self._num_looked_at, self._draft_masks = list(draft), 0, None
                self.forced = []
                self._is_done.clear()
                self._process.send(FeedOutput(number=self.number, token_ids=list(token_ids), draft=self._draft))

    def wait(self, deadline: float) -> npt.NDArray[np.int32] | None:
        """Return the mask after all tokens; None if it is not there by the deadline, or if there is an `error`.

        A slow grammar is not waited for: its mask is read at a later step.
        """
        if not self._is_slow:
            self._is_done.wait(max(0.0, deadline - time.monotonic()))
        with self._process.lock:
            return self._mask

    def wait_for_draft(self, deadline: float) -> tuple[int, npt.NDArray[np.int32] | None]:
        """Return how many tokens of the draft were looked at, and the masks behind those that the grammar allows.

        Behind a forbidden token anything may be sampled, since it does not count. Arguments as of `wait`.
        """
        self.wait(deadline)
        with self._process.lock:
            return self._num_looked_at, self._draft_masks

    def close(self) -> None:
        """Have no more work done."""
        self._process.forget(self.number)

    def on_reply(self, reply: Mask) -> None:
        """Take a mask; called by the process, under its lock."""
        self.is_suspect = False
        self._is_slow = reply.is_slow
        if reply.num_tokens == len(self._token_ids):
            self._mask = np.frombuffer(reply.words, np.int32)
            if reply.draft == self._draft[: len(reply.draft)] and bool(reply.draft) >= bool(self._draft):
                self._num_looked_at, self.forced = len(reply.draft), reply.forced
                if reply.draft_words:
                    self._draft_masks = np.frombuffer(reply.draft_words, np.int32).reshape(-1, len(self._mask))
                self._is_done.set()

    def fail(self, error: HBServeError) -> None:
        """Take note that there is no mask any more; called by the process, under its lock."""
        self.error, self._mask = str(error), None
        self._is_done.set()


class _Check:
    """A check that is not answered yet."""

    def __init__(self, number: int, grammar: str, token_ids: list[int] | None) -> None:
        self.number = number
        self.is_suspect = False
        self.is_open = True
        self.answer: Future[OutputChecked] = Future()
        self.answer.set_running_or_notify_cancel()
        self._grammar, self._token_ids = grammar, token_ids

    def command(self) -> CheckOutput:
        return CheckOutput(number=self.number, grammar=self._grammar, token_ids=self._token_ids)

    def fail(self, error: HBServeError) -> None:
        self.is_open = False
        self.answer.set_exception(error)


class GrammarProcess:
    """The process, which starts with the first work that there is for it.

    Args:
        folder: of the tokenizer.
        vocab_size: columns of the model's logits.
        starts_now: start at once, because a large vocabulary takes a second to read.

    Attributes:
        on_event: called in a thread when the process is replaced.
    """

    def __init__(self, folder: Path, vocab_size: int, starts_now: bool = False) -> None:
        self.lock = threading.RLock()
        self.on_event: OnEvent = log_event
        self._orders = {"folder": str(folder), "vocab_size": vocab_size}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[GrammarReply] = msgspec.msgpack.Decoder(GrammarReply)
        self._numbers = itertools.count(1)
        self._work: dict[int, Follower | _Check] = {}
        self._begun: dict[int, tuple[float, WorkBegun]] = {}  # since when the process works on what
        self._child: ChildProcess | None = None
        self._line: socket.socket | None = None  # None: there is no process that could take commands
        self._unsent = bytearray()
        self._input = bytearray()
        self._idle_until = 0.0  # when the process was last seen without work, or at work
        self._is_new = True  # the process has not begun anything yet
        self._num_failed_starts = 0
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._wake = -1
        if starts_now:
            self._start_thread()

    def follow(self, grammar: str, end_token_ids: list[int], token_ids: Sequence[int]) -> Follower:
        """Follow an output that has these tokens; the grammar must have been checked."""
        follower = Follower(self, next(self._numbers), grammar, end_token_ids, token_ids)
        self._add(follower)
        return follower

    def check(self, grammar: str, token_ids: list[int] | None = None) -> Future[OutputChecked]:
        """Check a grammar, or a finished output without its end token against it.

        Returns:
            The answer, or an `InvalidRequestError` about the grammar.
        """
        check = _Check(next(self._numbers), grammar, token_ids)
        self._add(check)
        return check.answer

    def _add(self, work: Follower | _Check) -> None:
        with self.lock:
            self._work[work.number] = work
            self.send(work.command())
            if self._thread is None:
                self._start_thread()

    def forget(self, number: int) -> None:
        """Have no more work done for an output, or a check."""
        with self.lock:
            if self._work.pop(number, None) is not None:
                self.send(ForgetOutput(number=number))

    def close(self) -> None:
        """End the process. No work may come later."""
        with self.lock:
            self._closing.set()
            if self._child is not None:
                self._child.kill()

    def send(self, command: GrammarCommand) -> None:
        """Send without waiting; called under the lock. A process that starts gets the state of all work."""
        if self._line is None:
            return
        payload = self._encoder.encode(command)
        self._unsent += len(payload).to_bytes(LENGTH_BYTES, "little") + payload
        self._send_unsent()
        if self._unsent:
            os.eventfd_write(self._wake, 1)

    def _send_unsent(self) -> None:
        assert self._line is not None
        with contextlib.suppress(BlockingIOError, ConnectionError):  # the thread sees the end of the process
            del self._unsent[: self._line.send(self._unsent, socket.MSG_DONTWAIT)]

    # --- the thread that has the process ---------------------------------------------------------

    def _start_thread(self) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="grammar-process", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.is_set():
            late: list[int] = []
            try:
                line = self._start()
            except OSError as error:  # of processes or descriptors
                how = f"cannot be started: {error}"
                self._closing.wait(_LOOK_S)
            else:
                try:
                    late = self._serve(line)
                except Exception:
                    logger.exception("bug while following grammars")
                how = self._end()
            if not self._closing.is_set():
                self.on_event("grammar_restarted", "the grammar process", f"it {how} and is replaced")
                self._judge(late, how)
                if self._num_failed_starts >= _MAX_FAILED_STARTS:  # it may fail as long as this process runs
                    self._closing.wait(_PAUSE_S)
        os.close(self._wake)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            orders = self._orders | {"line": theirs.fileno(), "logging": msgspec.to_builtins(child.logging_config())}
            process = ChildProcess("the grammar process", _MODULE, orders, pass_fds=[theirs.fileno()])
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
        with self.lock:
            self._child, self._line = process, ours
            self._unsent.clear()
            self._input.clear()
            self._begun.clear()
            self._idle_until = time.monotonic()
            self._is_new = True
            if self._closing.is_set():
                process.kill()
            for work in self._work.values():
                self.send(work.command())
        return ours

    def _serve(self, line: socket.socket) -> list[int]:
        """Exchange messages with the process until it ends, or is late; returns what it worked on too long."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        now = time.monotonic()
        while True:
            poll.register(line, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            ready = dict(poll.poll(_LOOK_S * 1000))
            with self.lock:
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                if self._unsent:
                    self._send_unsent()
            if ready.get(line.fileno(), 0) & ~select.POLLOUT:
                try:
                    data = line.recv(1 << 18)
                except ConnectionError:
                    return []
                if not data:
                    return []
                with self.lock:
                    self._take(data)
            before, now = now, time.monotonic()
            with self.lock:
                if now - before > 2 * _LOOK_S:  # this process did not run itself: that time does not count
                    self._idle_until += now - before
                    self._begun = {
                        number: (since + now - before, work) for number, (since, work) in self._begun.items()
                    }
                late = [number for number, begun in self._begun.items() if self._is_late(now, *begun)]
                if self._begun or not any(work.is_open for work in self._work.values()):
                    self._idle_until = now
                if late or now - self._idle_until > (_MAX_START_S if self._is_new else MAX_WORK_S):
                    return late

    def _is_late(self, now: float, since: float, begun: WorkBegun) -> bool:
        assert self._child is not None
        if now - since <= min(MAX_WORK_CPU_S, MAX_WORK_S):
            return False
        try:
            path = Path(f"/proc/{self._child.pid}/task/{begun.thread}/schedstat")
            cpu_s = int(path.read_text().split()[0]) / 1e9 - begun.cpu_s
        except (OSError, ValueError, IndexError):  # the process has ended, or the kernel does not count
            cpu_s = 0.0
        return cpu_s > MAX_WORK_CPU_S or now - since > MAX_WORK_S

    def _take(self, data: bytes) -> None:
        self._idle_until = time.monotonic()
        self._is_new = False
        self._input += data
        while len(self._input) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._input[:LENGTH_BYTES], "little")
            if len(self._input) < end:
                return
            reply = self._decoder.decode(self._input[LENGTH_BYTES:end])
            del self._input[:end]
            self._on_reply(reply)

    def _on_reply(self, reply: GrammarReply) -> None:
        self._num_failed_starts = 0
        if isinstance(reply, WorkBegun):
            self._begun[reply.number] = time.monotonic(), reply
            return
        self._begun.pop(reply.number, None)
        work = self._work.get(reply.number)
        if isinstance(work, Follower) and isinstance(reply, Mask):
            work.on_reply(reply)
        elif isinstance(work, _Check) and isinstance(reply, OutputChecked):
            del self._work[work.number]
            work.answer.set_result(reply)
        elif work is not None and isinstance(reply, GrammarFailed):
            self._fail(work, RequestFailedError(reply.error) if reply.is_bug else _invalid(reply.error))

    def _fail(self, work: Follower | _Check, error: HBServeError) -> None:
        self.forget(work.number)
        work.fail(error)

    def _end(self) -> str:
        """End the process, if it has not ended; returns how it ended, in words that follow its name."""
        with self.lock:
            process, line, self._line = self._child, self._line, None
        assert process is not None
        assert line is not None
        has_ended = process.wait_exit(0.1)
        process.kill()
        process.join()
        line.close()
        return f"ended with exit code {process.exit_code}" if has_ended else "took too long, and was killed"

    def _judge(self, late: list[int], how: str) -> None:
        """Find what the process died of; see the head of this file."""
        with self.lock:
            begun = [self._work[number] for number in self._begun if number in self._work]
            if not self._begun:
                self._num_failed_starts += 1
                if self._num_failed_starts >= _MAX_FAILED_STARTS:
                    for work in list(self._work.values()):
                        self._fail(work, RequestFailedError(f"the grammar process {how}, {_MAX_FAILED_STARTS} times"))
                return
            guilty = [work for work in begun if work.is_suspect or late == [work.number]]
            for work in guilty:
                self._fail(work, _invalid(_TOO_COSTLY))
            if not guilty:
                for work in begun:
                    work.is_suspect = True


def _invalid(what: str) -> InvalidRequestError:
    return InvalidRequestError(what, "grammar")
