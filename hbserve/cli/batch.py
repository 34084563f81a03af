"""``hbserve batch FILE``: send the requests of a file to a running server, as best-effort work.

FILE and the output have OpenAI's batch format: one JSON object a line, with custom_id, method, url and body. The server
computes these requests in the time that others leave (priority: batch). Answers go to FILE.out.jsonl, requests that the
server refused to FILE.errors.jsonl. The command can be stopped and started again at any time: it sends what has no
answer in the output yet.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult

from hbserve.bench.arguments import positive, positive_float, run_command
from hbserve.errors import ConfigError
from hbserve.hints import shown
from hbserve.sampling_params import is_unicode
from hbserve.server_url import server_url

_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_BUSY = (429, 502, 503, 504)
"""Statuses after which the same request may succeed."""
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 30.0


class _Line(NamedTuple):
    """A request: where it stands in the file, and what it says."""

    number: int
    custom_id: str
    path: str
    body: dict[str, Any]


class _Answer(NamedTuple):
    """What the server said, or why it said nothing; ``status`` is 0 then."""

    status: int
    body: Any
    request_id: str
    retry_after_s: float = 0.0


def main(arguments: Sequence[str] | None = None, prog: str = "hbserve batch") -> int:
    """Parse the arguments and send; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="requests in OpenAI's batch format, .jsonl")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="address of the server; HBSERVE_API_KEY holds the key"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="answers (default: FILE.out.jsonl)")
    parser.add_argument("--errors", type=Path, metavar="FILE", help="refusals (default: FILE.errors.jsonl)")
    parser.add_argument("--concurrency", type=positive, default=64, help="requests at a time (default: 64)")
    parser.add_argument("--timeout-s", type=positive_float, default=3600.0, help="limit of one request, tries included")
    return run_command(_run, parser.parse_args(arguments))


def _run(arguments: argparse.Namespace) -> None:
    """Send what has no answer yet.

    Raises:
        ConfigError: naming the file and line, or the flag, that cannot be honoured.
    """
    file: Path = arguments.file
    output = arguments.output or file.with_suffix(".out.jsonl")
    errors = arguments.errors or file.with_suffix(".errors.jsonl")
    if len({path.resolve() for path in (file, output, errors)}) < 3:
        raise ConfigError("FILE, --output and --errors must be three files")
    url = server_url(arguments.url)
    num_requests = sum(1 for _ in _read(file))  # the whole file is checked before anything is sent
    answered = _answered(output)
    to_send = (line for line in _read(file) if line.custom_id not in answered)
    with output.open("a", encoding="utf-8") as good, errors.open("w", encoding="utf-8") as bad:
        batch = _Batch(url, arguments.concurrency, arguments.timeout_s)
        number = num_failed = 0
        for number, (line, answer) in enumerate(batch.send(to_send), start=1):
            is_good = answer.status == 200
            num_failed += not is_good
            target = good if is_good else bad
            target.write(json.dumps(_record(line, answer), ensure_ascii=False) + "\n")
            target.flush()
            print(f"\r{len(answered) + number} of {num_requests}, {num_failed} refused", end="", file=sys.stderr)
    print(f"\n{output}", file=sys.stderr)
    if len(answered) + number < num_requests:
        raise ConfigError(f"{file}: it has changed while its requests were sent; run again")
    if num_failed:
        raise ConfigError(f"{num_failed} requests have no answer; {errors} says why. Run again to send them again")


def _record(line: _Line, answer: _Answer) -> dict[str, Any]:
    """Return a line of the output or of the errors, in OpenAI's format."""
    record: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    if not answer.status:
        return record | {"response": None, "error": {"code": "no_answer", "message": answer.body}}
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}
    return record | {"response": response, "error": None}


# --- files -----------------------------------------------------------------------------------------


def _read(file: Path) -> Iterator[_Line]:
    """Read and check the requests, one at a time.

    Raises:
        ConfigError: naming the line that cannot be sent.
    """
    seen: set[str] = set()
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, text in enumerate(lines, start=1):
                if text.strip():
                    line = _parse(text, f"{file}:{number}", number)
                    if line.custom_id in seen:
                        raise ConfigError(f"{file}:{number}: custom_id {shown(line.custom_id)} is there twice")
                    seen.add(line.custom_id)
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None


