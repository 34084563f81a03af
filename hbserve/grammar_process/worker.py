"""Grammar process: computes masks and checks grammars for the process that started it (`hbserve.grammar_process`).

    main thread     reads commands
    lane threads    the work, in lanes, so that costly grammars do not stand before cheap ones:
                    begin    compiles grammars, and computes their first masks
                    quick    other masks
                    slow     masks of grammars that took long before, and all work of suspects
                    check    checks of grammars and of finished outputs

An output's matcher follows from its grammar and its tokens, so this process keeps nothing that its parent has not.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hbserve.config import LoggingConfig
from hbserve.errors import InvalidRequestError, ModelError
from hbserve.grammar import Matcher, Vocabulary, start_thread
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
from hbserve.tokenizer_files import read_vocabulary

logger = logging.getLogger(__name__)

LENGTH_BYTES = 4
"""A message on the line is its length, little-endian, and its msgpack."""
_QUICK_S = 0.05
"""CPU seconds. A grammar one of whose masks took longer is in the slow lane from then on."""
_MAX_MASK_CPU_S = 1.0
_MAX_DRAFT_CPU_S = 0.005
"""CPU seconds for the masks along one draft; a step waits for them."""
_MAX_FORCED = 64
_CPU_S_AT_START = 3.0
_CPU_S_PER_TOKEN = 0.03
_MAX_MEMORY_BYTES = 2 * 2**30
"""Memory for grammars, besides that of the vocabulary."""
_SLOW_NICENESS = 10
_CHECK_NICENESS = 5
_TOO_SLOW = "the grammar takes too much time to follow; make it smaller or less ambiguous"
_TOO_LARGE = "the grammar takes too much memory; make it smaller"


class _Job(Protocol):
    def work(self) -> None:
        """Do what is to be done."""


class _Lane:
    """Daemon threads that do jobs in the order in which they come.

    Args:
        niceness: of the threads; the system gives those with a higher one less time.
    """

    def __init__(self, name: str, num_threads: int, niceness: int = 0) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._niceness = niceness
        for number in range(num_threads):
            start_thread(self._run, f"{name}-{number}")

    def put(self, job: _Job) -> None:
        """Have a job done."""
        self._jobs.put(job)

    def _run(self) -> None:
        if self._niceness:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while True:
            self._jobs.get().work()


class GrammarWorker:
    """The commands of the parent, and the state of each output that it names.

    Args:
        line: connection to the parent.
        folder: of the tokenizer, which is read in the background.
        vocab_size: columns of the model's logits.
    """

    def __init__(self, line: socket.socket, folder: Path, vocab_size: int) -> None:
        self._line = line
        self._input = line.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(GrammarCommand)
        self._encoder = msgspec.msgpack.Encoder()
        self._send_lock = threading.Lock()
        self.vocabulary = _Vocabulary(folder, vocab_size)
        self.begin, self.quick = _Lane("begin", 2), _Lane("quick", 2)
        self.slow, self.check = _Lane("slow", 1, _SLOW_NICENESS), _Lane("check", 2, _CHECK_NICENESS)
        self._followers: dict[int, _Follower] = {}

    def run(self) -> None:
        """Obey the parent until it closes the line."""
        threading.Thread(target=self.vocabulary.read, name="vocabulary", daemon=True).start()
        while len(head := self._input.read(LENGTH_BYTES)) == LENGTH_BYTES:
            command = self._decoder.decode(self._input.read(int.from_bytes(head, "little")))
            if isinstance(command, FollowOutput):
                self._followers[command.number] = _Follower(self, command)
            elif isinstance(command, FeedOutput):
                self._followers[command.number].feed(command.token_ids, command.draft)
            elif isinstance(command, ForgetOutput):
                if command.number in self._followers:  # a check has no follower
                    self._followers.pop(command.number).close()
            else:
                self.check.put(_Check(self, command))

    def send(self, reply: GrammarReply) -> None:
        """Send to the parent, from any thread."""
        payload = self._encoder.encode(reply)
        with self._send_lock:
            self._line.sendall(len(payload).to_bytes(LENGTH_BYTES, "little") + payload)


class _Follower:
    """One output in its grammar. The main thread feeds tokens; one thread of a lane at a time does the work."""

    def __init__(self, worker: GrammarWorker, command: FollowOutput) -> None:
        self._worker, self._command = worker, command
        self._lock = threading.Lock()
        self._tokens: list[int] = []  # fed, and not taken by the work
        self._is_queued = self._is_closed = False
        self._is_slow = command.is_suspect
        self._matcher: Matcher | None = None
        self._cpu_s = 0.0
        self._num_tokens = 0
        self._draft: list[int] = []
        self.feed(command.token_ids, command.draft)

    def feed(self, token_ids: list[int], draft: list[int]) -> None:
        """Add tokens, and have the mask after them computed, and those along a draft of the next ones."""
        with self._lock:
            self._tokens += token_ids
            self._draft = draft
            if not self._is_queued and not self._is_closed:
                self._is_queued = True
                self._lane().put(self)

    def close(self) -> None:
        """Do no more work: the sequence has left. A mask that is being computed is the last."""
        with self._lock:
            self._is_closed = True

    def _lane(self) -> _Lane:
        if self._is_slow:
            return self._worker.slow
        return self._worker.begin if self._matcher is None else self._worker.quick

    def work(self) -> None:
        """Compute the mask after all tokens."""
        self._worker.vocabulary.wait()
        with self._lock:
            if self._is_closed:
                return
            tokens, self._tokens = self._tokens, []
            draft = self._draft
        number = self._command.number
        self._worker.send(_begun(number))
        is_first = self._matcher is None  # also compiles the grammar
        started = time.thread_time()
        mask, failed = self._compute(tokens)
        cpu_s = time.thread_time() - started
        draft_words: list[bytes] = []
        forced: list[int] = []
        if mask is not None:
            wanted = draft
            if draft:
                draft, draft_words = self._look_ahead(draft, mask)
            if len(draft_words) == len(wanted):
                forced = self._forced(wanted)
        with self._lock:
            num_before, self._num_tokens = self._num_tokens, self._num_tokens + len(tokens)
            if not is_first:
                self._cpu_s += cpu_s
                self._is_slow = self._is_slow or cpu_s > _QUICK_S
                allowed_s = _CPU_S_AT_START + _CPU_S_PER_TOKEN * (num_before + len(tokens))
                if failed is None and (cpu_s > _MAX_MASK_CPU_S or self._cpu_s > allowed_s):
                    failed = GrammarFailed(number=number, error=_TOO_SLOW)
            self._is_closed = self._is_closed or failed is not None
            self._is_queued = bool(self._tokens) and failed is None
            if self._is_queued:
                self._lane().put(self)
        if failed is not None:
            self._worker.send(failed)
        elif mask is not None:
            self._worker.send(
                Mask(
                    number=number,
                    num_tokens=num_before + len(tokens),
                    words=mask.tobytes(),
                    is_slow=self._is_slow,
                    draft=draft,
                    draft_words=b"".join(draft_words),
                    forced=forced,
                )
            )

    def _look_ahead(self, draft: list[int], mask: npt.NDArray[np.int32]) -> tuple[list[int], list[bytes]]:
        """Compute the masks along a draft while there is time; return the tokens that were looked at, and the masks."""
        assert self._matcher is not None, "a mask was computed"
        words: list[bytes] = []
        until = time.thread_time() + _MAX_DRAFT_CPU_S
        try:
            for ahead in self._matcher.masks_along(draft, mask):
                words.append(ahead.tobytes())
                if time.thread_time() > until:
                    return draft[: len(words)], words
        except Exception:  # the output itself is not concerned: it gets no further than the last mask
            logger.exception("bug while looking ahead in a grammar")
            return draft[: len(words)], words
        return draft, words

    def _forced(self, draft: list[int]) -> list[int]:
        """Return the next tokens behind a draft that the grammar leaves no choice of."""
        assert self._matcher is not None, "a mask was computed"
        try:
            return self._matcher.forced(draft)[:_MAX_FORCED]
        except Exception:  # the output itself is not concerned: these are only guesses
            logger.exception("bug while looking for forced tokens in a grammar")
            return []

    def _compute(self, tokens: list[int]) -> tuple[npt.NDArray[np.int32] | None, GrammarFailed | None]:
        number, error, is_bug = self._command.number, None, False
        try:
            if self._matcher is None:
                vocabulary = self._worker.vocabulary.get()
                self._matcher = vocabulary.follow(self._command.grammar, self._command.end_token_ids)
            self._matcher.advance(tokens)
            mask, error = self._matcher.mask(), self._matcher.error
            if error is None:
                return mask, None
        except InvalidRequestError as invalid:  # of a vocabulary that grammars cannot use
            error = str(invalid)
        except MemoryError:
            error = _TOO_LARGE
        except Exception:  # concerns one request; the others go on
            logger.exception("bug while following a grammar")
            error, is_bug = "the grammar could not be followed; see the log", True
        return None, GrammarFailed(number=number, error=error, is_bug=is_bug)


class _Check:
    """A check of a grammar, or of a finished output against it."""

    def __init__(self, worker: GrammarWorker, command: CheckOutput) -> None:
        self._worker, self._command = worker, command

    def work(self) -> None:
        """Check, and answer."""
        self._worker.vocabulary.wait()
        number, grammar, token_ids = self._command.number, self._command.grammar, self._command.token_ids
        self._worker.send(_begun(number))
        reply: GrammarReply
        try:
            vocabulary = self._worker.vocabulary.get()
            if token_ids is None:
                reply = OutputChecked(number=number, grammar=vocabulary.check(grammar))
            else:
                reply = OutputChecked(number=number, problem=vocabulary.problem_of(grammar, token_ids))
        except InvalidRequestError as error:
            reply = GrammarFailed(number=number, error=str(error))
        except (MemoryError, RecursionError):
            reply = GrammarFailed(number=number, error=_TOO_LARGE)
        except Exception:
            logger.exception("bug while checking a grammar")
            reply = GrammarFailed(number=number, error="the check of the grammar failed; see the log", is_bug=True)
        self._worker.send(reply)


def _begun(number: int) -> WorkBegun:
    return WorkBegun(number=number, thread=threading.get_native_id(), cpu_s=time.thread_time())


class _Vocabulary:
    """The vocabulary, or the reason why grammars do not work here, for the first request that has one."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder, self._vocab_size = folder, vocab_size
        self._is_read = threading.Event()
        self._vocabulary: Vocabulary | None = None
        self._error = "the tokenizer could not be read; see the log"

    def read(self) -> None:
        """Make the vocabulary; from then on the memory of this process is limited."""
        try:
            self._vocabulary = Vocabulary(read_vocabulary(self._folder), self._vocab_size)
        except (InvalidRequestError, ModelError) as error:
            self._error = str(error)
        finally:
            child.limit_memory(_MAX_MEMORY_BYTES)
            self._is_read.set()

    def wait(self) -> None:
        """Wait until it is read, before any work begins whose time counts."""
        self._is_read.wait()

    def get(self) -> Vocabulary:
        """Return the vocabulary, which has been read.

        Raises:
            InvalidRequestError: if grammars do not work here.
        """
        if self._vocabulary is None:
            raise InvalidRequestError(self._error, "grammar")
        return self._vocabulary


def main() -> None:
    """Entry point of the process."""
    orders = child.read_orders()
    child.set_process_title("hbserve-grammars")
    child.configure_logging(msgspec.convert(orders["logging"], LoggingConfig), "grammars")
    child.watch_parent(lambda: os._exit(0))
    line = socket.socket(fileno=orders["line"])

    def work() -> int:
        GrammarWorker(line, Path(orders["folder"]), orders["vocab_size"]).run()
        return 0

    child.exit_after(work)


if __name__ == "__main__":
    main()
