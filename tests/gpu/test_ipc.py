"""Handles of single tensors on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hbserve.platform.ipc import get_ipc_handle

pytestmark = pytest.mark.gpu

DEADLINE_S = 120.0
READER = """
import sys, torch
from hbserve.platform.ipc import convert_ipc_handle_to_tensor
tensor = convert_ipc_handle_to_tensor(bytes.fromhex(sys.argv[1]), (2, 3), torch.float32, "cuda:0")
print(tensor.tolist())
tensor[1, 2] = 42
torch.cuda.synchronize()
"""


def test_another_process_reads_and_writes_a_part_of_a_tensor() -> None:
    whole = torch.arange(12, dtype=torch.float32, device="cuda:0")
    part = whole[6:].view(2, 3)
    handle = get_ipc_handle(part)
    torch.cuda.synchronize()
    command = [sys.executable, "-c", READER, handle.hex()]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True).stdout
    assert printed.strip() == "[[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]"
    assert whole[11] == 42
