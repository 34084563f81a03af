"""An API server over a given scheduler address: the front alone, as ``python -m benchmarks front`` starts it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time

from hbserve.cache_folder.transformers_import import leave_out_torch
from hbserve.config import Config, from_dict
from hbserve.frontend.engine_client import EngineClient
from hbserve.frontend.text_engine import TextEngine
from hbserve.frontend.text_pool import TextProcesses
from hbserve.process import child, event_loop
from hbserve.server.app import create_app
from hbserve.server.fair_gate import FairGate
from hbserve.server.guard import Guard
from hbserve.server.keys import Keys
from hbserve.server.serve import serve
from hbserve.tokenizer import Tokenizer

START_TIMEOUT_S = 60.0


async def run(address: str, config: Config) -> None:
    """Serve until SIGTERM; print one JSON line with port and pids when ready."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    child.configure_logging(config.logging, "api")
    leave_out_torch()
    client = EngineClient(address)
    await client.connect()
    with tempfile.TemporaryDirectory(prefix="hbserve-") as run_dir:
        text = TextProcesses(config, run_dir)
        try:
            await text.start(time.monotonic() + START_TIMEOUT_S)
            ready = await client.wait_ready(START_TIMEOUT_S)
            tokenizer = Tokenizer(config.tokenizer_path, config.model.path)
            max_samples = config.performance.max_waiting_requests
            engine = TextEngine(client, tokenizer, ready.max_model_len, ready.vocab_size, text, max_samples=max_samples)
            pids = {name: process["pid"] for name, process in text.report().items()}

            def on_ready(port: int) -> None:
                child.freeze_heap()
                print(json.dumps({"port": port, "pids": pids}), flush=True)

            app = create_app(engine, client, config.served_name)
            collecting = asyncio.create_task(child.collect_when_quiet(lambda: engine.num_open_samples <= 256))
            guard = Guard(app, config.server, Keys.load(config.server), FairGate(config.server.max_open_requests), stop)
            await serve(guard, config.server, stop, on_ready, 1)
            collecting.cancel()
        finally:
            await text.stop()
            await client.close()


if __name__ == "__main__":
    event_loop.run(run(sys.argv[1], from_dict(json.loads(sys.argv[2]))))
