"""Where requests go: policies of placement, and prompts that are computed where they decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from tests.support.engines import assert_no_leaks, greedy_reference, random_prompt
from tests.support.model_zoo import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("phi3")
    return str(folder), save_model(folder, "phi3")


def running(model_path: str, roles: list[str], **settings: Any) -> LLM:
    instances = [
        {"instance_id": f"{role}-{roles[:index].count(role)}", "instance_type": role, "num_threads": 1}
        for index, role in enumerate(roles)
    ]
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_blocks": 128, "max_model_len": 512}
    return LLM(model_path, gpu_instances=instances, chunk_size=64, log_level="ERROR", **(common | settings))


def counted(llm: LLM, what: Callable[[], None]) -> dict[str, dict[str, int]]:
    """Steps of each instance and bytes of each link that something took."""

    def numbers() -> dict[str, dict[str, int]]:
        stats = llm.get_system_stats()
        steps = {name: each["steps"] for name, each in stats["gpu_instances"].items()}
        return {"steps": steps, "bytes": {name: link["bytes"] for name, link in stats["kv_transfer"]["links"].items()}}

    before = numbers()
    what()
    assert_no_leaks(llm)
    after = numbers()
    return {kind: {name: after[kind][name] - before[kind][name] for name in after[kind]} for kind in after}


def test_short_and_mostly_cached_prompts_are_computed_where_they_decode(model: tuple[str, Any]) -> None:
    long = random_prompt(200, seed=1)
    with running(model[0], ["prefill", "decode"], local_prefill_tokens=32) as llm:

        def ask(prompt: list[int]) -> None:
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output["token_ids"] == greedy_reference(model[1], prompt, 8)

        short = counted(llm, lambda: ask(random_prompt(32, seed=2)))
        assert short["steps"]["prefill-0"] == 0
        assert short["bytes"] == {"prefill-0->decode-0": 0}
        far = counted(llm, lambda: ask(long))
        assert far["steps"]["prefill-0"] > 0
        assert far["bytes"]["prefill-0->decode-0"] > 0
        cached = counted(llm, lambda: ask([*long, *random_prompt(20, seed=3)]))
        assert cached["steps"]["prefill-0"] == 0


@pytest.mark.parametrize("placement", ["fcfs", "prefix_aware"])
def test_placement(model: tuple[str, Any], placement: str) -> None:
    with running(model[0], ["prefill", "prefill", "decode", "decode"], placement=placement) as llm:

        def ask(*prompts: list[int]) -> None:
            outputs = llm.generate(list(prompts), GREEDY, use_tqdm=False)
            assert [o["token_ids"] for o in outputs] == [greedy_reference(model[1], p, 8) for p in prompts]

        one, two = random_prompt(120, seed=4), random_prompt(120, seed=5)
        ask(one, two)
        again = [counted(llm, partial(ask, [*prompt, 7, 8, 9])) for prompt in (one, two)]
        for each in again:
            assert sum(steps > 0 for steps in each["steps"].values()) == 2
            if placement == "fcfs":
                assert each["steps"]["prefill-0"] > 0
                assert each["steps"]["decode-0"] > 0
            else:  # most blocks are there already
                assert 0 < sum(each["bytes"].values()) <= 2 * 3 * 2 * 16 * 2 * 32 * 4
