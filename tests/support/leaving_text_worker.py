"""A text process that ends after it has said that it is ready, as often as a file says, and before its first message.

The file, named by ``LEAVING_WORKER_FILE``, holds a name of a process and a number of ends that are left.
"""

from __future__ import annotations

import os
from pathlib import Path

from hbserve.frontend import text_worker
from hbserve.process import child


def main() -> None:
    file = Path(os.environ["LEAVING_WORKER_FILE"])
    name, _, left = file.read_text().partition(" ")
    orders = child.read_orders()
    if orders["name"] == name and int(left) > 0:
        file.write_text(f"{name} {int(left) - 1}")
        child.report_status({"ready": True})
        os._exit(3)
    child.read_orders = lambda: orders
    text_worker.main()


if __name__ == "__main__":
    main()
