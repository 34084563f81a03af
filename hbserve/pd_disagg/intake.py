"""Which requests are taken."""

from __future__ import annotations

from hbserve.config import Config
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.pd_disagg.readiness import Readiness
from hbserve.pd_disagg.request_book import RequestBook
from hbserve.pd_disagg.sequence import Sequence


class Intake:
    """Turns a client's request into a sequence on the books, or says at once why not.

    Args:
        config: for the limits of the queue.
        requests: where those go that are taken.
        readiness: what the model takes, once that is known.
    """

    def __init__(self, config: Config, requests: RequestBook, readiness: Readiness) -> None:
        self._max_waiting_requests = config.performance.max_waiting_requests
        self._max_queue_s = config.scheduler.max_queue_s
        self._requests = requests
        self._readiness = readiness
        self._arrivals = 0

    def take(self, client: bytes, request: AddRequest) -> RequestOutput | None:
        """Put a request on the books; returns the output that says why not, if it is refused."""
        self._requests.counts["requests"] += 1
        refusal = self._misfit(client, request)
        if refusal is None:
            sequence = self._new_sequence(client, request)
            refusal = self._overload(sequence)
        if refusal is not None:
            self._requests.counts["refused"] += 1
            return refusal
        self._requests.add(sequence)
        return None

    def _new_sequence(self, client: bytes, request: AddRequest) -> Sequence:
        self._arrivals += 1
        max_model_len, max_tokens = self._readiness.max_model_len, request.sampling.max_tokens
        assert max_model_len is not None
        assert max_tokens is not None
        return Sequence(
            client=client,
            request=request,
            arrival=self._arrivals,
            tokens=list(request.prompt_token_ids),
            end_token_ids=frozenset(request.end_token_ids),
            max_total_tokens=min(len(request.prompt_token_ids) + max_tokens, max_model_len),
        )

    def _misfit(self, client: bytes, request: AddRequest) -> RequestOutput | None:
        """Why a request can never be taken, or not before the system is ready."""
        max_model_len, vocab_size = self._readiness.max_model_len, self._readiness.vocab_size
        if max_model_len is None:
            return _refuse(request, "OverloadedError", f"starting; waiting for {self._readiness.who_is_missing()}")
        if self._requests.get(client, request.request_id) is not None:
            return _refuse(request, "InvalidRequestError", f"request id {request.request_id!r} is in use", "request_id")
        prompt = request.prompt_token_ids
        if not prompt:
            return _refuse(request, "InvalidRequestError", "the prompt is empty", "prompt")
        if len(prompt) >= max_model_len:
            what = f"the prompt has {len(prompt)} tokens; at most {max_model_len - 1} leave room for an answer"
            return _refuse(request, "InvalidRequestError", what, "prompt")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            return _refuse(request, "InvalidRequestError", f"token ids must be in 0..{vocab_size - 1}", "prompt")
        if request.sampling.max_tokens is None:
            return _refuse(request, "InvalidRequestError", "max_tokens is not resolved", "max_tokens")
        return None

    def _overload(self, sequence: Sequence) -> RequestOutput | None:
        """Why a request is sent away now rather than late: too many wait, or for too long."""
        limit, max_queue_s = self._max_waiting_requests, self._max_queue_s
        is_full = len(self._requests.waiting) >= limit
        if not is_full and max_queue_s is None:
            return None
        wait_s = self._requests.predicted_ttft_s(sequence)
        if is_full:
            what = f"{limit} requests are waiting (performance.max_waiting_requests)"
            return _refuse(sequence.request, "OverloadedError", what, retry_after_s=wait_s)
        if max_queue_s is not None and wait_s > max_queue_s:
            what = f"the first token would take about {wait_s:.1f} s (scheduler.max_queue_s is {max_queue_s:g})"
            return _refuse(sequence.request, "OverloadedError", what, retry_after_s=wait_s - max_queue_s)
        return None


def _refuse(
    request: AddRequest, kind: str, error: str, param: str | None = None, retry_after_s: float | None = None
) -> RequestOutput:
    """The output that says that a request is not taken; ``kind`` is a class in `hbserve.errors`."""
    return RequestOutput(
        request_id=request.request_id,
        token_ids=[],
        finish_reason="error",
        error=error,
        error_kind=kind,
        error_param=param,
        retry_after_s=retry_after_s,
    )
