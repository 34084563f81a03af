"""Tokenizer and detokenizer in separate processes: the same text, and no request lost when a process dies."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest

from hbserve.config import from_dict
from hbserve.errors import HBServeError, InvalidRequestError, RequestFailedError, StartupError
from hbserve.frontend import text_pool, text_process
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.frontend.text_pool import TextProcesses
from hbserve.grammar import json_schema
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.messages.text import ChatOptions, OutputText, TextStreamOptions
from hbserve.process.parent import ChildProcess
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.http_server import MODEL, USER, letters, served, until
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, output, tokens

pytestmark = pytest.mark.slow  # each test starts processes of its own

TEXT = "hé 你好 🙂 and on it goes, to its STOP and beyond"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer"))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(params=[0, 2], ids=["shared", "two tokenizers"])
async def processes(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> AsyncIterator[TextProcesses]:
    config = from_dict({"model": {"path": str(folder)}, "server": {"num_tokenizers": request.param}})
    processes = TextProcesses(config, str(tmp_path))
    await processes.start(time.monotonic() + DEADLINE_S)
    yield processes
    await processes.stop()


@pytest.fixture
async def engine(client: EngineClient, tokenizer: Tokenizer, processes: TextProcesses) -> TextEngine:
    ready = await client.wait_ready(DEADLINE_S)
    return TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size, processes)


async def test_a_process_without_an_api_server_ends_at_sigterm(folder: Path, tmp_path: Path) -> None:
    config = msgspec.to_builtins(from_dict({"model": {"path": str(folder)}}))
    orders = {"config": config, "name": "detokenizer", "address": f"ipc://{tmp_path}/no-listener"}
    orders |= {"niceness": 0, "renders_chats": False}
    child = ChildProcess("the detokenizer", "hbserve.frontend.text_worker", orders)
    child.start()
    await child.wait_ready(time.monotonic() + DEADLINE_S)
    await child.stop()
    assert child.exit_code == 0  # not killed, with its greeting still on the way


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"the cat {number}"}]


def title_of(pid: int) -> str:
    """As process lists show it."""
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")


async def test_a_dead_process_is_replaced_and_no_stream_is_lost(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer, processes: TextProcesses, tmp_path: Path
) -> None:
    names = processes.report().keys()
    num_files = len(os.listdir(tmp_path))
    assert {title_of(one["pid"]) for one in processes.report().values()} == {f"hbserve-{name}" for name in names}
    ids = letters(tokenizer, TEXT)
    go_on = asyncio.Event()

    async def in_two_halves(request: AddRequest) -> AsyncIterator[RequestOutput]:
        half = len(ids) // 2 + int(request.request_id.split("-")[1]) % 5  # also in the middle of a character
        for token_id in ids[:half]:
            yield output(request, token_id)
        await go_on.wait()
        for number, token_id in enumerate(ids[half:], start=half + 1):
            yield output(request, token_id, finish_reason="length" if number == len(ids) else None)

    scheduler.script = in_two_halves
    stops = [None, ["STOP"], ["no such text"]]
    samplings = [SamplingParams(max_tokens=60, stop=stops[number % 3]) for number in range(30)]
    tasks = [asyncio.create_task(engine.generate("the cat", one, f"r-{i}")) for i, one in enumerate(samplings)]
    await scheduler.wait_for(lambda: len(scheduler.requests) == 30)
    pids = {name: report["pid"] for name, report in processes.report().items()}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    go_on.set()
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(3):  # the successors too, during their start
            while processes.report()["detokenizer"]["pid"] in (None, pids["detokenizer"]):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            pids["detokenizer"] = processes.report()["detokenizer"]["pid"]
            os.kill(pids["detokenizer"], signal.SIGKILL)
    asked = [asyncio.create_task(engine.text.encode(f"the cat {number}")) for number in range(10)]
    async with asyncio.timeout(DEADLINE_S):
        outputs = await asyncio.gather(*tasks)
        assert await asyncio.gather(*asked) == [tokenizer.encode(f"the cat {number}") for number in range(10)]
    for number, result in enumerate(outputs):
        stopped = number % 3 == 1
        assert result["text"] == (TEXT.split("STOP")[0] if stopped else TEXT)
        assert result["stop_reason"] == ("STOP" if stopped else None)
        assert result["num_prompt_tokens"] == len(tokenizer.encode("the cat"))
    assert [one["restarts"] for one in processes.report().values()] == [4] + [1] * (len(names) - 1)
    assert sum(one["open_streams"] + one["open_questions"] for one in processes.report().values()) == 0
    assert len(os.listdir(tmp_path)) == num_files, "a dead process has left its socket"


async def test_text_is_the_same_as_in_one_process(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    assert await engine.text.encode_chat(USER) == tokenizer.encode_chat(USER)
    long = "one two three " * 2000
    assert await engine.text.encode(long) == tokenizer.encode(long)
    for prompt, param in (("\ud83d", "prompt"), ("long " * 100, "prompt")):
        with pytest.raises(InvalidRequestError) as caught:
            await engine.generate(prompt, SamplingParams())
        assert caught.value.param == param
    with pytest.raises(InvalidRequestError) as caught:
        await engine.text.encode_chat([{"role": "user", "content": "\ud83d"}])
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequestError, match="begins with a user"):
        await engine.text.encode_chat([{"role": "assistant", "content": "x"}])
    with pytest.raises(InvalidRequestError, match="grammar"):
        await engine.generate("x", SamplingParams(grammar="start: ("))
    scheduler.script = tokens(*letters(tokenizer, "ab"), 2)
    result = await engine.generate("x", SamplingParams(grammar="start: /[ab]+/"))
    assert (result["text"], result["finish_reason"]) == ("ab", "stop")
    # A stream that is closed before its end leaves nothing open.
    scheduler.script = tokens(*letters(tokenizer, "abc"), end=None)
    stream = engine.stream("x", SamplingParams())
    assert (await anext(stream)).text
    await stream.aclose()
    await scheduler.wait_for_aborts(1)


async def test_a_fatal_request_fails_alone_and_health_reports_a_process_that_is_not_replaced(
    client: EngineClient, tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    rpc = {"max_restarts": 0}
    config = from_dict({"model": {"path": str(folder)}, "server": {"num_tokenizers": 0}, "rpc": rpc})
    events: list[tuple[str, str]] = []
    processes = TextProcesses(config, str(tmp_path), lambda kind, subject, _: events.append((kind, subject)))
    await processes.start(time.monotonic() + DEADLINE_S)
    with pytest.raises(RequestFailedError, match="see the server's log"):  # only a bug could send this
        await processes.check_grammar("start: /a/", -1)

    # Kill each process that has the fatal question, while others wait.
    large = processes._large
    fatal = asyncio.create_task(processes.encode_chat([{"role": "user", "content": "fatal " * 100_000}]))
    asked = [asyncio.create_task(processes.encode_chat(chat(number))) for number in range(8)]
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.sleep(0)
        assert large.num_open == 9
        for num_open in (9, 1, 1):
            await until(lambda limit=num_open: large.is_connected and large.num_open <= limit)  # type: ignore[misc]
            pid = processes.report()["tokenizer-large"]["pid"]
            os.kill(pid, signal.SIGKILL)
            # None: the process has ended, and its watcher may not know yet
            await until(lambda pid=pid: processes.report()["tokenizer-large"]["pid"] not in (None, pid))  # type: ignore[misc]
            if num_open == 9:  # the one that was at work is asked last from here on
                assert await asyncio.gather(*asked) == [tokenizer.encode_chat(chat(number)) for number in range(8)]
        with pytest.raises(RequestFailedError, match="died of the request"):
            await fatal
        await until(lambda: large.is_connected)

    ready = await client.wait_ready(DEADLINE_S)
    engine = TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size, processes)
    async with served(engine, client) as address, httpx.AsyncClient(base_url=address, timeout=DEADLINE_S) as http:
        assert (await http.get("/health")).status_code == 200
        os.kill(processes.report()["detokenizer"]["pid"], signal.SIGKILL)
        await until(lambda: processes.dead is not None)
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert "detokenizer" in health.json()["reason"]
        answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    await processes.stop()
    restarted, given_up = ("text_restarted", "tokenizer-large"), ("given_up", "a request at tokenizer-large")
    assert events == [
        ("bug", "grammar-checker"),
        restarted,
        restarted,
        given_up,
        restarted,
        ("given_up", "detokenizer"),
    ]


async def test_a_grammar_whose_check_takes_too_long_is_refused_and_others_are_checked(
    processes: TextProcesses, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is replaced; the questions of others that it had are asked again. Text goes on meanwhile."""
    monkeypatch.setattr(text_pool, "MAX_CHECK_S", 3.0)
    size = tokenizer.vocab_size
    patterns = {f"^p{number}.*x{number}$": {"type": "integer"} for number in range(1500)}  # compared pair by pair
    costly = json_schema({"type": "object", "patternProperties": patterns, "additionalProperties": False})
    async with asyncio.timeout(DEADLINE_S):
        assert await processes.check_grammar("start: /a/", size) == "start: /a/"
        pid = processes.report()["grammar-checker"]["pid"]
        left = asyncio.create_task(processes.check_grammar(costly + " ", size))
        attack = asyncio.create_task(processes.check_grammar(costly, size))
        await asyncio.sleep(0)
        left.cancel()
        assert await processes.encode("the cat") == tokenizer.encode("the cat")
        with pytest.raises(InvalidRequestError, match="too complex"):
            await attack
        assert await processes.check_grammar("start: /b/", size) == "start: /b/"
        assert processes.report()["grammar-checker"]["pid"] != pid
        await until(lambda: not processes._checks)
        if "tokenizer-0" not in processes.report():  # time in which this process itself was stopped does not count
            check = asyncio.create_task(processes.check_grammar("start: /c/", size))
            await asyncio.sleep(0.2)
            time.sleep(3.3)  # noqa: ASYNC251
            assert await check == "start: /c/"
    assert processes.dead is None
    deep = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(9000)) + '\na9000: "y"'
    with pytest.raises(InvalidRequestError, match="cannot be followed"):  # and its recursion ends no process
        await processes.check_grammar(deep, size)


