"""The Mooncake Store as a KV tier. Values lie in memory that others give (``hbserve store``); instances give none.

Blocks therefore survive their instances and their system. The master evicts what was not used lately, and a block that
was read or looked up is safe for a while (its lease).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from hbserve.errors import HBServeError
from hbserve.kv_tiers.base import BlockName, KVTier, KVTierContext
from hbserve.kv_tiers.mooncake_library import MooncakeTierError, check_answers, load_library, local_address, no_answer

logger = logging.getLogger(__name__)

_NO_ROOM = -200
_NOT_FOUND = -704
_WRONG_SIZE = -600


class MooncakeTier(KVTier):
    """The backend ``mooncake`` of ``kv_cache.store``.

    It connects when it is made, and again at a call while there is no connection. The library itself finds a master
    that was started again.

    Raises:
        StartupError: if the library is missing.
    """

    gathers = True

    def __init__(self, context: KVTierContext) -> None:
        assert context.config.master is not None, "the configuration checks it"
        self._config, self._master = context.config, context.config.master
        self._library = load_library()
        self._lock = threading.Lock()
        self._client: Any = None
        self._buffers: list[torch.Tensor] = []
        try:
            self._connected()
        except HBServeError as error:  # each use tries again, and fails until then
            logger.warning("%s", error)

    def _connected(self) -> Any:
        """Return the client, with all buffers registered.

        Raises:
            MooncakeTierError: if there is no connection.
        """
        with self._lock:
            if self._client is None:
                check_answers(self._config)  # the library takes 4 s for that, in which no Python runs in this process
                client = self._library.MooncakeDistributedStore()
                code = client.setup(local_address(self._config), "P2PHANDSHAKE", 0, 0, "tcp", "", self._master)
                if code:
                    raise no_answer(self._config, f"code {code}")
                self._client = client
                for buffer in self._buffers:
                    self._register(buffer)
            return self._client

    def _register(self, buffer: torch.Tensor) -> None:
        code = self._client.register_buffer(buffer.data_ptr(), buffer.nbytes)
        if code:
            raise MooncakeTierError(f"kv_cache.store: cannot register {buffer.nbytes} bytes (code {code})")

    def register(self, values: torch.Tensor) -> None:
        with self._lock:
            self._buffers.append(values)
            if self._client is not None:
                self._register(values)

    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        return _put_failures(self._connected().batch_put_from(_texts(names), *_places(values)))

    def put_gathered(
        self, names: Sequence[BlockName], blocks: Sequence[torch.Tensor], seals: torch.Tensor
    ) -> dict[int, str]:
        first, size = seals.data_ptr(), seals.shape[1]
        places = [[block.data_ptr(), first + row * size] for row, block in enumerate(blocks)]
        sizes = [[len(block), size] for block in blocks]
        return _put_failures(self._connected().batch_put_from_multi_buffers(_texts(names), places, sizes))

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        codes = self._connected().batch_get_into(_texts(names), *_places(values))
        lost = {place for place, code in enumerate(codes) if code < 0 and code not in (_NOT_FOUND, _WRONG_SIZE)}
        # Where others can be read, only the memory of these has gone.
        kind = "backend" if len(lost) == len(codes) else "missing"
        return {place: "missing" for place, code in enumerate(codes) if code == _NOT_FOUND} | dict.fromkeys(lost, kind)

    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        codes = self._connected().batch_is_exist(_texts(names))
        if any(code < 0 for code in codes):
            raise no_answer(self._config, f"code {min(codes)}")
        return [code == 1 for code in codes]

    def remove(self, names: Sequence[BlockName]) -> None:
        self._connected().batch_remove(_texts(names), True)  # although they are leased: they are wrong


def _texts(names: Sequence[BlockName]) -> list[str]:
    return [name.text for name in names]


def _put_failures(codes: Sequence[int]) -> dict[int, str]:
    return {place: "full" if code == _NO_ROOM else "backend" for place, code in enumerate(codes) if code}


def _places(values: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the addresses and the sizes of the rows."""
    first, size = values.data_ptr(), values.shape[1]
    return [first + row * size for row in range(len(values))], [size] * len(values)
