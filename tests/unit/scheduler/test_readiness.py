"""What clients that wait for the system are told, and when; without processes."""

from __future__ import annotations

from hbserve.messages.client import NotReady, Ready
from hbserve.scheduler.core_io import Start
from hbserve.scheduler.readiness import Readiness
from tests.support.scheduler_parts import SchedulerParts


def test_a_client_that_subscribes_after_a_failure_learns_of_it_until_the_instance_is_back() -> None:
    parts = SchedulerParts()
    readiness = Readiness(parts.instances, parts.transfers, parts.clock, parts.outbox, Start(0.0, 0))
    readiness.on_failed(parts.instance.id, "no such backend")
    readiness.on_failed("one-that-left", "something else")
    readiness.subscribe(b"late", 60.0)
    told = parts.outbox.take(0.0).to_clients
    assert told == [(b"late", NotReady(reason=f"{parts.instance.id}: no such backend"))]

    assert parts.worker.hello is not None
    readiness.on_hello(parts.worker.hello)
    readiness.subscribe(b"later", 60.0)
    told = parts.outbox.take(0.0).to_clients
    assert [client for client, reply in told if isinstance(reply, Ready)] == [b"later"]
