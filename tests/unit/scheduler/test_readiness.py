"""What clients that wait for the system are told, and when; without processes."""

from __future__ import annotations

from hbserve.messages.client import NotReady, Ready
from hbserve.scheduler.readiness import Readiness
from tests.support.scheduler_parts import scheduler_parts


def test_a_client_that_subscribes_after_a_failure_learns_of_it_until_the_instance_is_back() -> None:
    told: list[tuple[bytes, Ready | NotReady]] = []
    with scheduler_parts() as parts:
        readiness = Readiness(parts.instances, parts.transfers, lambda client, reply: told.append((client, reply)))
        readiness.on_failed(parts.instance.id, "no such backend")
        readiness.on_failed("one-that-left", "something else")
        readiness.subscribe(b"late", 60.0)
        assert told == [(b"late", NotReady(reason=f"{parts.instance.id}: no such backend"))]

        told.clear()
        assert parts.worker.hello is not None
        readiness.on_hello(parts.worker.hello)
        readiness.subscribe(b"later", 60.0)
        assert [client for client, reply in told if isinstance(reply, Ready)] == [b"later"]
