"""The digest of a model's weights: which changes of the files it sees, and when it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hbserve.models import fingerprint
from hbserve.models.fingerprint import WeightsDigest

TENSORS = {"b": torch.arange(30_000, dtype=torch.float32), "a": torch.ones(3, 5, dtype=torch.bfloat16)}


def digest(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> str:
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    with WeightsDigest(folder) as weights:
        return weights.result()


def test_every_byte_name_dtype_and_shape_counts_and_the_files_do_not(tmp_path: Path) -> None:
    first = digest(tmp_path, TENSORS)
    assert digest(tmp_path, dict(reversed(TENSORS.items()))) == first
    data = (tmp_path / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    seen = {first}
    for place in (begin, (begin + len(data)) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        seen.add(digest(tmp_path))
    a, b = TENSORS["a"], TENSORS["b"]
    seen.add(digest(tmp_path, {"b": b, "c": a}))
    seen.add(digest(tmp_path, {"b": b, "a": a.view(5, 3)}))
    seen.add(digest(tmp_path, {"b": b, "a": a.view(torch.float16)}))
    seen.add(digest(tmp_path, {"b": b.view(2, -1).flip(0).reshape(-1), "a": a}))
    assert len(seen) == 8
    (tmp_path / "model.safetensors").unlink()
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert digest(tmp_path) == first


def test_a_digest_is_kept_until_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_MIN_KEPT_BYTES", 0)
    first = digest(tmp_path, TENSORS)
    [kept] = (tmp_path / "cache" / "fingerprints").iterdir()
    kept.write_text("kept")  # it is no digest
    assert digest(tmp_path) == first
    other = "0" * 64
    kept.write_text(other)
    assert digest(tmp_path) == other
    changed = bytearray((tmp_path / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(changed)  # as long as before
    assert digest(tmp_path) not in (other, first)
