"""Store of finished responses, in the API server's memory: for ``previous_response_id`` and GET."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

MAX_RESPONSES = 1024
MAX_BYTES = 128 << 20


class StoredResponse(msgspec.Struct, frozen=True):
    """One finished response, as JSON.

    Attributes:
        key: name of the API key that made it; requests with another key do not find it.
        response: as the client got it.
        items: the whole conversation: the items of earlier responses, of the input, and of the output.
        first_input, first_output: where the input of this response begins in ``items``, and its output.
    """

    key: str
    response: bytes
    items: bytes
    first_input: int
    first_output: int

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.items)

    def conversation(self) -> list[dict[str, Any]]:
        """Return the items that the next response continues."""
        items: list[dict[str, Any]] = msgspec.json.decode(self.items)
        return items


class ResponseStore:
    """The responses that were finished last.

    The oldest go when there are too many, or when they take too much memory. A response that is larger than the whole
    store is not kept.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Keep a response."""
        if response.num_bytes > self._max_bytes:
            return
        self._responses[response_id] = response
        self._num_bytes += response.num_bytes
        while self._num_bytes > self._max_bytes or len(self._responses) > self._max_responses:
            _, oldest = self._responses.popitem(last=False)
            self._num_bytes -= oldest.num_bytes

    def get(self, response_id: str, key: str) -> StoredResponse | None:
        """Return a response that was made with this key; None if there is none, or none any more."""
        response = self._responses.get(response_id)
        return response if response is not None and response.key == key else None

    def delete(self, response_id: str) -> None:
        """Forget a response."""
        self._num_bytes -= self._responses.pop(response_id).num_bytes
