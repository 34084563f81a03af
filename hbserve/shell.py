"""Chat in the terminal: ``hbserve chat --url http://127.0.0.1:8000``, or ``hbserve chat MODEL``.

With a model the shell starts a system, and ends it at its own end. Lines that begin with a slash are commands;
Ctrl-C ends an answer, Ctrl-D the shell.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import ssl
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from hbserve.errors import HBServeError, RequestFailedError
from hbserve.frontend.outputs import SampleDelta
from hbserve.sampling_params import SamplingParams
from hbserve.server_url import server_url

Message = dict[str, str]

HELP = """/reset      forget the conversation
/history    show the conversation
/system T   begin a new conversation with the system message T
/stats      speed of the last answer, and the system's counts
/help       show these commands
/quit       end the shell (also Ctrl-D)"""
_TIMEOUT_S = 600.0
_SHOWN_CONTROLS: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_SHOWN_CONTROLS |= {0x7F: 0x2421, 0x9B: "<CSI>"}
"""Unicode's pictures of control characters, shown instead of them: a model's text must not control the terminal."""


class HttpBackend:
    """A running server as the model that answers.

    Args:
        url: address that the server prints at its start.
        key: API key, if the server requires one.
        sampling: parameters of the chat completion.
    """

    def __init__(self, url: str, key: str | None, sampling: dict[str, Any]) -> None:
        parts = server_url(url if "//" in url else f"http://{url}")
        self._scheme, self._host, self._port = parts.scheme, parts.hostname or "", parts.port
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._sampling = sampling
        with self._request("GET", "/v1/models") as response:
            self.name: str = json.load(response)["data"][0]["id"]

    def answer(self, messages: list[Message]) -> Generator[tuple[str, int], None, None]:
        """Yield parts of the answer, each with its number of tokens. Closing the generator ends the request.

        Raises:
            HBServeError: the text says what failed.
        """
        usage = {"include_usage": True, "continuous_usage_stats": True}
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": usage, **self._sampling}
        num_tokens = 0
        with self._request("POST", "/v1/chat/completions", body) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RequestFailedError(event["error"]["message"])
                new = event["usage"]["completion_tokens"] - num_tokens
                num_tokens += new
                for choice in event["choices"]:
                    delta = choice["delta"]
                    yield (delta.get("reasoning_content") or "") + (delta.get("content") or ""), new

    def stats(self) -> dict[str, Any]:
        """Return the scheduler's statistics."""
        with self._request("GET", "/stats") as response:
            return json.load(response)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise RequestFailedError(_message_of(response.read()))
            yield response
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            raise RequestFailedError(f"{self._host}:{self._port}: {error}") from error
        finally:
            connection.close()


class LocalBackend:
    """A system that runs for this shell only; `close` ends it. Methods as in `HttpBackend`."""

    def __init__(self, model: str, mode: str, sampling: dict[str, Any]) -> None:
        from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

        config = PdDisaggConfig.from_arguments(model, mode=mode, log_level="WARNING")
        self.name = Path(model).name
        self._runner = asyncio.Runner()  # at Ctrl-C, run() cancels its work before it raises KeyboardInterrupt
        self._llm = DisaggregatedLLM(config)
        try:
            self._runner.run(self._llm.start())
            defaults = self._llm.engine.sampling_defaults
            self._sampling = SamplingParams(**({"max_tokens": None} | defaults | sampling))
        except BaseException:
            self.close()
            raise

    def answer(self, messages: list[Message]) -> Generator[tuple[str, int], None, None]:
        prompt = self._runner.run(self._llm.engine.text.encode_chat(messages))
        deltas = self._llm.stream(prompt, self._sampling)

        async def read() -> SampleDelta | None:
            return await anext(deltas, None)

        try:
            while (delta := self._runner.run(read())) is not None:
                yield delta.text, len(delta.token_ids)
        finally:
            self._runner.run(deltas.aclose())

    def stats(self) -> dict[str, Any]:
        return self._llm.get_system_stats()

    def close(self) -> None:
        """End every process."""
        self._runner.run(self._llm.stop())
        self._runner.close()


