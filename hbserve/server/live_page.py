"""The operator's page at ``/``: its static files, the data that it polls, and the drain of the server."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from hbserve import __version__
from hbserve.config import Config
from hbserve.errors import EngineDeadError, SchedulerRestartingError
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.frontend.text_pool import TextProcesses
from hbserve.server.app import STATS_TIMEOUT_S
from hbserve.server.fair_gate import FairGate
from hbserve.system.running_plan import RunningPlan

FOLDER = Path(__file__).parent / "page"
_SECURITY = {
    # The page may load from this server only, and may ask no other.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def install(
    app: FastAPI,
    config: Config,
    running: RunningPlan | None,
    engine: TextEngine,
    client: EngineClient,
    gate: FairGate,
    text: TextProcesses | None,
    stop: asyncio.Event,
) -> None:
    """Add the page's routes to an application.

    Args:
        config: the page shows its model and latency targets, and without a plan its mode.
        running: what the system consists of now, and why.
        text: the tokenizer and detokenizer processes, if there are any.
        stop: setting it ends the server.
    """
    slo, defaults = config.semi_pd.slo, config.scheduler
    ttft_ms, tpot_ms = (defaults.ttft_ms, defaults.tpot_ms) if slo is None else (slo.ttft_target_ms, slo.tpot_target_ms)
    if defaults.ttft_ms_per_1k_tokens:
        ttft_ms = None  # each request has its own, which no line can show
    start = time.monotonic()
    files = {str(path.relative_to(FOLDER)): path for path in FOLDER.rglob("*") if path.is_file()}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", headers=_SECURITY)

    @app.get("/page/{name:path}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return FileResponse(files[name], headers=_SECURITY)

    @app.get("/live")
    async def live_data() -> dict[str, Any]:
        """Return the data that the page polls: statistics with the last requests and events, and the server's state."""
        plan = None if running is None else running.plan
        shown_plan = None
        if plan is not None:
            shown_plan = {"chosen_by": plan.changes[-1].by if plan.changes else plan.chosen_by, "why": plan.why}
        data: dict[str, Any] = {
            "time": time.time(),
            "server": {
                "version": __version__,
                "model": config.served_name,
                "mode": config.mode if plan is None else plan.mode,
                "plan": shown_plan,
                "uptime_s": time.monotonic() - start,
                "open_requests": engine.num_open,
                "waiting_for_turn": gate.num_waiting,
                "draining": stop.is_set(),
                "restarting": client.restarting is not None,
                "max_model_len": engine.max_model_len,
                "text_processes": {} if text is None else text.report(),
            },
            "targets": {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms},
            "stats": None,
            "error": client.restarting,
        }
        if client.restarting is not None:
            return data
        try:
            data["stats"] = await client.stats(STATS_TIMEOUT_S, recent=True)
            if running is not None:
                data["server"]["mode"] = running.update(data["stats"]).mode
        except (EngineDeadError, SchedulerRestartingError) as error:
            data["error"] = str(error)
        return data

    @app.post("/admin/drain")
    async def drain() -> dict[str, Any]:
        """End the server as SIGTERM does: open requests finish, or fail with ``shutting_down`` at the deadline."""
        stop.set()
        return {"draining": True}
