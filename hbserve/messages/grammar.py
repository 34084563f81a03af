"""Messages between a process and the one beside it that works on grammars; see `hbserve.grammar_process`."""

from __future__ import annotations

import msgspec

from hbserve.messages.base import Message

# --- to the grammar process -----------------------------------------------------------------------


class FollowOutput(Message, frozen=True):
    """Follow an output in its grammar. Answered by `Mask` or `GrammarFailed`, as each `FeedOutput` is.

    Attributes:
        number: name of the output in later messages.
        token_ids: the output so far.
        draft: guesses of the next tokens, whose masks are wanted, too.
        is_suspect: the grammar may have ended a process, so its work is done beside no other suspect's.
    """

    number: int
    grammar: str
    end_token_ids: list[int]
    token_ids: list[int]
    is_suspect: bool
    draft: list[int] = msgspec.field(default_factory=list)


class FeedOutput(Message, frozen=True):
    """Add tokens to an output; for ``draft`` see `FollowOutput`."""

    number: int
    token_ids: list[int]
    draft: list[int] = msgspec.field(default_factory=list)


class ForgetOutput(Message, frozen=True):
    """Do no more work for this output; not answered."""

    number: int


class CheckOutput(Message, frozen=True):
    """Check a grammar, or a finished output against it. Answered by `OutputChecked` or `GrammarFailed`.

    Attributes:
        token_ids: an output without its end token; None: check whether the grammar can be followed at all.
    """

    number: int
    grammar: str
    token_ids: list[int] | None


GrammarCommand = FollowOutput | FeedOutput | ForgetOutput | CheckOutput


# --- from the grammar process ---------------------------------------------------------------------


class WorkBegun(Message, frozen=True):
    """The process works on this output or check from now on, until its answer.

    Attributes:
        thread: id of the thread that works, as Linux has it; cpu_s: processor time that it has used before.
    """

    number: int
    thread: int
    cpu_s: float


class Mask(Message, frozen=True):
    """Tokens that may come next.

    Attributes:
        num_tokens: tokens that came before.
        words: int32 ``[ceil(vocab / 32)]``, see `hbserve.grammar.Matcher.mask`.
        is_slow: masks of this grammar take long; do not wait for the next.
        draft: the guesses that were looked at.
        draft_words: masks, one after the other, behind each of those guesses that the grammar allows after those before
            it; no guess behind a forbidden one matters.
        forced: the tokens behind all of the guesses that the grammar leaves no choice of; none if a guess is forbidden.
    """

    number: int
    num_tokens: int
    words: bytes
    is_slow: bool
    draft: list[int] = msgspec.field(default_factory=list)
    draft_words: bytes = b""
    forced: list[int] = msgspec.field(default_factory=list)


class OutputChecked(Message, frozen=True):
    """Answer to `CheckOutput`.

    Attributes:
        grammar: the grammar to follow, if no output was to be checked; see `hbserve.grammar.Vocabulary.check`.
        problem: why the output does not follow the grammar; None: it does.
    """

    number: int
    grammar: str = ""
    problem: str | None = None


class GrammarFailed(Message, frozen=True):
    """The grammar cannot be followed, or not any further. ``is_bug``: this program is at fault, not the grammar."""

    number: int
    error: str
    is_bug: bool = False


GrammarReply = WorkBegun | Mask | OutputChecked | GrammarFailed
