"""Errors that cross HBServe's borders: each says what is wrong, where, and what to do."""

from __future__ import annotations

MAX_MESSAGE_CHARS = 1000


def shortened(text: str) -> str:
    """Return a text without its middle if it is long: it may quote what a stranger has sent, of any length."""
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    half = MAX_MESSAGE_CHARS // 2 - 2
    return f"{text[:half]} … {text[-half:]}"


class HBServeError(Exception):
    """Base of every error that HBServe raises on purpose."""


class ConfigError(HBServeError, ValueError):
    """A configuration value that cannot be honoured.

    Attributes:
        key: the dotted key at fault, if there is one.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class ModelError(HBServeError, ValueError):
    """A model folder that cannot be served: unknown architecture, missing tensor, wrong shape.

    Its text is `shortened`, because names and values come from the folder.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class InvalidRequestError(HBServeError, ValueError):
    """A request that can never be served as it is.

    Attributes:
        param: the request field at fault, if there is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownInstanceError(InvalidRequestError):
    """A request for an instance that does not exist."""


class ContextLengthError(InvalidRequestError):
    """A request whose prompt and output together exceed the model's context."""


class OverloadedError(HBServeError):
    """A request that finds the waiting queue full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitedError(OverloadedError):
    """A request of a key that is at its limit of requests; try again after ``retry_after_s`` seconds."""


class RequestTimeoutError(HBServeError):
    """A request that took longer than the server allows."""


class RequestFailedError(HBServeError):
    """An accepted request that could not be finished; safe to send again."""


class UnservedError(RequestFailedError):
    """A request for which no instance was there for ``rpc.recovery_timeout_s``; send it again when there is one."""


class EngineDeadError(HBServeError):
    """The scheduler has died, or an instance that the system needs."""


class SupersededError(HBServeError):
    """A scheduler whose workers obey a newer one; it must end."""


class SchedulerRestartingError(HBServeError):
    """A question to a scheduler that has ended and is being started again; safe to ask again."""


class ShuttingDownError(HBServeError):
    """A request that the server returns unfinished because it shuts down; safe to send again, to another server."""


class StartupError(HBServeError):
    """A system that did not become ready; the message names the part that failed and why."""


class StaleBlockError(HBServeError):
    """A reference to a block of an earlier generation: the block has been freed since the reference was made."""


class KVTransferError(HBServeError):
    """A KV transfer that failed.

    Attributes:
        kind: kind in the statistics: ``timeout``, ``stale``, ``checksum``, or ``backend``.
    """

    def __init__(self, message: str, kind: str = "backend") -> None:
        super().__init__(message)
        self.kind = kind

    def bare(self) -> KVTransferError:
        """Return the error without the frames that raised it: they hold the link's connections and buffers."""
        return KVTransferError(str(self), self.kind)
