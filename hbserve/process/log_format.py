"""What a line of the log looks like, for people or for programs, and which request it is about."""

from __future__ import annotations

import contextvars
import json
import logging
import time

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
"""Of the HTTP request that is being served, if one is."""


class TextFormatter(logging.Formatter):
    """Time, level, process and message, and the request in brackets.

    Args:
        who: the process.
    """

    def __init__(self, who: str) -> None:
        super().__init__(f"%(asctime)s %(levelname).1s {who}: %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        about = request_id.get()
        return line if about is None else f"{line} [{about}]"


class JsonFormatter(logging.Formatter):
    """One JSON object per line.

    Args:
        who: the process.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{whole}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._who,
            "logger": record.name,
            "message": record.getMessage(),
        }
        about = request_id.get()
        if about is not None:
            line["request_id"] = about
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
