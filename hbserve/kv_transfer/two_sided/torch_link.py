"""One direction between two ranks over torch.distributed. Each side of a link calls it in one thread of its own.

Transfers that gather leave as one *batch*: a header over gloo, which names each transfer's *chunk* of bytes, then the
chunks' blocks in pieces. The receiver launches no kernel that waits for a sender: both sides enter NCCL only after the
header has said that the sender is there. Pieces use a few buffers (*slots*) in turn, so that one piece is copied from
or to the arena while others are on the wire. Neighbouring blocks are sent from where they lie.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed

from hbserve.errors import KVTransferError
from hbserve.kv_transfer.base import KVTransferContext
from hbserve.kv_transfer.block_parts import BlockParts
from hbserve.kv_transfer.head_split import Part
from hbserve.kv_transfer.send_queue import MAX_BATCH_ITEMS, SendItem
from hbserve.messages.transfer import LayerGroup

T = TypeVar("T")
logger = logging.getLogger(__name__)

dist: Any = torch.distributed
_SENDER, _RECEIVER = 0, 1
_NUM_SLOTS = 3
_PIECE_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
"""Large enough for the link's full rate, small enough that the copies at both ends hide behind it."""
_HEADER_WORDS = 2 + 2 * MAX_BATCH_ITEMS


class Header(NamedTuple):
    """Contents of a batch.

    Attributes:
        piece_bytes: bytes of a piece, at most.
        chunks: digest of the transfer's id and number of bytes, for each transfer.
    """

    piece_bytes: int
    chunks: list[tuple[int, int]]

    def words(self) -> list[int]:
        """Encode as the words that are sent."""
        words = [len(self.chunks), self.piece_bytes, *(word for chunk in self.chunks for word in chunk)]
        return words + [0] * (_HEADER_WORDS - len(words))

    @staticmethod
    def of_words(words: list[int]) -> Header:
        """Decode received words.

        Raises:
            KVTransferError: if they are no header.
        """
        count, piece_bytes, *rest = words
        chunks = list(zip(rest[0 : 2 * count : 2], rest[1 : 2 * count : 2], strict=True))
        if not 0 < count <= MAX_BATCH_ITEMS or piece_bytes <= 0 or any(num_bytes <= 0 for _, num_bytes in chunks):
            raise KVTransferError("received words are not a header of transfers")
        return Header(piece_bytes, chunks)


class PendingReceive:
    """Blocks that have been asked for, and the future ``arrived``."""

    def __init__(self, block_ids: Sequence[int], layers: LayerGroup) -> None:
        self.block_ids, self.layers = block_ids, layers
        self._loop = asyncio.get_running_loop()
        self.arrived: asyncio.Future[None] = self._loop.create_future()

    def settle(self, error: KVTransferError | None) -> None:
        """Report that the blocks have arrived or will not come. Called in the event loop."""
        if self.arrived.done():
            return
        if error is None:
            self.arrived.set_result(None)
        else:
            self.arrived.set_exception(error)

    def settle_threadsafe(self) -> None:
        """Report from another thread that the blocks have arrived."""
        self._loop.call_soon_threadsafe(self.settle, None)


def digest_of(transfer_id: str) -> int:
    """Return the digest by which a header names a transfer."""
    return int.from_bytes(blake2b(transfer_id.encode(), digest_size=8).digest(), "little", signed=True)


