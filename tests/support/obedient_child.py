"""A child process that does what its orders say; run as ``python -m tests.support.obedient_child``."""

from __future__ import annotations

import logging
import os
import signal
import threading

from hbserve.process import child


def main() -> None:
    orders = child.read_orders()
    if "exit_code" in orders:
        child.exit_now(orders["exit_code"])
    if "write_fd" in orders:
        os.write(orders["write_fd"], b"hello")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set() if not orders.get("is_deaf") else None)
    child.report_status({"asleep": True}, is_last=False)
    child.report_status(orders["status"], is_last=False)
    if orders.get("echoes"):
        while (order := child.next_order()) is not None:
            level = {"level": logging.getLogger().level} if "asks_level" in order else {}
            child.report_status({"echo": order} | level, is_last=False)
        stop.set()  # the parent has ended
    while not stop.wait(0.05):
        pass
    child.exit_now(7)


if __name__ == "__main__":
    main()