async def test_a_chat_template_of_a_request_that_never_ends_delays_nobody_else(
    processes: TextProcesses, tokenizer: Tokenizer
) -> None:
    upper = ChatOptions(template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert await processes.encode_chat(USER, None, upper) == tokenizer.encode("HI")
    if "tokenizer-0" in processes.report():
        pytest.skip("one process is enough for the slow part")
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    slow = asyncio.create_task(processes.encode_chat(USER, None, ChatOptions(template=loops)))
    for _ in range(3):
        assert await processes.encode_chat(USER, None, upper) == tokenizer.encode("HI")
        assert await processes.encode("the cat " * 5000) == tokenizer.encode("the cat " * 5000)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(InvalidRequestError, match=r"took more than|too much time") as caught:
            await slow
    assert caught.value.param == "chat_template"
    assert all(one["restarts"] == 0 for one in processes.report().values())


async def test_a_process_that_ends_between_its_start_and_its_greeting_is_replaced_at_once(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the first start, which fails at once; and /ready says 503 while a process is missing."""
    marker = tmp_path / "ends"
    monkeypatch.setenv("LEAVING_WORKER_FILE", str(marker))
    monkeypatch.setattr("hbserve.frontend.text_process._MODULE", "tests.support.leaving_text_worker")
    config = from_dict({"model": {"path": str(folder)}, "server": {"num_tokenizers": 0}})
    marker.write_text("detokenizer 1")
    processes = TextProcesses(config, str(tmp_path))
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(StartupError, match="the detokenizer ended after its start with exit code 3"):
            await processes.start(time.monotonic() + 1000)
    await processes.stop()

    marker.write_text("")
    processes = TextProcesses(config, str(tmp_path))
    await processes.start(time.monotonic() + 1000)
    ready = await client.wait_ready(DEADLINE_S)
    engine = TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size, processes)
    async with served(engine, client) as address, httpx.AsyncClient(base_url=address, timeout=DEADLINE_S) as http:
        for name in ("detokenizer", "tokenizer-large"):
            assert (await http.get("/ready")).status_code == 200
            marker.write_text(f"{name} 2")
            os.kill(processes.report()[name]["pid"], signal.SIGKILL)
            await until(lambda name=name: name in processes.missing)  # type: ignore[misc]
            answer = await http.get("/ready")
            assert (answer.status_code, answer.json()["status"]) == (503, "starting")
            assert name in answer.json()["reason"]
            async with asyncio.timeout(DEADLINE_S):
                assert await processes.encode("the cat") == tokenizer.encode("the cat")
                assert await processes.encode_chat(USER) == tokenizer.encode_chat(USER)
            await until(lambda: not processes.missing)
            assert processes.report()[name]["restarts"] == 3
        assert (await http.get("/ready")).status_code == 200
    await processes.stop()


LOOP = ChatOptions(variables={"enable_thinking": "loop"})


@pytest.fixture
async def looping(tmp_path: Path) -> AsyncIterator[tuple[TextProcesses, Tokenizer]]:
    """Processes of a model whose chat template loops with the options `LOOP`."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if enable_thinking == 'loop' %}}{loop}{{% endif %}}{tiny_tokenizers.CHAT_TEMPLATE}"
    folder = tiny_tokenizers.byte_level(tmp_path / "model", template)
    (folder / "config.json").write_text("{}")
    processes = TextProcesses(from_dict({"model": {"path": str(folder)}}), str(tmp_path))
    await processes.start(time.monotonic() + DEADLINE_S)
    yield processes, Tokenizer(folder)
    await processes.stop()


async def test_a_template_that_loops_is_stopped_and_others_are_answered(
    looping: tuple[TextProcesses, Tokenizer],
) -> None:
    """One that loops in Python is interrupted; the processes stay, and the client is told why."""
    processes, tokenizer = looping
    slow = asyncio.create_task(processes.encode_chat(USER, options=LOOP))
    await asyncio.sleep(0)
    async with asyncio.timeout(120):  # 5 s of processor time, on a busy machine
        forgotten = asyncio.create_task(processes.encode_chat(USER, options=LOOP))
        await asyncio.sleep(0)
        forgotten.cancel()  # its client has gone: it costs no time
        texts: list[OutputText | HBServeError] = []
        stream = processes.open(TextStreamOptions(skip_special_tokens=True, stop=[], min_tokens=0), texts.append)
        assert await processes.encode("the cat") == tokenizer.encode("the cat")
        stream.feed([70], 1, True)
        await until(lambda: bool(texts))
        await until(lambda: "tokenizer-slow" in processes.report())
        large = [{"role": "user", "content": "the cat " * 5000}]
        for messages in (USER, large, USER):  # other chats do not wait for it
            assert await processes.encode_chat(messages) == tokenizer.encode_chat(messages)
        assert not slow.done()
        with pytest.raises(InvalidRequestError, match=r"5 s of processor time, or .* for its chat template") as caught:
            await slow
        assert caught.value.param == "messages"
    assert all(report["restarts"] == 0 for report in processes.report().values())


async def test_templates_that_loop_fill_no_queue_without_end(
    looping: tuple[TextProcesses, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, tokenizer = looping
    monkeypatch.setattr(text_pool, "MAX_SLOW_CHATS", 2)
    monkeypatch.setattr(text_pool, "MAX_SLOW_CPU_S", 0.5)
    async with asyncio.timeout(DEADLINE_S):
        attacks = [asyncio.create_task(processes.encode_chat(USER, options=LOOP)) for _ in range(6)]
        assert await processes.encode_chat(USER) == tokenizer.encode_chat(USER)
        errors = await asyncio.gather(*attacks, return_exceptions=True)
        assert sorted(type(error).__name__ for error in errors) == ["OverloadedError"] * 4 + ["TooSlowError"] * 2
        big = b'{"a": "' + b"x" * (1 << 21) + b'"}'  # read in the process that the loops had
        assert await processes.read_json(big) == {"a": "x" * (1 << 21)}


async def test_a_process_that_the_system_refuses_is_tried_again(
    looping: tuple[TextProcesses, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example because there are no file descriptors: they come back when connections end."""
    processes, tokenizer = looping
    events: list[str] = []
    large = processes._large
    monkeypatch.setattr(text_process, "_RETRY_START_S", 0.01)
    monkeypatch.setattr(large, "_on_event", lambda kind, subject, text: events.append(kind))
    refused = []

    def start(self: ChildProcess) -> None:
        refused.append(OSError(errno.EMFILE, "Too many open files"))
        if len(refused) < 4:
            raise refused[-1]
        start_now(self)

    start_now = ChildProcess.start
    monkeypatch.setattr(ChildProcess, "start", start)
    os.kill(processes.report()["tokenizer-large"]["pid"], signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        await until(lambda: len(refused) == 4 and large.is_connected)
        assert await processes.encode_chat(USER) == tokenizer.encode_chat(USER)
    assert events == ["text_restarted", "start_failed"]
    assert processes.dead is None