class _Link:
    """State that both ends have.

    Args:
        name: the same on both sides, and never used twice.
        endpoint: ``host port device`` of the receiver; at its store the two sides meet.
        parts, part: the part of the arena's blocks that is sent over the link.
    """

    _rank: int
    _high_priority: bool
    """Whether its kernels get multiprocessors before those of the steps."""

    def __init__(
        self,
        name: str,
        context: KVTransferContext,
        use_nccl: bool,
        endpoint: str,
        parts: BlockParts,
        part: Part,
    ) -> None:
        self.name = name
        self._context, self._use_nccl, self._endpoint = context, use_nccl, endpoint
        self._all_layers, self._part = parts, part
        self._part_bytes = parts.part_bytes(part)
        self._timeout = timedelta(seconds=context.timeout_s)
        self._device = context.device if use_nccl else torch.device("cpu")
        self._headers: Any = None
        self._data: Any = None
        self._has_joined: bool | None = None
        self._is_closed = False
        self._slots: list[torch.Tensor | None] = [None] * _NUM_SLOTS
        self._streams: list[Any] = []
        if context.device.type == "cuda":
            priority = -1 if self._high_priority else 0
            self._streams = [torch.cuda.Stream(context.device, priority=priority) for _ in range(_NUM_SLOTS)]  # type: ignore[no-untyped-call]

    def rendezvous(self) -> None:
        """Make the process groups with the other side, once. Called in the link's thread; blocks up to the time limit.

        Raises:
            KVTransferError: if this fails, or has failed before: a name is used only once.
        """
        if self._has_joined is None:
            self._has_joined = False
            with self._explained():
                self._make_groups()
                self._prepare()
            self._has_joined = True
        if not self._has_joined:
            raise KVTransferError(f"KV link {self.name}: the two sides have not met")
        if self._is_closed:
            raise KVTransferError(f"KV link {self.name} was closed")

    def _make_groups(self) -> None:
        rank, (host, port, _) = self._rank, self._endpoint.split(" ")
        # A connection for this link alone: while a link waits for its other side, it blocks the connection.
        store = dist.TCPStore(host, int(port), None, False, self._timeout, wait_for_workers=False)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._context.host)]
        options._timeout = self._timeout
        self._headers = data = dist.ProcessGroupGloo(dist.PrefixStore(self.name, store), rank, 2, options)
        if self._use_nccl:
            torch.cuda.set_device(self._context.device)
            nccl_options = dist.ProcessGroupNCCL.Options()
            nccl_options._timeout = self._timeout
            nccl_options.is_high_priority_stream = self._high_priority
            data = dist.ProcessGroupNCCL(dist.PrefixStore(f"{self.name}/nccl", store), rank, 2, nccl_options)
        self._data = data
        if self._is_closed:  # in the meantime: either `abort` sees the groups, or this thread sees the end
            self._abort_groups()
            raise KVTransferError(f"KV link {self.name} was closed")

    def _prepare(self) -> None:
        """Do the work of a first transfer ahead of it: else its request waits, and the steps of both GPUs stop.

        Buffers are allocated. On each stream, the copies load their kernels and allocate memory. NCCL connects two GPUs
        at the first message, so one byte is sent. All that takes 0.1 s.
        """
        began = time.monotonic()
        piece_bytes = self._piece_bytes()
        for index in range(_NUM_SLOTS):
            self._slot(index, 1, self._part_bytes, piece_bytes)
            with self._on_stream(index):
                self._all_layers.rehearse(self._part, self._device)
                if self._context.device != self._device:  # a piece is gathered on the GPU before it leaves
                    torch.empty(piece_bytes, dtype=torch.uint8, device=self._context.device)
        if self._use_nccl:
            self._connect_devices()
        logger.debug("KV link %s: ready in %.2f s", self.name, time.monotonic() - began)

    def _connect_devices(self) -> None:
        with self._on_stream(0):
            byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
            pass_on = self._data.send if self._rank == _SENDER else self._data.recv
            work = pass_on([byte], 1 - self._rank, 0)
            work.wait()
        self._wait(0, work)

    def _piece_bytes(self) -> int:
        """Compute the bytes of a piece of whole blocks, at most; both ends have the same."""
        limit = min(_PIECE_BYTES[self._device.type], self._context.buffer_size // _NUM_SLOTS)
        return max(1, limit // self._part_bytes) * self._part_bytes

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of gloo, NCCL and the store, which are RuntimeErrors, into a `KVTransferError`."""
        try:
            yield
        except RuntimeError as error:
            raise KVTransferError(f"KV link {self.name}: {error}") from error

    def _on_stream(self, index: int) -> AbstractContextManager[Any]:
        """Keep a slot's copies and messages in order, and beside those of other slots and of the steps."""
        return torch.cuda.stream(self._streams[index]) if self._streams else contextlib.nullcontext()

    def _slot(self, index: int, num_blocks: int, block_bytes: int, piece_bytes: int) -> torch.Tensor:
        """Return a slot's buffer, allocated for ``piece_bytes``, as ``[block, byte]`` for so many blocks."""
        slot = self._slots[index]
        if slot is None or slot.numel() < piece_bytes:
            with self._on_stream(index):  # else it is memory that a step has freed and its kernels still use
                slot = self._slots[index] = torch.empty(piece_bytes, dtype=torch.uint8, device=self._device)
        return slot[: num_blocks * block_bytes].view(num_blocks, block_bytes)

    def _wait(self, index: int, work: Any) -> None:
        """Wait for a message; on a GPU also for what was queued after it on the slot's stream."""
        if not self._use_nccl:
            work.wait(self._timeout)
            return
        # No polling in Python: it would take longer than the copy of a piece. The wait has an end: a failed transfer
        # closes the link, and that aborts the message.
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._streams[index])
        event.synchronize()
        if self._is_closed:
            raise KVTransferError(f"KV link {self.name} was closed")

    def abort(self) -> None:
        """End what is under way, as far as the library can. May be called in any thread, and twice."""
        if not self._is_closed:
            self._is_closed = True
            self._abort_groups()

    def release(self) -> None:
        """Give connections and buffers back. The last call in the link's thread, after `abort`.

        Without it they would stay until the garbage collector finds the errors of the lost link, which refer to it.
        """
        self._headers = self._data = None
        self._slots = [None] * _NUM_SLOTS

    def _abort_groups(self) -> None:
        for group in {id(group): group for group in (self._data, self._headers)}.values():
            if group is not None and hasattr(group, "abort"):
                with contextlib.suppress(RuntimeError):
                    group.abort()


class SendingLink(_Link):
    """The sender's end. `send` and `release` are called in one thread, `abort` in any."""

    _rank = _SENDER
    _high_priority = True  # prefill fills the device for long; the other side's kernels spin then

    def send(self, items: list[SendItem]) -> None:
        """Send a batch; return when all of it is sent. Raises KVTransferError if the link fails."""
        self.rendezvous()
        with self._explained():
            piece_bytes = self._piece_bytes()
            chunks = [
                (digest_of(item.transfer_id), len(item.source_blocks) * (self._part_bytes // item.layers.count))
                for item in items
            ]
            header = Header(piece_bytes, chunks)
            announced = self._headers.send([torch.tensor(header.words())], _RECEIVER, 0)
            in_flight: deque[tuple[int, Any]] = deque()
            pieces = (
                (item.layers, piece)
                for item in items
                for piece in _cut(item.source_blocks, piece_bytes // self._part_bytes * item.layers.count)
            )
            for number, (layers, block_ids) in enumerate(pieces):
                slot = number % _NUM_SLOTS
                if len(in_flight) == _NUM_SLOTS:
                    index, work = in_flight.popleft()
                    if not self._use_nccl:  # with NCCL the streams keep the order
                        work.wait(self._timeout)
                in_flight.append((slot, self._send_piece(slot, layers, block_ids, piece_bytes)))
            announced.wait(self._timeout)
            for index, work in in_flight:
                self._wait(index, work)

    def _send_piece(self, slot: int, layers: LayerGroup, block_ids: Sequence[int], piece_bytes: int) -> Any:
        parts = self._all_layers.of_layers(layers)
        with self._on_stream(slot):
            if parts.lies_in_one_piece(block_ids, self._part) and parts.kv_blocks.device == self._device:
                buffer = parts.piece(block_ids)
            else:
                buffer = self._slot(slot, len(block_ids), parts.part_bytes(self._part), piece_bytes)
                parts.take(block_ids, self._part, buffer)
            work = self._data.send([buffer], _RECEIVER, 0)
            if self._use_nccl:
                work.wait()  # of the stream, not of this thread
            return work


class ReceivingLink(_Link):
    """The receiver's end, with a thread for the calls that block.

    Attributes:
        pending: what has been asked for, by digest; changed in the event loop only.
    """

    _rank = _RECEIVER
    _high_priority = False  # decode's steps are short, and users wait for each

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pending: dict[int, PendingReceive] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kv-{self.name}")
        self._writing = threading.Lock()

    def start_rendezvous(self) -> None:
        """Meet the sender beforehand; if this fails, the first receive reports it."""
        self._thread.submit(self.rendezvous)

    async def run(self, call: Callable[[], T]) -> T:
        """Run ``call`` in the link's thread. Raises KVTransferError if the call fails or the link is closed."""
        task = asyncio.current_task()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except asyncio.CancelledError:
            if task is not None and task.cancelling():
                raise
        except RuntimeError as error:
            if not self._is_closed:
                raise KVTransferError(f"KV link {self.name}: {error}") from error
        raise KVTransferError(f"KV link {self.name} was closed")

    def receive(self) -> Header | None:
        """Receive a batch into the arena; or only its header, and return it, if a chunk has not been asked for."""
        self.rendezvous()
        with self._explained():
            words = torch.empty(_HEADER_WORDS, dtype=torch.int64)
            self._headers.recv([words], _SENDER, 0).wait(self._timeout)
            header = Header.of_words(words.tolist())
        if any(digest not in self.pending for digest, _ in header.chunks):
            return header
        self.receive_chunks(header)
        return None

    def receive_chunks(self, header: Header) -> dict[int, torch.Tensor]:
        """Receive the chunks of a header; return those that have not been asked for, by digest."""
        unrequested: dict[int, torch.Tensor] = {}
        with self._explained():
            for digest, num_bytes in header.chunks:
                pending = self.pending.get(digest)
                if pending is None:
                    unrequested[digest] = self._receive_unrequested_chunk(num_bytes, header.piece_bytes)
                    continue
                self._check_size(pending, num_bytes)
                self._receive_blocks(pending, header.piece_bytes)
                pending.settle_threadsafe()
        return unrequested

    def _check_size(self, pending: PendingReceive, num_bytes: int) -> None:
        expected = len(pending.block_ids) * (self._part_bytes // pending.layers.count)
        if num_bytes != expected:
            raise KVTransferError(f"received {num_bytes} bytes where {expected} were expected")

    def _receive_blocks(self, pending: PendingReceive, piece_bytes: int) -> None:
        parts = self._all_layers.of_layers(pending.layers)
        block_bytes = parts.part_bytes(self._part)
        in_flight: deque[tuple[int, BlockParts, Sequence[int], torch.Tensor, Any]] = deque()
        for number, piece in enumerate(_cut(pending.block_ids, piece_bytes // block_bytes)):
            slot = number % _NUM_SLOTS
            if len(in_flight) == _NUM_SLOTS:
                self._put(*in_flight.popleft())
            with self._on_stream(slot):
                buffer = self._slot(slot, len(piece), block_bytes, piece_bytes)
                in_flight.append((slot, parts, piece, buffer, self._receive_piece(buffer)))
        for arrival in in_flight:
            self._put(*arrival)
        for stream in self._streams:
            stream.synchronize()  # copies inside the GPU, which end soon

    def _receive_piece(self, buffer: torch.Tensor) -> Any:
        work = self._data.recv([buffer], _SENDER, 0)
        if self._use_nccl:
            work.wait()  # of the stream, not of this thread
        return work

    def _put(
        self, slot: int, parts: BlockParts, block_ids: Sequence[int], buffer: torch.Tensor, work: Any = None
    ) -> None:
        """Wait for the message that fills a buffer, if there is one, and write the buffer to the arena."""
        if work is not None:
            self._wait(slot, work)
        with self._writing:
            if self._is_closed:
                raise KVTransferError(f"KV link {self.name} was closed")
            with self._on_stream(slot):
                parts.put(block_ids, self._part, buffer)

    def _receive_unrequested_chunk(self, num_bytes: int, piece_bytes: int) -> torch.Tensor:
        with self._on_stream(0):
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            works = [self._receive_piece(piece) for piece in torch.split(buffer, piece_bytes)]
        for work in works[:: -1 if self._use_nccl else 1]:
            self._wait(0, work)
        return buffer

    def put(self, pending: PendingReceive, buffer: torch.Tensor) -> None:
        """Write a buffer to the arena that arrived before it was asked for."""
        self._check_size(pending, buffer.nbytes)
        self._put(0, self._all_layers.of_layers(pending.layers), pending.block_ids, buffer)
        for stream in self._streams:
            stream.synchronize()

    def fail(self, error: KVTransferError) -> None:
        """Report to all pending receives that nothing more comes."""
        for pending in self.pending.values():
            pending.settle(error)

    def close(self) -> None:
        """Return when nothing is written any more; a thread that waits for the sender goes on until its time limit."""
        self.abort()
        with self._writing:
            for stream in self._streams:
                stream.synchronize()
        self._thread.submit(self.release)
        self._thread.shutdown(wait=False)


def _cut(block_ids: Sequence[int], blocks_per_piece: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(block_ids), blocks_per_piece):
        yield block_ids[first : first + blocks_per_piece]
