"""Events of a process that the scheduler cannot see: each is a line in the log here, and the scheduler keeps it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hbserve.messages.supervisor import EventKind

logger = logging.getLogger(__name__)

OnEvent = Callable[[EventKind, str, str], object]
"""Takes kind, subject and text of an event; see `hbserve.messages.supervisor.ReportEvent`."""

bugs = logging.getLogger("hbserve.bug")
"""Log of exceptions that only a bug can cause. The API server makes each of them an event."""


def log_event(kind: EventKind, subject: str, text: str) -> None:
    """Log an event, for processes that report none."""
    logger.log(logging.ERROR if kind == "given_up" else logging.WARNING, "%s: %s: %s", kind, subject, text)


class BugEvents(logging.Handler):
    """Makes an event of every record of `bugs`, while it is a handler of that logger."""

    def __init__(self, on_event: OnEvent) -> None:
        super().__init__()
        self._on_event = on_event

    def emit(self, record: logging.LogRecord) -> None:
        """Report a record."""
        self._on_event("bug", "the API server", record.getMessage())
