"""Sockets in an event loop: what holds for those that an error leaves open."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import zmq
from hbserve.rpc.async_socket import AsyncSocket

context = zmq.Context()
socket = AsyncSocket(context.socket(zmq.DEALER))
socket.socket.connect("tcp://127.0.0.1:1")  # no peer ever takes the message
socket.send([b"unsent"])
context.destroy()
"""


@pytest.mark.slow
def test_a_program_ends_although_an_open_socket_has_unsent_messages() -> None:
    assert subprocess.run([sys.executable, "-c", _PROGRAM], timeout=20).returncode == 0
