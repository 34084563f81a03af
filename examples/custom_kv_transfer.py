"""A KV transfer backend of your own: blocks move through files.

    python examples/custom_kv_transfer.py [model folder]

This is the slowest sensible backend, and it shows the whole contract: send a buffer under a name, and receive it
under the same name. HBServe does everything else: which blocks, when, timeouts, retries.

The class runs in the processes of the instances; `main` runs in the program that starts them.
"""

import asyncio
import os
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path

import torch

from hbserve.errors import KVTransferError
from hbserve.pd_disagg import LLM
from hbserve.pd_disagg.kv_transfer.base import KVTransferBase, KVTransferContext
from hbserve.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).resolve().parent / "models" / "hbserve-demo"
FOLDER_VARIABLE = "EXAMPLE_KV_FOLDER"
POLL_S = 0.002


class FileKVTransfer(KVTransferBase):
    """Backend that moves buffers as files, in the folder ``EXAMPLE_KV_FOLDER`` that all instances must see."""

    def __init__(self, context: KVTransferContext) -> None:
        super().__init__(context)
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None or not Path(folder).is_dir():  # then the system does not start, and this is the reason
            raise KVTransferError(f"{FOLDER_VARIABLE} must name a folder that all instances see, not {folder!r}")

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        path = self._path(request_id, self.context.rank, target_rank)
        await asyncio.to_thread(self._write, path, kv_buffer)

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        path = self._path(request_id, source_rank, self.context.rank)
        deadline = time.monotonic() + self.context.timeout_s
        while not path.exists():
            if time.monotonic() > deadline:
                raise KVTransferError(f"{path} did not appear within {self.context.timeout_s:g} s")
            await asyncio.sleep(POLL_S)
        return await asyncio.to_thread(self._read, path)

    def _path(self, request_id: str, source_rank: int, target_rank: int) -> Path:
        # The id may contain any character, so its digest is the file's name.
        digest = blake2b(request_id.encode(), digest_size=16).hexdigest()
        return Path(os.environ[FOLDER_VARIABLE]) / f"{source_rank}-{target_rank}-{digest}"

    def _write(self, path: Path, kv_buffer: torch.Tensor) -> None:
        unfinished = path.with_suffix(".unfinished")
        kv_buffer.cpu().numpy().tofile(unfinished)
        unfinished.rename(path)  # atomic: a receiver that sees the file sees all of it

    def _read(self, path: Path) -> torch.Tensor:
        buffer = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        path.unlink()
        return buffer


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL)
    with tempfile.TemporaryDirectory() as folder:  # private to this user
        os.environ[FOLDER_VARIABLE] = folder  # the instances inherit it
        with LLM(model, kv_transfer_backend="custom_kv_transfer:FileKVTransfer", log_level="WARNING") as llm:
            question = "Remember: dog parrot, eagle maple, chalk oasis, flute ring. What is eagle?"
            messages = [{"role": "user", "content": question}]
            [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
            links = llm.get_system_stats()["kv_transfer"]["links"]
    print(output["text"])
    for link, moved in links.items():
        print(f"{link}: {moved['bytes']} bytes in {moved['transfers']} file(s)")


# The instances import the class from this file; only the program itself starts a system.
if __name__ == "__main__":
    main()
