"""Text in, text out, over the real client and a scripted scheduler."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from hbserve.errors import EngineDeadError, InvalidRequestError, OverloadedError, RequestFailedError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.open_sample import OpenSample
from hbserve.frontend.outputs import SampleDelta, TextStream
from hbserve.frontend.text_engine import TextEngine
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.sampling_params import SamplingParams
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.scripted_scheduler import DEADLINE_S, ScriptedScheduler, fails, output, tokens

VOCAB_SIZE = 400
MAX_MODEL_LEN = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[ScriptedScheduler]:
    async with ScriptedScheduler(tmp_path, MAX_MODEL_LEN, VOCAB_SIZE) as scheduler:
        yield scheduler


@pytest.fixture
async def engine(client: EngineClient, tokenizer: Tokenizer) -> TextEngine:
    ready = await client.wait_ready(DEADLINE_S)
    return TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size)


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text, one token per byte."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


async def collect(engine: TextEngine, prompt: str | list[int], sampling: SamplingParams) -> list[SampleDelta]:
    async with asyncio.timeout(DEADLINE_S):
        return [delta async for delta in engine.stream(prompt, sampling)]


def whole_delta(index: int) -> SampleDelta:
    """A sample of one token."""
    return SampleDelta(
        index=index,
        text="a",
        token_ids=[1],
        logprobs=None,
        finish_reason="length",
        stop_reason=None,
        num_prompt_tokens=1,
        num_cached_tokens=0,
    )


async def endless(request: AddRequest) -> AsyncIterator[RequestOutput]:
    """One token, then silence."""
    yield output(request, 70)
    await asyncio.Event().wait()


# --- outputs -------------------------------------------------------------------------------------


async def test_text_comes_token_by_token(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    scheduler.script = tokens(*letters(tokenizer, "hé!"))
    deltas = await collect(engine, "the cat", SamplingParams())
    assert "".join(delta.text for delta in deltas) == "hé!"
    assert [delta.finish_reason for delta in deltas] == [*[None] * (len(deltas) - 1), "length"]
    assert {delta.num_prompt_tokens for delta in deltas} == {len(tokenizer.encode("the cat"))}
    assert [delta.num_cached_tokens for delta in deltas] == [2, *[0] * (len(deltas) - 1)]


async def test_generate_gives_the_whole_output(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    ids = letters(tokenizer, "abc")
    scheduler.script = tokens(*ids)
    result = await engine.generate([5, 6, 7], SamplingParams(logprobs=2), "mine")
    assert result["request_id"] == "mine"
    assert (result["text"], result["token_ids"], result["finish_reason"]) == ("abc", ids, "length")
    assert (result["num_prompt_tokens"], result["num_cached_tokens"]) == (3, 2)
    assert result["logprobs"] == [{token_id: -0.5, token_id + 1: -1.5} for token_id in ids]
    assert [sample["text"] for sample in result["samples"]] == ["abc"]


async def test_a_special_token_as_a_stop_string_ends_the_request(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    start = tokenizer.added_token_id("<|im_start|>")
    assert start is not None
    scheduler.script = tokens(*letters(tokenizer, "hi"), start, *letters(tokenizer, "there"))
    deltas = await collect(engine, "the cat", SamplingParams(stop=["<|im_start|>"]))
    assert "".join(delta.text for delta in deltas) == "hi"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "<|im_start|>")


async def test_a_stop_string_that_can_never_match_is_refused(engine: TextEngine, scheduler: ScriptedScheduler) -> None:
    """It contains a special token, which is not part of the text."""
    with pytest.raises(InvalidRequestError, match=r"can never match.*skip_special_tokens") as caught:
        await collect(engine, "the cat", SamplingParams(stop=["\n<|im_end|>"]))
    assert caught.value.param == "stop"
    await collect(engine, "the cat", SamplingParams(stop=["\n<|im_end|>"], skip_special_tokens=False))
    assert len(scheduler.requests) == 1


async def test_end_tokens_outside_the_vocabulary_are_ignored(
    client: EngineClient, scheduler: ScriptedScheduler, tmp_path: Path
) -> None:
    """Every file may name them: some say -1 for none, and some belong to a larger vocabulary."""
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [-1, 9, VOCAB_SIZE, 2**70]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": -(2**31)}))
    engine = TextEngine(client, Tokenizer(folder), MAX_MODEL_LEN, VOCAB_SIZE)
    scheduler.script = tokens(70, 71)
    for sampling in (SamplingParams(), SamplingParams(ignore_eos=True), SamplingParams(stop_token_ids=[5])):
        await collect(engine, [5], sampling)
    assert [request.end_token_ids for request in scheduler.requests] == [[2, 9], [], [2, 5, 9]]


async def test_a_grammar_needs_an_end_token_in_the_vocabulary(client: EngineClient, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": -1}))
    engine = TextEngine(client, Tokenizer(tmp_path), MAX_MODEL_LEN, VOCAB_SIZE)
    with pytest.raises(InvalidRequestError, match="names no end token"):
        await collect(engine, [5], SamplingParams(grammar='start: "a"'))


async def test_end_token_is_counted_but_not_shown(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    a, newline = letters(tokenizer, "a\n")
    scheduler.script = tokens(a, newline, a, a)
    result = await engine.generate("x", SamplingParams(stop_token_ids=[newline]))
    assert (result["text"], result["token_ids"]) == ("a", [a, newline])
    assert (result["finish_reason"], result["stop_reason"]) == ("stop", newline)
    scheduler.script = tokens(a, 2, a)
    result = await engine.generate("x", SamplingParams(skip_special_tokens=False))
    assert (result["text"], result["token_ids"]) == ("a", [a, 2])
    assert (result["finish_reason"], result["stop_reason"]) == ("stop", None)


async def test_ignore_eos_leaves_only_the_requests_own_stop_tokens(
    engine: TextEngine, scheduler: ScriptedScheduler
) -> None:
    await engine.generate("x", SamplingParams())
    await engine.generate("x", SamplingParams(ignore_eos=True, stop_token_ids=[9, 8]))
    assert [request.end_token_ids for request in scheduler.requests] == [[2], [8, 9]]


async def test_chat_is_prompted_by_the_template(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    await engine.generate_chat(messages, SamplingParams())
    assert scheduler.requests[0].prompt_token_ids == tokenizer.encode_chat(messages)


# --- stop strings --------------------------------------------------------------------------------


async def test_stop_string_ends_the_sample_and_the_request(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    ids = letters(tokenizer, "go STOP")

    async def goes_on(request: AddRequest) -> AsyncIterator[RequestOutput]:
        for token_id in ids:
            yield output(request, token_id)
        await asyncio.Event().wait()

    scheduler.script = goes_on
    deltas = await collect(engine, "x", SamplingParams(stop=["STOP", "no"], max_tokens=30))
    assert "".join(delta.text for delta in deltas) == "go "
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop_reason == "STOP"
    assert sum(len(delta.token_ids) for delta in deltas) == len(ids)
    await scheduler.wait_for_aborts(1)
    assert scheduler.aborts[0].request_id == scheduler.requests[0].request_id
    assert scheduler.aborts[0].finish_reason == "stop"


async def test_tokens_after_the_stop_string_do_not_count(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    ids = letters(tokenizer, "ab.cd")

    async def all_at_once(request: AddRequest) -> AsyncIterator[RequestOutput]:
        yield output(request, *ids, finish_reason="length")

    scheduler.script = all_at_once
    result = await engine.generate("x", SamplingParams(stop="b.", logprobs=0))
    assert (result["text"], result["token_ids"], result["finish_reason"]) == ("a", ids[:3], "stop")
    assert result["logprobs"] is not None
    assert len(result["logprobs"]) == 3


async def test_withheld_text_comes_at_the_end(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    scheduler.script = tokens(*letters(tokenizer, "a END"))
    deltas = await collect(engine, "x", SamplingParams(stop="END."))
    assert [delta.text for delta in deltas] == ["a", " ", "", "", "END"]
    assert deltas[-1].finish_reason == "length"


# --- n samples -----------------------------------------------------------------------------------


async def test_samples_are_independent_requests_with_derived_seeds(
    engine: TextEngine, scheduler: ScriptedScheduler, tokenizer: Tokenizer
) -> None:
    numbers = itertools.count()

    async def numbered(request: AddRequest) -> AsyncIterator[RequestOutput]:
        yield output(request, *letters(tokenizer, "abc"[next(numbers)]), finish_reason="length", num_cached_tokens=1)

    scheduler.script = numbered
    result = await engine.generate("x", SamplingParams(n=3, seed=7))
    assert [sample["index"] for sample in result["samples"]] == [0, 1, 2]
    assert sorted(sample["text"] for sample in result["samples"]) == ["a", "b", "c"]
    assert result["text"] == result["samples"][0]["text"]
    assert result["num_cached_tokens"] == 1
    seeds = [request.sampling.seed for request in scheduler.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert all(request.sampling.n == 1 for request in scheduler.requests)
    scheduler.script = tokens(50)
    await engine.generate("x", SamplingParams(n=3, seed=7))
    assert seeds == [request.sampling.seed for request in scheduler.requests[3:]]


async def test_requests_without_seed_get_different_ones(engine: TextEngine, scheduler: ScriptedScheduler) -> None:
    await engine.generate("x", SamplingParams())
    await engine.generate("x", SamplingParams())
    first, second = (request.sampling.seed for request in scheduler.requests)
    assert first is not None
    assert second is not None
    assert first != second


async def test_a_target_counts_from_the_begin_of_the_work_on_a_request(
    engine: TextEngine, scheduler: ScriptedScheduler
) -> None:
    """To encode a long prompt takes time, which its client waits, too."""
    stream = await engine.open(["x"], SamplingParams(max_tokens=1), waits_since=time.monotonic() - 3.0)
    while await stream.read():
        pass
    stream.close()
    await engine.generate("x", SamplingParams(max_tokens=1))
    first, second = (request.age_s for request in scheduler.requests)
    assert first >= 3.0
    assert second > 0


async def test_samples_stream_side_by_side(engine: TextEngine, scheduler: ScriptedScheduler) -> None:
    started = asyncio.Event()

    async def second_first(request: AddRequest) -> AsyncIterator[RequestOutput]:
        if request.request_id.startswith("r-0-"):
            await started.wait()  # would hang if the samples ran one after another
        yield output(request, 70, finish_reason="length")
        started.set()

    scheduler.script = second_first
    async with asyncio.timeout(DEADLINE_S):
        order = [delta.index async for delta in engine.stream("x", SamplingParams(n=2), "r")]
    assert order == [1, 0]


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "param", "match"),
    [
        ("", SamplingParams(), "prompt", "empty"),
        ([], SamplingParams(), "prompt", "empty"),
        ([1, VOCAB_SIZE], SamplingParams(), "prompt", "vocabulary"),
        ([1, -1], SamplingParams(), "prompt", "vocabulary"),
        ([1, "2"], SamplingParams(), "prompt", "integers"),
        ([1] * MAX_MODEL_LEN, SamplingParams(max_tokens=1), "prompt", "maximum context length is 64"),
        ([1] * (MAX_MODEL_LEN - 4), SamplingParams(max_tokens=5), "max_tokens", "at most 4 tokens"),
        ([1] * (MAX_MODEL_LEN - 4), SamplingParams(max_tokens=None, min_tokens=5), "min_tokens", "max_tokens"),
        ("x", SamplingParams(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids", "vocabulary"),
    ],
)
async def test_a_refusal_names_the_parameter(
    engine: TextEngine,
    scheduler: ScriptedScheduler,
    prompt: str | list[int],
    sampling: SamplingParams,
    param: str,
    match: str,
) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        await engine.generate(prompt, sampling)
    assert caught.value.param == param
    assert scheduler.requests == []


async def test_without_max_tokens_the_output_may_fill_the_context(
    engine: TextEngine, scheduler: ScriptedScheduler
) -> None:
    await engine.generate([1] * (MAX_MODEL_LEN - 1), SamplingParams(max_tokens=None))
    await engine.generate([1] * 10, SamplingParams(max_tokens=None))
    assert [request.sampling.max_tokens for request in scheduler.requests] == [1, MAX_MODEL_LEN - 10]


async def test_model_without_tokenizer_serves_token_ids(
    client: EngineClient, scheduler: ScriptedScheduler, tmp_path: Path
) -> None:
    engine = TextEngine(client, Tokenizer(tmp_path), MAX_MODEL_LEN, VOCAB_SIZE)
    result = await engine.generate([1, 2], SamplingParams())
    assert (result["text"], result["token_ids"]) == ("", [50, 51, 52])
    for prompt, sampling in (("text", SamplingParams()), ([1], SamplingParams(stop="x"))):
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            await engine.generate(prompt, sampling)


# --- closing, aborting, failing ------------------------------------------------------------------


async def test_closing_the_stream_aborts_every_sample(engine: TextEngine, scheduler: ScriptedScheduler) -> None:
    scheduler.script = endless
    async with asyncio.timeout(DEADLINE_S), aclosing(engine.stream("x", SamplingParams(n=3))) as deltas:
        await anext(deltas)
        await scheduler.wait_for(lambda: len(scheduler.requests) == 3)
    await scheduler.wait_for_aborts(3)
    assert {a.request_id for a in scheduler.aborts} == {r.request_id for r in scheduler.requests}


async def test_cancelling_generate_aborts(engine: TextEngine, scheduler: ScriptedScheduler) -> None:
    scheduler.script = endless
    task = asyncio.create_task(engine.generate("x", SamplingParams()))
    await scheduler.wait_for(lambda: len(scheduler.requests) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await scheduler.wait_for_aborts(1)


async def test_abort_by_id_ends_all_samples(engine: TextEngine, scheduler: ScriptedScheduler) -> None:
    scheduler.script = endless
    task = asyncio.create_task(engine.generate("x", SamplingParams(n=2), "r"))
    await scheduler.wait_for(lambda: len(scheduler.requests) == 2)
    engine.abort("another")
    engine.abort("r")
    async with asyncio.timeout(DEADLINE_S):
        result = await task
    assert [sample["finish_reason"] for sample in result["samples"]] == ["abort", "abort"]


async def test_request_ids_are_unique_while_open_and_free_afterwards(
    engine: TextEngine, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = endless
    async with asyncio.timeout(DEADLINE_S), aclosing(engine.stream("x", SamplingParams(), "r")) as deltas:
        await anext(deltas)
        with pytest.raises(InvalidRequestError, match="in use"):
            await engine.generate("x", SamplingParams(), "r")
    scheduler.script = tokens(50)
    assert (await engine.generate("x", SamplingParams(), "r"))["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("OverloadedError", OverloadedError),
        ("RequestFailedError", RequestFailedError),
        ("EngineDeadError", EngineDeadError),
    ],
)
async def test_a_failed_sample_fails_the_request_and_aborts_the_others(
    engine: TextEngine, scheduler: ScriptedScheduler, kind: str, error: type[Exception]
) -> None:
    broken = fails(kind, "no luck", after=1)

    def first_fails(request: AddRequest) -> AsyncIterator[RequestOutput]:
        return broken(request) if request.request_id.startswith("r-0-") else endless(request)

    scheduler.script = first_fails
    with pytest.raises(error, match="no luck"):
        async with asyncio.timeout(DEADLINE_S):
            await engine.generate("x", SamplingParams(n=2), "r")
    await scheduler.wait_for(lambda: any(abort.request_id.startswith("r-1-") for abort in scheduler.aborts))


async def test_death_of_the_engine_ends_open_and_later_requests(
    engine: TextEngine, client: EngineClient, scheduler: ScriptedScheduler
) -> None:
    scheduler.script = endless
    task = asyncio.create_task(engine.generate("x", SamplingParams()))
    await scheduler.wait_for(lambda: len(scheduler.requests) == 1)
    client.declare_dead("the scheduler exited")
    for attempt in (task, engine.generate("x", SamplingParams())):
        with pytest.raises(EngineDeadError, match="the scheduler exited"):
            async with asyncio.timeout(DEADLINE_S):
                await attempt


async def test_requests_with_many_prompts_begin_one_after_the_other(
    engine: TextEngine, client: EngineClient, scheduler: ScriptedScheduler
) -> None:
    """Eight at once hold up the loop no longer than one: each of its turns sends samples of two requests at most."""
    scheduler.script = endless
    prompts: list[str | list[int]] = [[5]] * 300
    opened = [asyncio.create_task(engine.open(prompts, SamplingParams(), f"r{number}")) for number in range(8)]
    num_sent, most = Counter[str](), 0
    async with asyncio.timeout(DEADLINE_S):
        while not all(task.done() for task in opened):
            await asyncio.sleep(0)
            before, num_sent = num_sent, Counter(request.id.split("-")[0] for request in client._requests)
            most = max(most, len(num_sent - before))
    assert 1 <= most <= 2
    for task in opened:
        task.result().close()


async def test_an_ended_request_leaves_nothing_to_the_garbage_collector(
    engine: TextEngine, scheduler: ScriptedScheduler
) -> None:
    """A collection stops the process, and finding thousands of ended samples would take it long."""
    scheduler.script = tokens(70, 71)
    sampling = SamplingParams(n=40, max_tokens=2)

    def num_left() -> int:
        return sum(type(thing) in (OpenSample, TextStream) for thing in gc.get_objects())

    gc.disable()
    try:
        before = num_left()
        await collect(engine, [5], sampling)
        stream = await engine.open([[5]], sampling)
        stream.close()
        del stream
        assert num_left() == before
    finally:
        gc.enable()


async def test_many_samples_are_read_in_parts() -> None:
    stream = TextStream(1000, lambda: None)
    for index in range(1000):
        stream.push(whole_delta(index))
    numbers = []
    while deltas := await stream.read():
        assert len(deltas) <= 256
        numbers += [delta.index for delta in deltas]
    assert numbers == list(range(1000))


async def test_unread_deltas_are_merged() -> None:
    closed: list[bool] = []
    stream = TextStream(2, lambda: closed.append(True))

    def delta(index: int, text: str, finish_reason: str | None = None) -> SampleDelta:
        logprobs = [TokenLogprobs(token=-1.0, top_ids=[], top=[])]
        return SampleDelta(
            index=index,
            text=text,
            token_ids=[ord(text)],
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=None,
            num_prompt_tokens=3,
            num_cached_tokens=2 if text == "a" else 0,
        )

    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    for one in (delta(0, "a"), delta(1, "x"), delta(0, "b"), delta(0, "c", "length")):
        stream.push(one)
    first, second = await asyncio.wait_for(reading, DEADLINE_S)
    assert (first.index, first.text, first.token_ids, first.finish_reason) == (0, "abc", [97, 98, 99], "length")
    assert (len(first.logprobs or []), first.num_cached_tokens) == (3, 2)
    assert (second.index, second.text, second.finish_reason) == (1, "x", None)
    stream.push(delta(1, "y", "stop"))
    assert [one.text for one in await stream.read()] == ["y"]
    assert await stream.read() == []
    stream.close()
    stream.close()
    assert closed == [True]


async def test_deltas_before_an_error_are_read_before_it() -> None:
    stream = TextStream(1, lambda: None)
    stream.push(msgspec.structs.replace(whole_delta(0), finish_reason=None))
    stream.fail(RequestFailedError("lost"))
    assert [delta.text for delta in await stream.read()] == ["a"]
    with pytest.raises(RequestFailedError, match="lost"):
        await stream.read()