class Shell:
    """A conversation in the terminal."""

    def __init__(self, backend: HttpBackend | LocalBackend) -> None:
        self._backend = backend
        self._messages: list[Message] = []
        self._speed = "no answer yet"

    def handle(self, line: str) -> bool:
        """Execute or answer one line; return False at the end."""
        line = line.strip()
        if line.startswith("/"):
            return self._execute(*line.partition(" ")[::2])
        if line:
            self._reply(line)
        return True

    def _execute(self, command: str, rest: str) -> bool:
        if command in ("/quit", "/exit"):
            return False
        if command in ("/reset", "/system"):
            self._messages = [{"role": "system", "content": rest.strip()}] if command == "/system" else []
            print("(a new conversation)")
        elif command == "/history":
            for message in self._messages:
                print(f"{message['role']}: {message['content']}")
        elif command == "/stats":
            print(self._speed)
            try:
                for name, value in self._backend.stats().get("cpu_scheduler", {}).items():
                    if isinstance(value, int | float):
                        print(f"{name}: {round(value, 3):g}")
            except HBServeError as error:
                print(f"error: {error}", file=sys.stderr)
        else:
            print(HELP if command == "/help" else f"unknown command {command}\n{HELP}")
        return True

    def _reply(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        answer, num_tokens = "", 0
        start = time.monotonic()
        first_token_s = 0.0
        parts = self._backend.answer(self._messages)
        try:
            for text, num_new in parts:
                if num_new and not num_tokens:
                    first_token_s = time.monotonic() - start
                num_tokens += num_new
                answer += text
                print(text.translate(_SHOWN_CONTROLS), end="", flush=True)
        except KeyboardInterrupt:
            print(" (ended)", end="")
        except HBServeError as error:
            print(f"\nerror: {error}", file=sys.stderr)
        finally:
            parts.close()
        print()
        if not answer:
            self._messages.pop()  # an unanswered message is not part of the conversation
            return
        self._messages.append({"role": "assistant", "content": answer})
        seconds = time.monotonic() - start
        decode_s = seconds - first_token_s
        rate = f", {(num_tokens - 1) / decode_s:.1f} tokens/s after it" if num_tokens > 1 and decode_s > 0 else ""
        self._speed = f"{num_tokens} tokens in {seconds:.2f} s; the first after {1000 * first_token_s:.0f} ms{rate}"


def _message_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:500] or "the server gave no reason"


def _lines() -> Generator[str, None, None]:
    """Yield the lines that the user types; in a terminal with editing, and a history that outlives the shell."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    history = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state")) / "hbserve" / "history"
    with contextlib.suppress(ImportError):
        import readline

        with contextlib.suppress(OSError):
            readline.read_history_file(history)
        readline.set_history_length(1000)
    try:
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print()
    finally:  # also at /quit, when the caller closes the generator
        with contextlib.suppress(ImportError, OSError):
            import readline

            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hbserve.shell") -> int:
    """Parse the arguments and chat until the end of input; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description="Chat in the terminal.", epilog=HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    target = parser.add_mutually_exclusive_group()
    target.add_argument("model", nargs="?", metavar="MODEL", help="folder of a model; the shell starts a system for it")
    target.add_argument(
        "--url", default="http://127.0.0.1:8000", help="address of a running server (default: %(default)s)"
    )
    parser.add_argument("--mode", default="unified", help="mode of that system (default: unified)")
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token")
    parser.add_argument("--max-tokens", type=int, help="length limit of an answer (default: the rest of the context)")
    parser.add_argument("--seed", type=int, help="makes answers reproducible")
    given = parser.parse_args(arguments)
    names = ("temperature", "max_tokens", "seed")
    sampling = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    local: LocalBackend | None = None
    try:
        if given.model is not None:
            local = LocalBackend(given.model, given.mode, sampling)
        backend = local or HttpBackend(given.url, os.environ.get("HBSERVE_API_KEY"), sampling)
        print(f"{backend.name}. /help shows the commands.")
        shell = Shell(backend)
        with contextlib.closing(_lines()) as lines:
            for line in lines:
                if not shell.handle(line):
                    break
    except HBServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if local is not None:
            local.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
