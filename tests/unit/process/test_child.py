"""Child's side of a process: cores while it serves and while it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_CHILD = """
import json, os, threading
from hbserve.process import child

def cores():
    return [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]

child.read_orders()
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(json.dumps(cores()), flush=True)
os._exit = lambda code: print(json.dumps([code, *cores()]), flush=True)
child.exit_now(3)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core to set apart")
def test_processes_keep_off_the_core_on_which_they_end() -> None:
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {"HBSERVE_ENDING_CORE": str(cores[-1])}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD], input="{}\n", env=environment, capture_output=True, text=True, timeout=60
    )
    while_serving, at_the_end = map(json.loads, child.stdout.splitlines())
    assert while_serving == [cores[:-1]] * 2
    assert at_the_end == [3, [cores[-1]], [cores[-1]]]
