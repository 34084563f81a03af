"""Which slots have a grammar, where their outputs are in it, and which tokens may come next.

Threads of their own compute the masks, because a grammar is a stranger's program: a step waits for a mask for a few
milliseconds, and then goes on without a token for that row. The scheduler plans such a row again a little later.

    plan's tokens ──► _Follower.feed ──► queue of a lane ──► mask ──► masks() of this step, or of a later one
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hbserve.errors import InvalidRequestError, ModelError
from hbserve.grammar import Matcher, Vocabulary, start_thread
from hbserve.messages.worker import PlanRow, SequenceState
from hbserve.tokenizer_files import read_vocabulary

_MAX_WAIT_S = 0.02
"""Time that a step waits for the masks of all its rows."""
_QUICK_S = 0.05
"""CPU seconds. A grammar one of whose masks took longer is in the slow lane from then on."""
_MAX_MASK_CPU_S = 1.0
_MAX_MASK_S = 20.0
_CPU_S_AT_START = 3.0
_CPU_S_PER_TOKEN = 0.03
_NUM_QUICK_THREADS = 2
_NICENESS = 10
_TOO_SLOW = "the grammar takes too much time to follow; make it smaller or less ambiguous"


class GrammarTable:
    """Followers of the outputs by slot. All of it follows from the `SequenceState`s and the plans' own tokens.

    The scheduler plans a row with a grammar only when it knows the token before, so every token is in
    a plan's row before it matters here. Only the thread that launches steps calls the methods.

    Args:
        tokenizer_folder: read in the background. llguidance holds Python's lock meanwhile, for a second with a large
            vocabulary, so this must not happen beside the steps of others.

    Attributes:
        has_grammar: bool ``[slots]``.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, tokenizer_folder: str | Path) -> None:
        self.has_grammar = np.zeros(max_num_seqs, np.bool_)
        self._num_words = -(-vocab_size // 32)
        self._vocabulary = _Vocabulary(tokenizer_folder, vocab_size)
        self._followers: dict[int, _Follower] = {}
        self._num_known: dict[int, int] = {}  # per slot, tokens of prompt and output that the follower has
        self._missing: dict[int, str | None] = {}
        self._lanes: tuple[_Lane, _Lane] | None = None
        self._reader = threading.Thread(target=self._vocabulary.read, name="grammar-vocabulary", daemon=True)
        self._reader.start()

    def wait_until_read(self) -> None:
        """Return when the tokenizer's folder has been read."""
        self._reader.join()

    def install(self, state: SequenceState) -> None:
        """Take a sequence in, in place of whatever the slot had."""
        before = self._followers.pop(state.slot, None)
        if before is not None:
            before.close()
        grammar = state.sampling.grammar
        self.has_grammar[state.slot] = grammar is not None
        if grammar is None:
            return
        assert state.history is not None, f"slot {state.slot}: a grammar needs the history"
        if self._lanes is None:
            self._lanes = _Lane("grammar", _NUM_QUICK_THREADS), _Lane("slow-grammar", 1, _NICENESS)
        end_token_ids = state.end_token_ids

        def begin() -> Matcher:
            return self._vocabulary.get().follow(grammar, end_token_ids)

        follower = self._followers[state.slot] = _Follower(begin, *self._lanes)
        follower.feed(state.history[state.num_prompt_tokens :])
        self._num_known[state.slot] = len(state.history)

    def advance(self, rows: list[PlanRow]) -> None:
        """Take note of the tokens that a plan's rows bring, and have the masks after them computed."""
        if not self._followers:
            return
        for row in rows:
            follower = self._followers.get(row.slot)
            if follower is None:
                continue
            assert row.token_ids is not None, f"slot {row.slot} has a grammar and a token that only the device knows"
            new = self._num_known[row.slot] - row.start
            assert new >= 0, f"slot {row.slot}: tokens before position {row.start} are missing"
            if row.token_ids[new:]:
                follower.feed(row.token_ids[new:])
            self._num_known[row.slot] = max(self._num_known[row.slot], row.start + row.num_tokens)

    def masks(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the tokens that may come next, ``[slots, ceil(vocab / 32)]``, of slots that have a grammar.

        A slot whose mask is not there in time has all tokens here, and is among those that `take_missing` returns.
        """
        deadline = time.monotonic() + _MAX_WAIT_S
        masks = np.full((len(slots), self._num_words), -1, np.int32)
        for index, slot in enumerate(slots.tolist()):
            follower = self._followers[slot]
            mask = follower.wait(deadline)
            if mask is None:
                self._missing[slot] = follower.error
            else:
                masks[index] = mask
        return masks

    def missing(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of these slots had no mask in the last `masks`."""
        if not self._missing:
            return np.zeros(len(slots), np.bool_)
        return np.array([slot in self._missing for slot in slots.tolist()], np.bool_)

    def take_missing(self) -> dict[int, str | None]:
        """Return the slots without a mask in this step, and why they can never get one; None: they can."""
        missing, self._missing = self._missing, {}
        return missing


class _Follower:
    """One output in its grammar.

    The launching thread feeds tokens and reads the mask; one thread of a lane at a time does the work.

    Attributes:
        error: why there can be no mask any more.
    """

    def __init__(self, begin: Callable[[], Matcher], quick: _Lane, slow: _Lane) -> None:
        self.error: str | None = None
        self._begin, self._quick, self._slow = begin, quick, slow
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._tokens: list[int] = []  # fed, and not taken by the work
        self._is_queued = self._is_closed = self._is_slow = False
        self._began_at: float | None = None
        self._matcher: Matcher | None = None
        self._mask: npt.NDArray[np.int32] | None = None
        self._cpu_s = 0.0
        self._num_tokens = 0

    def feed(self, token_ids: list[int]) -> None:
        """Add tokens, and have the mask after them computed."""
        with self._lock:
            self._tokens += token_ids
            self._mask = None
            self._done.clear()
            if not self._is_queued and self.error is None:
                self._is_queued = True
                (self._slow if self._is_slow else self._quick).put(self)

    def wait(self, deadline: float) -> npt.NDArray[np.int32] | None:
        """Return the mask after all tokens; None if it is not there by the deadline, or if there is an `error`.

        A slow grammar is not waited for: its mask is read at a later step.
        """
        if not self._is_slow:
            self._done.wait(max(0.0, deadline - time.monotonic()))
        with self._lock:
            if self._began_at is not None and time.monotonic() - self._began_at > _MAX_MASK_S:
                self.error, self._is_closed = _TOO_SLOW, True
            return self._mask if self._done.is_set() else None

    def close(self) -> None:
        """Do no more work: the sequence has left. A mask that is being computed is the last."""
        with self._lock:
            self._is_closed = True

    def work(self) -> None:
        """Compute the mask after all tokens; called by a lane."""
        while True:
            with self._lock:
                if self._is_closed:
                    return
                tokens, self._tokens = self._tokens, []
                self._began_at = time.monotonic()
            is_first = self._matcher is None  # also compiles the grammar, and may read the vocabulary
            started = time.thread_time()
            mask, error = self._compute(tokens)
            cpu_s = time.thread_time() - started
            with self._lock:
                self._began_at = None
                if not is_first:
                    self._cpu_s += cpu_s
                    self._num_tokens += len(tokens)
                    self._is_slow = self._is_slow or cpu_s > _QUICK_S
                    allowed_s = _CPU_S_AT_START + _CPU_S_PER_TOKEN * self._num_tokens
                    if cpu_s > _MAX_MASK_CPU_S or self._cpu_s > allowed_s:
                        error = error or _TOO_SLOW
                if self._tokens and error is None:
                    continue
                self._is_queued = False
                self._mask, self.error = (mask, None) if error is None else (None, error)
                self._done.set()
                return

    def _compute(self, tokens: list[int]) -> tuple[npt.NDArray[np.int32] | None, str | None]:
        try:
            if self._matcher is None:
                self._matcher = self._begin()
            self._matcher.advance(tokens)
            return self._matcher.mask(), self._matcher.error
        except InvalidRequestError as error:  # of a vocabulary that grammars cannot use
            return None, str(error)


class _Lane:
    """Daemon threads that do followers' work in the order in which it comes.

    Args:
        niceness: of the threads; the system gives those with a higher one less time.
    """

    def __init__(self, name: str, num_threads: int, niceness: int = 0) -> None:
        self._followers: queue.SimpleQueue[_Follower] = queue.SimpleQueue()
        self._niceness = niceness
        for number in range(num_threads):
            start_thread(self._run, f"{name}-{number}")

    def put(self, follower: _Follower) -> None:
        """Have a follower's work done."""
        self._followers.put(follower)

    def _run(self) -> None:
        if self._niceness:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while True:
            self._followers.get().work()


class _Vocabulary:
    """The vocabulary, or the reason why grammars do not work here, for the first request that has one."""

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self._folder, self._vocab_size = Path(folder), vocab_size
        self._is_read = threading.Event()
        self._vocabulary: Vocabulary | None = None
        self._error = "the tokenizer could not be read; see the log of the worker"

    def read(self) -> None:
        """Make the vocabulary."""
        try:
            self._vocabulary = Vocabulary(read_vocabulary(self._folder), self._vocab_size)
        except (InvalidRequestError, ModelError) as error:
            self._error = str(error)
        finally:
            self._is_read.set()

    def get(self) -> Vocabulary:
        """Return the vocabulary.

        Raises:
            InvalidRequestError: if grammars do not work here.
        """
        self._is_read.wait()
        if self._vocabulary is None:
            raise InvalidRequestError(self._error, "grammar")
        return self._vocabulary
