"""KV tiers on a GPU: pinned memory, streams beside the steps, and the same tokens as without."""

from __future__ import annotations

import pytest
import torch

from tests.system.test_kv_tiers import Case, check_answers, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Case]]:
    return make_model(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("mode", ["unified", "semi_pd"])
def test_answers_are_those_of_a_system_without_tiers(model: tuple[str, list[Case]], mode: str) -> None:
    check_answers(*model, mode=mode, device="cuda")
