"""``python -m benchmarks chaos requests``: malformed HTTP requests to every endpoint of a running system.

Each case is a valid request with something broken: a value, a key, the JSON text, a header, the framing, the method or
the path. Beside them a well-behaved client asks questions all the time. What must hold:

- a case is answered, or its connection is closed, in time, and never with a status of 500 or more;
- a refusal is an error in OpenAI's shape; a stream has no error of the server;
- nothing is logged as an error, and no process ends;
- the well-behaved client always has the right answer; afterwards the idle system has everything back, and its
  processes have not grown.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools

from benchmarks.chaos import processes
from benchmarks.chaos.campaign import Campaign
from benchmarks.chaos.http_cases import Case, make_case
from benchmarks.chaos.questions import Answer, Question, ask, new_session, questions, right_answers
from benchmarks.chaos.service import Service, configuration, make_model, service, unreturned, until
from hbserve.process import event_loop

ANSWER_S = 60.0
"""Time in which a case must have its answer, or its connection be closed."""
_PATIENCE_S = 1.0
"""Time after which the client of a case closes its sending side: the server may wait for the rest of the request."""
_WARM_UP = 200
_MAX_GROWTH_MB = 64.0
_ALARMS = re.compile(r"Traceback|^\S+ E |text_restarted|given_up|restarting it", re.MULTILINE)
"""What the log of a healthy system does not have."""


class Reply:
    """The answer to a case, as `httptools` parses it.

    Attributes:
        status: None while there is no answer.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_whole = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_whole = self.status is not None and self.status >= 200

    def problem(self, is_head: bool) -> str | None:
        """Say what no answer may be."""
        if self.status is None:
            return None
        if self.status >= 500:
            return f"status {self.status}: {self.body!r:.300}"
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return f"a stream has {self.body!r:.300}" if b"server_error" in self.body else None
        if self.status >= 400 and not is_head and self.headers.get("content-type") == "application/json":
            try:
                text = json.loads(self.body)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                return f"the refusal {self.body!r:.300} is no error in OpenAI's shape"
            if not text or len(text) > 4000:
                return f"the message of the refusal has {len(text)} characters"
        return None


async def send(url: str, case: Case) -> tuple[Reply, str | None]:
    """Send a case; return its answer, and what is wrong with it."""
    reply, is_head = Reply(), case.data.startswith(b"HEAD ")
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        async with asyncio.timeout(ANSWER_S):
            writer.write(case.data)
            if not case.is_whole:
                writer.write_eof()
            is_open = case.is_whole
            while not reply.is_whole:
                try:
                    async with asyncio.timeout(_PATIENCE_S if is_open else None):
                        data = await reader.read(1 << 16)
                except TimeoutError:
                    is_open = False
                    writer.write_eof()
                    continue
                if not data:
                    break
                reply.feed(data)
    except TimeoutError:
        return reply, f"no answer, and no end of the connection, in {ANSWER_S:g} s"
    except (ConnectionError, httptools.HttpParserError) as error:
        if isinstance(error, httptools.HttpParserError) and not is_head:
            return reply, f"the answer is not HTTP: {error}"
    finally:
        writer.close()
    return reply, reply.problem(is_head)


class Requests:
    """The cases of a campaign, one after the other, beside a client that behaves well."""

    def __init__(self, campaign: Campaign, model: Path) -> None:
        self._campaign = campaign
        self._config = configuration(
            model,
            "unified",
            gpu_instances=[{"instance_id": "unified-0", "instance_type": "unified", "num_threads": 1}],
            model={"max_model_len": 256},
            server={"port": 0, "max_body_bytes": 4 << 20},
        )
        self._num_right = 0

    async def run(self) -> None:
        """Run all cases."""
        asked = questions(self._campaign.chance(0, "questions"), 8)
        asked = [Question(one.kind, one.path, _short(one.body)) for one in asked]
        async with service(self._config) as running:
            known = list(zip(asked, await right_answers(running, asked), strict=True))
            before = self._memory()
            behaving = asyncio.create_task(self._behave(running, known))
            number = 0
            for done, number in enumerate(self._campaign.cases()):
                if done == _WARM_UP:
                    before = self._memory()
                log_offset = running.log.stat().st_size
                case = make_case(self._campaign.chance(number))
                reply, problem = await send(running.url, case)
                self._campaign.counts[f"status {reply.status}" if reply.status else "closed"] += 1
                found = running.log.read_bytes()[log_offset:].decode(errors="replace")
                if problem is not None:
                    self._campaign.fail(number, f"{case.what}: {problem}", running.log_tail(log_offset))
                elif alarm := _ALARMS.search(found):  # it may come a moment after the case
                    what = f"{case.what}, or just before it: the log has {alarm[0].strip()!r}"
                    self._campaign.fail(number, what, running.log_tail(log_offset), cases_before=4)
                if behaving.done() or running.has_ended:
                    break
            after = await self._check_end(number, running, behaving, known)
            for process, size in after.items():
                if size > before.get(process, size) + _MAX_GROWTH_MB:
                    self._campaign.fail(number, f"{process} has grown from {before[process]} to {size} MB")
            self._campaign.figures["right_answers_beside"] = self._num_right
            self._campaign.figures["memory_mb"] = {"before": before, "after": after}

    def _memory(self) -> dict[str, float]:
        found = {}
        for process in processes.descendants():
            held = processes.holdings(process)
            if held is not None and process.kind != "helper":
                found[process.title] = round(held.memory_mb, 1)
        return found

    async def _behave(self, running: Service, known: list[tuple[Question, Answer]]) -> None:
        async with new_session() as session:
            while True:
                for question, right in known:
                    answer = await ask(session, running, question)
                    assert answer == right, f"{question}: {answer}, not {right}"
                    self._num_right += 1
                    await asyncio.sleep(0.2)

    async def _check_end(
        self, number: int, running: Service, behaving: asyncio.Task[None], known: list[tuple[Question, Answer]]
    ) -> dict[str, float]:
        """Check the idle system, and end it; return the memory of its processes."""
        if behaving.done():
            self._campaign.fail(number, f"the client that behaves well: {behaving.exception()}", running.log_tail())
        behaving.cancel()
        await asyncio.gather(behaving, return_exceptions=True)
        left: list[str] = []

        async def is_idle() -> bool:
            left[:] = await unreturned(running)
            return not left

        if not await until(is_idle, 30.0):
            self._campaign.fail(number, f"the idle system still has {left}", running.log_tail())
            return {}
        answers = await right_answers(running, [question for question, _ in known])
        if answers != [right for _, right in known]:
            self._campaign.fail(number, "answers afterwards are wrong", running.log_tail())
        memory = self._memory()
        if (code := await running.end()) != 0:
            self._campaign.fail(number, f"the system ended with exit code {code}", running.log_tail())
        return memory


def _short(body: dict[str, Any]) -> dict[str, Any]:
    limits = {name: 40 for name in ("max_tokens", "max_output_tokens") if name in body}
    return body | (limits if "response_format" not in body else {})


def run(campaign: Campaign, folder: Path) -> None:
    """Run all cases; the figures are the answers beside them, and the memory of each process."""
    make_model(folder / "model")
    event_loop.run(Requests(campaign, folder / "model").run())
