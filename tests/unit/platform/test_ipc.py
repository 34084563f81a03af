"""Handles of single tensors, which other processes map without a copy."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hbserve.platform.ipc import convert_ipc_handle_to_tensor, get_ipc_handle

DEADLINE_S = 60.0
READER = """
import sys, torch
from hbserve.semi_pd.utils import convert_ipc_handle_to_tensor
tensor = convert_ipc_handle_to_tensor(bytes.fromhex(sys.argv[1]), (2, 3), torch.bfloat16, "cpu")
print(tensor.tolist())
tensor[1, 2] = 42
"""


def test_another_process_reads_and_writes_the_tensor_itself() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    handle = get_ipc_handle(tensor)
    tensor[0, 0] = 7  # after the handle was made
    command = [sys.executable, "-c", READER, handle.hex()]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True).stdout
    assert printed.strip() == "[[7.0, 1.0, 2.0], [3.0, 4.0, 5.0]]"
    assert tensor.tolist() == [[7, 1, 2], [3, 4, 42]]


def test_a_size_may_be_a_number_of_elements() -> None:
    handle = get_ipc_handle(torch.ones(8))
    assert convert_ipc_handle_to_tensor(handle, 8, torch.float32, torch.device("cpu")).sum() == 8
    assert convert_ipc_handle_to_tensor(handle, (2, 2), torch.float32, "cpu").shape == (2, 2)


def test_what_is_no_shared_tensor_is_refused() -> None:
    handle = get_ipc_handle(torch.ones(4))
    for refused, why in (
        (lambda: get_ipc_handle(torch.ones(4, 4).t()), "contiguous"),
        (lambda: get_ipc_handle(torch.empty(0)), "with elements"),
        (lambda: get_ipc_handle(torch.empty(2, device="meta")), "cannot be shared"),
        (lambda: convert_ipc_handle_to_tensor(b"abc", 1, torch.float32, "cpu"), "not a handle"),
        (lambda: convert_ipc_handle_to_tensor(b"", 1, torch.float32, "cpu"), "not a handle"),
        (lambda: convert_ipc_handle_to_tensor(handle, 5, torch.float32, "cpu"), "16 bytes, and 20"),
        (lambda: convert_ipc_handle_to_tensor(handle, 4, torch.float32, "cuda:0"), "on cpu, not on cuda"),
    ):
        with pytest.raises(ValueError, match=why):
            refused()
