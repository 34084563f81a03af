"""Demonstration behind `make demo`: start a system, chat with it over HTTP, show the latencies.

One prefill and one decode instance run as separate processes: on two GPUs where there are two, else
on the CPU. Every answer below has passed its KV cache from one process to the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = [
    "Hello!",
    "What is HBServe?",
    "Remember: dog parrot, eagle maple, chalk oasis, flute ring. What is eagle?",
    "What is 47 + 38?",
    "Count from 3 to 9.",
    "What are prefill and decode?",
]
GENERAL_QUESTIONS = [
    "Hello!",
    "What is the capital of Spain?",
    "Name three colours.",
    "What is 2 + 3?",
    "Write a sentence about a parrot.",
]
"""For models that were not trained for this demonstration."""
START_TIMEOUT_S = 900.0
"""With the download of a model by a slow line."""
ANSWER_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0
MAX_TOKENS = 160


@dataclass
class Timing:
    """Latencies of one answer, at the client."""

    ttft_ms: float
    tpot_ms: float
    num_tokens: int


def main() -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="what hbserve serve takes, such as smollm2; default: the demo model")
    model_name = parser.parse_args().model
    config = "pd_disagg.yaml" if count_gpus() >= 2 else "pd_disagg_cpu.yaml"
    command = [sys.executable, "-m", "hbserve", "serve", "--config", f"configs/{config}", "--port", "0"]
    command += ["--log-level", "WARNING"]  # at INFO a log line for each request would interrupt the answers
    command += [] if model_name is None else ["--model.path", model_name]
    questions = QUESTIONS if model_name is None else GENERAL_QUESTIONS
    print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url, model = wait_until_ready(server)
        with httpx.Client(base_url=url, timeout=ANSWER_TIMEOUT_S) as client:
            timings = [ask(client, model, question) for question in questions]
            stats = client.get("/stats").raise_for_status().json()
    finally:
        server.terminate()
        try:
            code = server.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()  # its children end with it
            raise SystemExit(f"the server did not end within {END_TIMEOUT_S:g} s") from None
    show(questions, timings, stats)
    return code


def count_gpus() -> int:
    """Count the GPUs of this machine; import torch only if there is a driver."""
    if not Path("/dev/nvidia0").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def wait_until_ready(server: subprocess.Popen[str]) -> tuple[str, str]:
    """Read URL and model name from the server's line on standard output.

    Raises:
        SystemExit: if it ends before it is ready, or is not ready within `START_TIMEOUT_S` and is killed then.
    """
    assert server.stdout is not None
    late = threading.Timer(START_TIMEOUT_S, server.kill)
    late.daemon = True
    late.start()
    try:
        for line in server.stdout:
            print(line, end="", flush=True)
            if line.startswith("HBServe is ready: "):
                url, _, rest = line.removeprefix("HBServe is ready: ").partition(" (model ")
                return url, rest.rstrip(")\n")
    finally:
        late.cancel()
    raise SystemExit(f"the server ended with exit code {server.wait()} before it was ready")


def ask(client: httpx.Client, model: str, question: str) -> Timing:
    """Stream one answer to the terminal."""
    print(f"\n> {question}\n  ", end="", flush=True)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first = last = start
    num_tokens = 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            raise SystemExit(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(chunk["error"]["message"])
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                if text:
                    last = time.perf_counter()
                    first = last if first == start else first
                    print(text, end="", flush=True)
    print(flush=True)
    return Timing(1e3 * (first - start), 1e3 * (last - first) / max(1, num_tokens - 1), num_tokens)


def show(questions: list[str], timings: list[Timing], stats: dict[str, dict[str, object]]) -> None:
    """Print the table."""
    print(f"\n{'question':<46}{'TTFT ms':>9}{'TPOT ms':>9}{'tokens':>8}")
    for question, timing in zip(questions, timings, strict=True):
        shown = question if len(question) < 44 else question[:41] + "..."
        print(f"{shown:<46}{timing.ttft_ms:>9.1f}{timing.tpot_ms:>9.2f}{timing.num_tokens:>8}")
    links = stats["kv_transfer"]["links"]
    assert isinstance(links, dict)
    for name, link in links.items():
        print(f"\nKV moved {name}: {link['bytes']:,} bytes in {link['transfers']} transfers")


if __name__ == "__main__":
    sys.exit(main())
