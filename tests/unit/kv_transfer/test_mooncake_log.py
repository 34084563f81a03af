"""What Mooncake's engine logs in a good start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DEADLINE_S = 60.0
PROGRAM = """
import sys
from hbserve.kv_transfer.one_sided.mooncake import MooncakeSettings, _without_log
MooncakeSettings("tcp").prepare_environment(30.0, None)
import mooncake.engine
with _without_log(mooncake.engine):
    sys.exit(mooncake.engine.TransferEngine().initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""))
"""


@pytest.mark.parametrize("level", [None, "INFO"])
def test_a_good_start_logs_no_error_unless_the_user_wants_to_see_all(level: str | None) -> None:
    pytest.importorskip("mooncake.engine")
    environment = {name: value for name, value in os.environ.items() if name != "MC_LOG_LEVEL"}
    environment |= {} if level is None else {"MC_LOG_LEVEL": level}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert bool(done.stderr) is (level == "INFO"), done.stderr
