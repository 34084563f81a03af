"""Which requests are refused at once, and what their clients are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from hbserve import SamplingParams
from hbserve.messages.client import AddRequest, Resumed
from hbserve.scheduler.clients import validate
from hbserve.scheduler.core_io import Clock, OutboxWriter, Start
from hbserve.scheduler.readiness import Readiness
from hbserve.scheduler.transfer_tracker import TransferTracker


def request(prompt: list[int], end_token_ids: Sequence[int] = (), **sampling: Any) -> AddRequest:
    params = SamplingParams(**{"max_tokens": 5, "seed": 1} | sampling)
    return AddRequest(request_id="r", prompt_token_ids=prompt, end_token_ids=list(end_token_ids), sampling=params)


@pytest.fixture
def readiness() -> Readiness:
    """A system whose model takes 10 tokens of a vocabulary of 50."""
    readiness = Readiness({}, TransferTracker(), Clock(Start(0.0, 0)), OutboxWriter(), Start(0.0, 0))
    readiness.max_model_len, readiness.vocab_size = 10, 50
    return readiness


@pytest.mark.parametrize(
    ("prompt", "more", "param", "error"),
    [
        ([], {}, "prompt", "the prompt is empty"),
        ([1] * 10, {}, "prompt", "the prompt has 10 tokens; at most 9 leave room for an answer"),
        ([1, 50], {}, "prompt", "token ids must be in 0..49"),
        ([-1], {}, "prompt", "token ids must be in 0..49"),
        ([1], {"max_tokens": None}, "max_tokens", "max_tokens is not resolved"),
        ([1], {"seed": None}, "seed", "seed is not resolved"),
        *(
            ([1], more, "stop_token_ids", "the ids of end tokens, stop tokens and biases must be in 0..49")
            for more in ({"end_token_ids": [-1]}, {"stop_token_ids": [3, 50]}, {"logit_bias": {50: 1.0}})
        ),
    ],
)
def test_a_request_that_can_never_be_computed_is_refused(
    readiness: Readiness, prompt: list[int], more: dict[str, Any], param: str, error: str
) -> None:
    refusal = validate(request(prompt, **more), readiness, id_is_in_use=False)
    assert refusal is not None
    assert (refusal.finish_reason, refusal.error_kind) == ("error", "InvalidRequestError")
    assert (refusal.error_param, refusal.error) == (param, error)


@pytest.mark.parametrize(
    ("resumed", "error"),
    [
        (Resumed(token_ids=[1] * 5, first_token_age_s=1.0), "5 output tokens leave nothing to generate"),
        (Resumed(token_ids=[50], first_token_age_s=1.0), "token ids must be in 0..49"),
        (Resumed(token_ids=[1]), "the progress contradicts itself"),
        (Resumed(token_ids=[], first_token_age_s=1.0), "the progress contradicts itself"),
        (Resumed(token_ids=[], num_scored=3), "the progress contradicts itself"),
        (Resumed(token_ids=[], num_scored=-1), "the progress contradicts itself"),
    ],
)
def test_progress_that_cannot_be_true_is_refused(readiness: Readiness, resumed: Resumed, error: str) -> None:
    refusal = validate(msgspec.structs.replace(request([1] * 3), resumed=resumed), readiness, id_is_in_use=False)
    assert refusal is not None
    assert (refusal.error_kind, refusal.error_param, refusal.error) == ("InvalidRequestError", "resumed", error)


def test_an_id_in_use_and_a_system_that_starts_are_reasons_too(readiness: Readiness) -> None:
    assert validate(request([1] * 9), readiness, id_is_in_use=False) is None
    refusal = validate(request([1]), readiness, id_is_in_use=True)
    assert refusal is not None
    assert refusal.error == "request id 'r' is in use"
    readiness.max_model_len = None
    refusal = validate(request([1]), readiness, id_is_in_use=False)
    assert refusal is not None
    assert (refusal.error_kind, refusal.error) == ("OverloadedError", "starting; waiting for nothing")
