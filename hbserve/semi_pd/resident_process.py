"""The resident process: holds a rank's weights and KV cache, lets others attach, and computes nothing.

Its life:

1. It loads the weights and reports how much KV fits.
2. The manager sends the size that fits on all ranks; the process reserves it and reports where everything lies.
3. It reads its standard input. Each line asks for a sign of life, which it gives after a touch of the device.
4. It ends when that input ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import Any

import msgspec

from hbserve.cache_folder.transformers_import import leave_out_torch
from hbserve.config import Config
from hbserve.errors import HBServeError
from hbserve.process import child

EXIT_DEVICE_FAILED = 73


def hold(config: Config, orders: dict[str, Any]) -> None:
    """Load, report, and hold until the standard input ends.

    Raises:
        HBServeError: if model, configuration and memory do not fit together.
    """
    import torch

    from hbserve.engine.arenas import KVSize, share_arenas
    from hbserve.layers.parallel import TensorParallel
    from hbserve.model_spec import ModelSpec
    from hbserve.platform import make_platform

    def agree(size: KVSize) -> KVSize:
        child.report_status({"fits": {"num_blocks": size.num_blocks, "max_model_len": size.max_model_len}}, False)
        order = child.next_order()
        if order is None:
            child.exit_now(0)
        return KVSize(**order)

    started = time.monotonic()
    rank, size = orders["tp_rank"], orders["num_ranks"]
    platform = make_platform(config.model.device, orders["gpu_id"], None, 1, rank, size)
    platform.activate()
    with torch.inference_mode():
        spec = ModelSpec.load(
            config.model.path, config.model.quantization, config.kv_cache.dtype, config.model.max_model_len
        )
        parallel = TensorParallel(rank, size, has_whole_experts=config.model.expert_parallel)
        arenas, attachment = share_arenas(config, spec, platform, parallel, time.time_ns(), agree)
    ready = {
        "ready": True,
        "attachment": msgspec.to_builtins(attachment),
        "device": platform.describe(),
        "weights_bytes": arenas.weights.numel(),
        "kv_bytes": arenas.kv.numel(),
        "free_bytes": platform.free_memory_bytes(),
        "seconds": time.monotonic() - started,
    }
    child.report_status(ready, is_last=False)
    while child.next_order() is not None:
        try:
            platform.probe()
        except RuntimeError as error:
            child.report_status({"error": f"the device has failed: {error}"})
            child.exit_now(EXIT_DEVICE_FAILED)
        child.report_status({"alive": True, "free_bytes": platform.free_memory_bytes()}, is_last=False)


def main() -> None:
    """Run the process that a `ResidentProcessManager` starts."""
    orders = child.read_orders()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.convert(orders["config"], Config)
    child.set_process_title(f"hbserve-{orders['name']}")
    child.configure_logging(config.logging, orders["name"])
    code = 0
    leave_out_torch()
    try:
        hold(config, orders)
    except HBServeError as error:
        child.report_status({"error": str(error)})
        code = 1
    # The manager removes the folder too, unless it was killed.
    if orders["run_dir"] is not None and os.path.isdir(orders["run_dir"]):
        shutil.rmtree(orders["run_dir"], ignore_errors=True)
    child.exit_now(code)


if __name__ == "__main__":
    main()
