"""Which requests a client sends to the next scheduler, and which one it gives up; without processes."""

from __future__ import annotations

from hbserve import SamplingParams
from hbserve.frontend.open_requests import OpenRequest, OpenRequests
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import AddRequest, RequestOutput, Resumed


class Client:
    """Open requests, with a clock and a scheduler that a test plays."""

    def __init__(self, *names: str) -> None:
        self.now = 100.0
        self.requests = OpenRequests()
        self.sent: list[AddRequest] = []
        for name in names:
            self.open(name)
        self.send()

    def open(self, name: str) -> None:
        request = AddRequest(
            request_id=name, prompt_token_ids=[1, 2, 3], end_token_ids=[], sampling=SamplingParams(max_tokens=500)
        )
        self.requests.add(OpenRequest(request, lambda output: None, self.now))

    def send(self) -> list[str]:
        """Send what may be sent now; returns the names."""
        sendable, _ = self.requests.take_sendable(self.now)
        self.sent = [request.to_message(self.now) for request in sendable]
        return [message.request_id for message in self.sent]

    def give(self, name: str, num_tokens: int) -> None:
        """Let a request's tokens come."""
        request = self.requests.get(name)
        assert request is not None
        request.note(RequestOutput(request_id=name, token_ids=[7] * num_tokens), self.now)

    def lose(self, has_failed: bool) -> str | None:
        """The scheduler ends, and there is another one; returns the request that is given up."""
        assert self.requests.on_scheduler_lost() == []
        given_up = self.requests.on_scheduler_back(has_failed, self.now)
        return None if given_up is None else given_up.id


def test_a_request_goes_on_with_all_that_has_come() -> None:
    client = Client("a", "b")
    assert [message.resumed for message in client.sent] == [None, None]
    scores = [TokenLogprobs(token=-1.0, top_ids=[], top=[])] * 2
    a = client.requests.get("a")
    assert a is not None
    a.note(RequestOutput(request_id="a", token_ids=[], prompt_logprobs=scores), client.now)
    client.now = 101.0
    client.give("a", 2)
    client.now = 104.0
    client.open("new")  # while there is no scheduler
    client.now = 105.0
    assert client.lose(False) is None
    assert client.send() == ["a", "b", "new"]
    assert [message.age_s for message in client.sent] == [5.0, 5.0, 1.0]
    assert client.sent[0].resumed == Resumed(token_ids=[7, 7], num_scored=2, first_token_age_s=4.0)
    assert client.sent[1].resumed == Resumed(token_ids=[])  # no overload refuses it
    assert client.sent[2].resumed is None


def test_a_request_at_which_schedulers_fail_is_given_up_alone() -> None:
    client = Client("good", "poison", "also good")
    client.give("good", 20)
    assert client.lose(True) is None
    assert client.send() == ["good", "poison", "also good"]
    assert client.lose(True) is None
    # Now two have failed twice without progress. The others go first, and have a moment.
    assert client.send() == ["good"]
    client.give("good", 20)
    client.now += 1.0
    assert client.send() == ["poison"]
    client.open("late")
    assert client.send() == []  # nothing else is there when it fails
    assert client.lose(True) == "poison"
    assert "poison" not in client.requests
    assert client.send() == ["good", "late"]
    client.now += 1.0
    assert client.send() == ["also good"]
    client.open("later")
    client.give("also good", 15)
    assert client.send() == []
    client.give("also good", 1)
    assert client.send() == ["later"]
    assert client.lose(True) is None
    assert sorted(client.send()) == ["also good", "good", "late", "later"]  # it is a suspect no more


def test_kills_from_outside_count_against_no_request() -> None:
    client = Client("a")
    for _ in range(10):
        assert client.lose(False) is None
        assert client.send() == ["a"]
    for _ in range(2):
        assert client.lose(True) is None
        client.now += 1.0
        assert client.send() == ["a"]
    assert client.lose(False) is None  # during its trial
    client.now += 1.0
    assert client.send() == ["a"]
    assert client.lose(True) == "a"


def test_a_trial_ends_with_its_request_or_after_a_while() -> None:
    client = Client("a", "b", "c")
    for _ in range(2):
        assert client.lose(True) is None
        client.send()
    client.now += 1.0
    assert client.send() == ["a"]
    client.requests.pop("a")
    assert client.send() == ["b"]
    client.now += 29.0
    assert client.send() == []
    client.now += 1.0  # it may wait for a place at the scheduler
    assert client.send() == ["c"]
    assert client.lose(True) == "c"


def test_a_request_whose_end_was_asked_for_is_not_sent_again() -> None:
    client = Client("a", "b")
    a = client.requests.get("a")
    assert a is not None
    a.end_reason = "abort"
    assert client.requests.on_scheduler_lost() == [a]
    assert client.requests.on_scheduler_back(False, client.now) is None
    assert client.send() == ["b"]
