"""A process that runs the same step again and again, on its share of the device.

Its standard input is a line of orders (`Stepper`), then a line per measurement (`Work`). It answers each
measurement with a line on the status pipe, and ends when its input ends. The resident process owns its
memory, so that one stepper per percentage fits on a device.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from hbserve.cache_folder.transformers_import import leave_out_torch
from hbserve.config import Config, InstanceConfig, ModelConfig
from hbserve.errors import HBServeError
from hbserve.messages.worker import SequenceState, StepPlan
from hbserve.policy.probe_step import ProbeSize, probe_rows
from hbserve.process import child

if TYPE_CHECKING:
    from hbserve.engine.model_runner import ModelRunner, PendingStep

_DEPTH = 2  # plans in flight, as in serving
_WARM_UP = 3


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of step, repeated for a time.

    Attributes:
        tokens: prompt tokens in each step, after ``prompt_context`` others; 0: no prompt.
        batch: sequences that decode in each step, each with ``context`` tokens.
        seconds: measured time, at least one step; a lead of a third of it comes before.
        first_block, num_blocks: KV blocks to use. Their contents do not matter for the time.
    """

    tokens: int = 0
    prompt_context: int = 0
    batch: int = 0
    context: int = 0
    seconds: float
    first_block: int
    num_blocks: int

    @property
    def lead_s(self) -> float:
        """Time of unmeasured steps before the measured ones."""
        return self.seconds / 3


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Result: the number of steps, and the mean time from the end of one to the end of the next."""

    ms: float
    steps: int


def measure(runner: ModelRunner, work: Work) -> Measured:
    """Run steps one after the other; launch each before the step before has ended."""
    size = ProbeSize(work.tokens, work.prompt_context, work.batch, work.context)
    blocks = range(work.first_block, work.first_block + work.num_blocks)
    states, rows = probe_rows(size, blocks, runner.layout.block_size)
    in_flight: deque[PendingStep] = deque()

    def run_one(new_sequences: list[SequenceState]) -> None:
        plan = StepPlan(epoch=0, step_id=0, rows=rows, new_sequences=new_sequences, sends=[])
        in_flight.append(runner.launch(plan))
        if len(in_flight) >= _DEPTH:
            in_flight.popleft().result()

    run_one(states)
    lead_until = time.perf_counter() + work.lead_s
    warm = 0
    while warm < _WARM_UP or time.perf_counter() < lead_until:
        run_one([])
        warm += 1
    steps, started = 0, time.perf_counter()
    while not steps or time.perf_counter() < started + work.seconds:
        run_one([])
        steps += 1
    seconds = time.perf_counter() - started
    while in_flight:
        in_flight.popleft().result()
    return Measured(ms=1000 * seconds / steps, steps=steps)


class Stepper(msgspec.Struct, frozen=True, kw_only=True):
    """Orders that a process of this module reads first.

    Attributes:
        attachment: an `hbserve.engine.arenas.ArenaAttachment`, as plain data.
    """

    config: Config
    instance: InstanceConfig
    percentage: int
    priority: int
    attachment: dict[str, object]


def _run(orders: Stepper) -> None:
    import torch

    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.engine.model_runner import ModelRunner
    from hbserve.platform import make_platform, set_priority
    from hbserve.semi_pd.utils import partition_of

    set_priority(orders.priority)
    partition = partition_of(orders.instance.instance_type, orders.percentage, orders.priority)
    attachment = msgspec.convert(orders.attachment, ArenaAttachment)
    model = msgspec.convert(msgspec.to_builtins(orders.config.model) | {"device": attachment.device}, ModelConfig)
    instance = orders.instance
    platform = make_platform(model.device, instance.gpu_id, instance.num_threads, 1, partition=partition)
    platform.activate()
    with torch.inference_mode():
        runner = ModelRunner(
            msgspec.structs.replace(orders.config, model=model), instance, platform, attachment=attachment
        )
        child.report_status({"ready": True, "device": platform.describe()}, is_last=False)
        while (order := child.next_order()) is not None:
            result = measure(runner, msgspec.convert(order, Work))
            child.report_status(msgspec.to_builtins(result), is_last=False)


def main() -> None:
    """Entry of the process that `hbserve.profile.processes` starts."""
    orders = msgspec.convert(child.read_orders(), Stepper)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name = f"profile-{orders.instance.instance_type}-{orders.percentage}"
    child.set_process_title(f"hbserve-{name}")
    child.configure_logging(orders.config.logging, name)
    code = 0
    leave_out_torch()
    try:
        _run(orders)
    except HBServeError as error:
        child.report_status({"error": str(error)})
        code = 1
    except Exception as error:  # the parent must get the reason, not only the exit code
        child.report_status({"error": repr(error)})
        code = 1
    child.exit_now(code)


if __name__ == "__main__":
    main()
