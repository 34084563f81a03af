"""Format of log lines, for people or for programs, with the id of the HTTP request that they belong to."""

from __future__ import annotations

import contextvars
import json
import logging
import time

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
"""Id of the HTTP request that the current task serves."""


_CONTINUED = "\n  | "
"""Begins each further line of a message, so that none of them looks like a message of its own."""
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
"""Characters that a terminal obeys, and texts of requests may hold."""


class TextFormatter(logging.Formatter):
    """Text line: time, level, process and message, and the request in brackets."""

    def __init__(self, process_name: str) -> None:
        super().__init__(f"%(asctime)s %(levelname).1s {process_name}: %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        args = record.args
        if isinstance(args, tuple):
            args = tuple(_in_one_line(value) for value in args)
        plain = logging.makeLogRecord(record.__dict__ | {"args": args, "exc_text": None})
        line = _CONTINUED.join(super().format(plain).translate(_CONTROLS).split("\n"))
        request = request_id.get()
        return line if request is None else f"{line} [{request}]"


def _in_one_line(value: object) -> object:
    """Escape the line ends of a text, which may come from a request. Our own messages and errors may have several."""
    return value.replace("\n", "\\n") if isinstance(value, str) else value


class JsonFormatter(logging.Formatter):
    """JSON line: one object with the same parts, and the fields of the record."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = request_id.get()
        if request is not None:
            line["request_id"] = request
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
