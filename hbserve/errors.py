"""Errors that cross HBServe's borders: each says what is wrong, where, and what to do."""

from __future__ import annotations


class HBServeError(Exception):
    """Base of every error that HBServe raises on purpose."""


class ConfigError(HBServeError, ValueError):
    """A configuration value that cannot be honoured.

    Attributes:
        key: the dotted key at fault, where there is one.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class ModelError(HBServeError, ValueError):
    """A model folder that cannot be served: unknown architecture, missing tensor, wrong shape."""


class InvalidRequestError(HBServeError, ValueError):
    """A request that can never be served as asked.

    Attributes:
        param: the request field at fault, where there is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownInstanceError(InvalidRequestError):
    """There is no instance of that name."""


class ContextLengthError(InvalidRequestError):
    """Prompt and output together are more than the model's context holds."""


class OverloadedError(HBServeError):
    """The waiting queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitedError(OverloadedError):
    """This key has more going on than it may have; try again after ``retry_after_s`` seconds."""


class RequestTimeoutError(HBServeError):
    """The request took longer than the server allows."""


class RequestFailedError(HBServeError):
    """A request that was accepted and could not be finished; safe to send again."""


class EngineDeadError(HBServeError):
    """The scheduler, or an instance the system cannot do without, is gone."""


class ShuttingDownError(HBServeError):
    """The server is ending, and what it could not finish is handed back; safe to send again, elsewhere."""


class StartupError(HBServeError):
    """The system did not become ready; the message names the part that failed and why."""


class StaleBlockError(HBServeError):
    """A block reference whose generation is over: the block has been freed since it was made."""


class KVTransferError(HBServeError):
    """A KV transfer that failed.

    Attributes:
        kind: what statistics count it as: ``timeout``, ``stale``, ``checksum``, or ``backend``.
    """

    def __init__(self, message: str, kind: str = "backend") -> None:
        super().__init__(message)
        self.kind = kind
