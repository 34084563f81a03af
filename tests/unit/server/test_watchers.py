"""The two that watch a server, the live page and ``hbserve top``."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, get_args

import pytest

from hbserve import top
from hbserve.messages.supervisor import EventKind
from hbserve.server import live_page


def test_the_page_shows_no_event_as_a_loss_that_is_none() -> None:
    style = (live_page.FOLDER / "style.css").read_text()
    named = set(re.findall(r"\.(\w+)", " ".join(re.findall(r"^\.events (.*)\{ --tone", style, re.MULTILINE))))
    kinds = get_args(EventKind)
    assert named <= set(kinds)
    assert named >= set(kinds[: kinds.index("scheduler_lost")])


def test_a_gap_of_zero_is_measured() -> None:
    """Tokens of one draft arrive together, so that the median gap may be 0."""
    window = dict.fromkeys((f"{name}_p{percent}_ms" for name in ("ttft", "tpot", "itl") for percent in (50, 95, 99)), 0)
    window |= {"prefill_throughput": 0, "decode_throughput": 0, "itl_p95_ms": 30, "itl_p99_ms": 40}
    names = ("uptime_s", "open_requests", "waiting_requests", "completed_requests", "failed_requests")
    scheduler: dict[str, Any] = dict.fromkeys(names, 0) | {"speculation": {}}
    lines = top.draw({"cpu_scheduler": scheduler, "metrics": {"window": window}, "gpu_instances": {}}, {}).splitlines()
    assert lines[-3:] == [
        "TTFT       no recent samples",
        "TPOT       no recent samples",
        "ITL        p50 0.0, p95 30.0, p99 40.0 ms",
    ]


def test_a_server_that_wants_a_key_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        assert top.main(["--once", "--url", f"http://127.0.0.1:{server.server_port}"]) == 1
    assert "set HBSERVE_API_KEY" in capsys.readouterr().err
