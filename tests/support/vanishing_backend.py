"""A transfer backend that ends its process without a word, before it can open a link."""

from __future__ import annotations

import asyncio
import os

from tests.support.stream_transfer import StreamKVTransfer


class VanishingBackend(StreamKVTransfer):
    async def start(self) -> None:
        asyncio.get_running_loop().call_later(1.0, os._exit, 70)
        await asyncio.Event().wait()
