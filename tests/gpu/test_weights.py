"""Weights on their way into the memory of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hbserve.model_spec import ModelSpec
from hbserve.models import weight_reader
from hbserve.models.loader import load_weights
from hbserve.models.weights import WeightTable
from tests.support.model_zoo import save_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_bytes", [1 << 20, 5000])
def test_a_gpu_gets_the_weights_that_a_cpu_gets(
    dtype: torch.dtype, buffer_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rank 1 of 2, so with parts of rows too; by buffers of several rows and of many."""
    monkeypatch.setattr(weight_reader, "_BUFFER_BYTES", buffer_bytes)
    save_model(tmp_path, "qwen3", sharded=True)
    spec = ModelSpec.load(tmp_path)
    table = WeightTable.build(spec, dtype, 1, 2)
    arenas = []
    for device in ("cpu", "cuda"):
        arenas.append(torch.zeros(table.num_bytes, dtype=torch.uint8, device=device))
        load_weights(tmp_path, spec, table, arenas[-1], 1, 2)
    assert arenas[0].any()
    assert torch.equal(arenas[0], arenas[1].cpu())
