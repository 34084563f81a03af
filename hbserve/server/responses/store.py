"""Store of finished responses, in the API server's memory: for ``previous_response_id``, item references and GET."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec

MAX_RESPONSES = 1024
MAX_BYTES = 128 << 20
_ITEM_OVERHEAD_BYTES = 256  # of an item's place in the index


class StoredResponse(msgspec.Struct, frozen=True):
    """One finished response. Every item is JSON of its own and has an id.

    Attributes:
        key: name of the API key that made it; requests with another key do not find it.
        response: as the client got it.
        history: the items of the conversation before this response.
        input, output: its own items, by id.
    """

    key: str
    response: bytes
    history: list[bytes]
    input: dict[str, bytes]
    output: dict[str, bytes]

    @property
    def num_bytes(self) -> int:
        items = [*self.history, *self.input.values(), *self.output.values()]
        return len(self.response) + sum(map(len, items)) + _ITEM_OVERHEAD_BYTES * len(items)

    def conversation(self) -> list[bytes]:
        """Return the items that the next response continues."""
        return [*self.history, *self.input.values(), *self.output.values()]


def by_id(items: Iterable[dict[str, Any]]) -> dict[str, bytes]:
    """Return items by their ids, encoded; one that has no id of its own, or another's, gets a new one."""
    encoded: dict[str, bytes] = {}
    for item in items:
        item_id = item.get("id")
        if not isinstance(item_id, str) or item_id in encoded:
            item_id = f"item_{uuid.uuid4().hex}"
        encoded[item_id] = msgspec.json.encode({"id": item_id} | item | {"id": item_id})
    return encoded


class ResponseStore:
    """The responses that were finished last.

    The oldest go when there are too many, or when they take too much memory. A response that is larger than the whole
    store is not kept.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._responses_of_items: dict[tuple[str, str], str] = {}  # by key and id of the item; the latest response
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Keep a response."""
        if response.num_bytes > self._max_bytes:
            return
        self._responses[response_id] = response
        self._num_bytes += response.num_bytes
        for item_id in [*response.input, *response.output]:
            self._responses_of_items[response.key, item_id] = response_id
        while self._num_bytes > self._max_bytes or len(self._responses) > self._max_responses:
            self.delete(next(iter(self._responses)))

    def get(self, response_id: str, key: str) -> StoredResponse | None:
        """Return a response that was made with this key; None if there is none, or none any more."""
        response = self._responses.get(response_id)
        return response if response is not None and response.key == key else None

    def item(self, item_id: str, key: str) -> bytes | None:
        """Return an item of the input or the output of a response that was made with this key."""
        response = self._responses.get(self._responses_of_items.get((key, item_id), ""))
        if response is None:
            return None
        return response.output.get(item_id) or response.input[item_id]

    def delete(self, response_id: str) -> None:
        """Forget a response and its items, but those that a later response has, too."""
        response = self._responses.pop(response_id)
        self._num_bytes -= response.num_bytes
        for item_id in [*response.input, *response.output]:
            if self._responses_of_items.get((response.key, item_id)) == response_id:
                del self._responses_of_items[response.key, item_id]
