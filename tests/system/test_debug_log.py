"""The scheduler's log at DEBUG: the life of one request, in order."""

from __future__ import annotations

import re

import pytest

from hbserve import LLM, SamplingParams
from tests.support.engines import assert_no_leaks
from tests.support.scheduler_parts import DEMO

NUM_TOKENS = 4
LIFE = [
    r"request \S+: taken, 40 prompt tokens",
    r"request \S+: admitted to prefill-0 and decode-0, 0 cached tokens, 6 blocks",
    r"request \S+: transfer \S+ started, 3 blocks from prefill-0 to decode-0",
    r"step \d+: planned for prefill-0, 1 rows, 40 prompt tokens: \S+",
    r"request \S+: first token, from prefill-0",
    r"request \S+: freed 3 blocks of prefill-0",
    *[r"step \d+: planned for decode-0, 1 rows, 0 prompt tokens: \S+"] * (NUM_TOKENS - 1),
    r"request \S+: freed 3 blocks of decode-0",
    r"request \S+: finished, completed \(length\), 4 tokens",
]
ARRIVAL = r"request \S+: transfer \S+ arrived, 3 blocks"
"""At any time between the start of the transfer and the first plan for decode."""


def test_a_request_can_be_followed_from_its_arrival_to_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(DEMO), mode="disaggregated", device="cpu", block_size=16, num_blocks=64, log_level="DEBUG") as llm:
        llm.generate([list(range(5, 45))], sampling, use_tqdm=False)
        assert_no_leaks(llm)
    log = capfd.readouterr().err
    lines = re.findall(r" scheduler: ((?:request|step) .*)", log)
    request = next(line.split()[1].rstrip(":") for line in lines if "taken" in line)
    found = [line for line in lines if request in line]
    [arrival] = [index for index, line in enumerate(found) if re.fullmatch(ARRIVAL, line)]
    assert "started" in "".join(found[:arrival])
    assert "planned for decode-0" not in "".join(found[:arrival])
    del found[arrival]
    assert len(found) == len(LIFE), log
    for line, expected in zip(found, LIFE, strict=True):
        assert re.fullmatch(expected, line), f"{line!r} is not {expected!r} in {found}"
