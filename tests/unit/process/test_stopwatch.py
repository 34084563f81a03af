"""The time of a start: since the process was started, and as a table of all processes."""

from __future__ import annotations

import subprocess
import sys
import time

from hbserve.process.stopwatch import Start, Stopwatch, table


def test_a_process_knows_when_it_was_started() -> None:
    command = [sys.executable, "-c", "from hbserve.process.stopwatch import process_start; print(process_start())"]
    before = time.monotonic()
    began = float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert before - 0.02 <= began <= time.monotonic()  # the kernel counts hundredths


def test_parts_begin_where_the_work_did_and_lines_are_in_the_order_of_the_starts() -> None:
    stopwatch = Stopwatch(time.monotonic() - 5)
    stopwatch.lap("imports")
    assert 5 <= stopwatch.parts["imports"] < 60
    starts = [Start("unified-0", 12.0, 15.5, {"imports": 2.5, "weights": 0.004}), Start("the API server", 10, 16, {})]
    assert table(starts, since=10) == [
        "start of             from s   to s  parts, s",
        "the API server         0.00   6.00  ",
        "unified-0              2.00   5.50  imports 2.50",
    ]