def _parse(text: str, where: str, number: int) -> _Line:
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON: {error}") from None
    if not isinstance(item, dict) or not isinstance(item.get("custom_id"), str):
        raise ConfigError(f"{where}: must be an object with a custom_id, a string")
    if not is_unicode(item["custom_id"]):
        raise ConfigError(f"{where}: custom_id must not hold a lone surrogate, which is no character")
    if item.get("method") != "POST":
        raise ConfigError(f"{where}: method must be POST, got {shown(item.get('method'))}")
    path, body = item.get("url"), item.get("body")
    if path not in _PATHS:
        raise ConfigError(f"{where}: url must be one of {', '.join(_PATHS)}, got {shown(path)}")
    if not isinstance(body, dict):
        raise ConfigError(f"{where}: body must be an object")
    if body.get("stream"):
        raise ConfigError(f"{where}: body.stream must be false: an answer of a batch comes as a whole")
    return _Line(number, item["custom_id"], path, {"priority": "batch"} | body)


def _answered(output: Path) -> set[str]:
    """Return the ids in an output; a last line that an earlier run could not finish is removed.

    Raises:
        ConfigError: if the file is no output of a batch.
    """
    found: set[str] = set()
    end = 0
    try:
        with output.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    found.add(json.loads(line)["custom_id"])
                except (ValueError, LookupError, TypeError):
                    raise ConfigError(f"{output}:{number}: no output of a batch; choose another --output") from None
                end += len(line)
        os.truncate(output, end)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{output}: {error}") from None
    return found


# --- the server ------------------------------------------------------------------------------------


class _Batch:
    """Sender of requests, with a number of threads that each wait for one answer at a time.

    Args:
        timeout_s: limit of one request, with the tries that a busy or missing server costs it.
    """

    def __init__(self, url: SplitResult, concurrency: int, timeout_s: float) -> None:
        self._url, self._concurrency, self._timeout_s = url, concurrency, timeout_s
        key = os.environ.get("HBSERVE_API_KEY")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def send(self, lines: Iterator[_Line]) -> Iterator[tuple[_Line, _Answer]]:
        """Send requests; yield each with its answer, as they come. At most ``concurrency`` are read ahead."""
        answers: queue.SimpleQueue[tuple[_Line, _Answer]] = queue.SimpleQueue()
        lock = threading.Lock()

        def next_line() -> _Line | None:
            with lock:
                return next(lines, None)

        def work() -> None:
            connection = _Connection(self._url.scheme, self._url.hostname or "", self._url.port)
            while (line := next_line()) is not None:
                answers.put((line, self._answer(connection, line)))
            connection.close()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self._concurrency)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not answers.empty():
            try:
                yield answers.get(timeout=0.1)
            except queue.Empty:
                continue

    def _answer(self, connection: _Connection, line: _Line) -> _Answer:
        """Send one request until it has an answer, or its time is over."""
        deadline, wait_s = time.monotonic() + self._timeout_s, _FIRST_WAIT_S
        body = json.dumps(line.body).encode()
        while True:
            left_s = deadline - time.monotonic()
            answer = connection.post(f"{self._url.path}{line.path}", body, self._headers, left_s)
            wait_s = min(max(2 * wait_s, answer.retry_after_s), _MAX_WAIT_S)
            if answer.status not in (0, *_BUSY) or time.monotonic() + wait_s >= deadline:
                return answer
            time.sleep(wait_s)


class _Connection:
    """Connection to the server, which is opened again when it breaks."""

    def __init__(self, scheme: str, host: str, port: int | None) -> None:
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port)

    def post(self, path: str, body: bytes, headers: dict[str, str], timeout_s: float) -> _Answer:
        """Send a request and read the whole answer."""
        connection = self._connection
        connection.timeout = timeout_s
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            answer, text = response.read(), f"HTTP {response.status}"
            retry_after = response.headers.get("Retry-After", "")
            request_id = response.headers.get("x-request-id", "")
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            connection.close()
            return _Answer(0, f"{type(error).__name__}: {error}", "")
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError):
            content = {"error": {"message": f"{text}, and no JSON"}}
        return _Answer(response.status, content, request_id, float(retry_after) if retry_after.isdecimal() else 0.0)

    def close(self) -> None:
        """Close it."""
        self._connection.close()
