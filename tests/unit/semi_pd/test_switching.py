"""Records of preparations and change-overs, and their public methods."""

from __future__ import annotations

import threading

from hbserve.config import InstanceRole
from hbserve.semi_pd.resident_process_manager import AsynchronousSwitchingController, DelayedSwitchingController


def test_delayed_switching_says_how_a_preparation_ended() -> None:
    controller = DelayedSwitchingController(preparation_timeout=5.0)
    assert not controller.wait_for_switch_ready()
    assert controller.request_delayed_switch(lambda: "made")
    assert controller.wait_for_switch_ready()
    assert controller.result == "made"
    controller.request_delayed_switch(lambda: 1 / 0)
    assert not controller.wait_for_switch_ready()
    assert controller.get_status()["state"] == "failed"
    assert "division" in (controller.error or "")


class FakeProcess:
    """What a switch asks of a process."""

    def __init__(self) -> None:
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def terminate(self) -> None:
        self.alive = False

    def join(self, timeout: float | None = None) -> None:
        pass


def test_asynchronous_switching_ends_the_old_process_after_its_step() -> None:
    controller = AsynchronousSwitchingController(drain_timeout=5.0)
    old, new = FakeProcess(), FakeProcess()
    was_alive_in_its_step = []
    assert controller.start_asynchronous_switch(
        InstanceRole.DECODE, old, new, lambda: was_alive_in_its_step.append(old.alive)
    )
    assert controller.wait_for_switch_completion(InstanceRole.DECODE, 5.0)
    assert was_alive_in_its_step == [True]
    assert not old.alive
    assert new.alive
    dead = FakeProcess()
    dead.alive = False
    assert not controller.start_asynchronous_switch(InstanceRole.PREFILL, old, dead, lambda: True)


def test_a_preparation_that_is_late_is_given_up_and_stays_failed() -> None:
    controller = DelayedSwitchingController(preparation_timeout=0.01)
    goes_on = threading.Event()
    assert controller.request_delayed_switch(goes_on.wait)
    assert not controller.request_delayed_switch(lambda: None)  # one at a time
    assert not controller.wait_for_switch_ready()
    assert "0.01 s" in (controller.error or "")
    assert not controller.request_delayed_switch(lambda: None)  # the callback still runs
    goes_on.set()
    controller.wait_for_switch_ready(5.0)
    status = controller.get_status()
    assert (status["state"], status["prepared"], status["failed"]) == ("failed", 0, 1)


def test_what_is_done_here_and_now_is_recorded_alike() -> None:
    delayed, asynchronous = DelayedSwitchingController(), AsynchronousSwitchingController(drain_timeout=5.0)
    assert delayed.prepare(lambda: None)
    assert not delayed.prepare(lambda: False)
    assert (delayed.get_status()["prepared"], delayed.get_status()["failed"]) == (1, 1)
    states: list[str] = []
    assert asynchronous.switch(
        InstanceRole.DECODE, lambda: states.append(asynchronous.get_status()["roles"]["decode"]["state"])
    )
    assert states == ["draining"]
    assert not asynchronous.switch(InstanceRole.PREFILL, lambda: False)
    status = asynchronous.get_status()
    assert (status["roles"]["decode"]["state"], status["switched"]) == ("switched", 1)
    assert "still busy after 5 s" in status["roles"]["prefill"]["error"]
