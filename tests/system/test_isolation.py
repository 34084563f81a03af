"""Large, slow and malformed requests of one client: they are answered, and the streams of another client are whole."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from benchmarks.front import HOST, front
from benchmarks.isolation import MAX_NUM_SEQS, STEP_S, Clocks, disturb, model_with_template, stream
from benchmarks.isolation_attacks import Send, attacks
from tests.support.paths import ROOT

DEADLINE_S = 180.0
SCALE = 0.1
EXPECTED = {
    "4000 prompts": "200",
    "4000 streamed prompts, usage in each chunk": "200",
    "30 prompts with 128 samples each": "200",
    "128 samples of 3900 token ids": "200",
    "an echo of 3900 token ids, 128 times": "200",
    "16,000 allowed token ids": "200",
    "16,000 unknown fields of a message": "200",
    "metadata of 65,000 values": "200",
    "an answer's schema with a costly pattern": "200",
    "130,000 tokens to /tokenize": "200",
    "a million letters to /tokenize": "200",  # here it is a tenth of that
    "100,000 ids to /detokenize": "200",
    "131,000 ids to /detokenize": "200",
    "40 MB": "413 closed",
}
"""Statuses of attacks that are not refused as invalid (400)."""


async def test_no_request_breaks_the_stream_of_another_client(tmp_path: Path) -> None:
    """Gaps are not asserted here: ``python -m benchmarks isolation`` measures them."""
    with (
        model_with_template(str(ROOT / "examples" / "models" / "hbserve-demo")) as model,
        front(model, STEP_S, 0, MAX_NUM_SEQS) as (port, _),
    ):
        expected, _ = await stream(port, Clocks({}))
        every = {name: make() for name, make in attacks(SCALE).items() if "at once" not in name}
        found: dict[str, str] = {}

        async def all_at_once(send: Send) -> str:
            async def one(name: str) -> None:
                found[name] = await every[name](send)

            await asyncio.gather(*map(one, every))
            return ""

        async with asyncio.timeout(DEADLINE_S):
            await disturb(port, all_at_once, expected, Clocks({}))
        assert {name: status for name, status in found.items() if status not in EXPECTED.get(name, "400")} == {}
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=DEADLINE_S) as http:
            body = {"model": "bench", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
            assert (await http.get("/ready")).status_code == 200


async def test_bodies_that_drip_hold_no_turn() -> None:
    """With one turn for all clients, another client is served while many bodies are on their way."""
    with (
        model_with_template(str(ROOT / "examples" / "models" / "hbserve-demo")) as model,
        front(model, STEP_S, 0, max_open_requests=1) as (port, _),
    ):
        writers = []
        for _ in range(20):
            _, writer = await asyncio.open_connection(HOST, port)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            await writer.drain()
            writers.append(writer)
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=DEADLINE_S) as http:
            for _ in range(3):
                for writer in writers:
                    writer.write(b" ")
                body = {"model": "bench", "prompt": "x", "max_tokens": 2}
                assert (await http.post("/v1/completions", json=body)).status_code == 200
        for writer in writers:
            writer.close()


@pytest.mark.parametrize("num_values", [10, 200_000])
def test_a_body_is_light_by_its_values_not_its_bytes(num_values: int) -> None:
    from hbserve import bounded_json

    assert bounded_json.is_light(json.dumps({"prompt": "word " * 10_000}).encode())
    assert bounded_json.is_light(json.dumps({"prompt": [1] * num_values}).encode()) == (num_values < 100)
