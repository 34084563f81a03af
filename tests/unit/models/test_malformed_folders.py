"""Model folders as strangers may hand them over, each refused by file and key. `benchmarks.chaos` has random ones."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.chaos.folder_loader import use_text
from hbserve.errors import MAX_MESSAGE_CHARS, ModelError
from hbserve.model_spec import ModelSpec
from hbserve.models.fingerprint import WeightsDigest
from hbserve.models.loader import check_weights, load_weights
from hbserve.models.weights import WeightTable
from hbserve.tokenizer import Tokenizer
from hbserve.tokenizer_files import read_vocabulary
from tests.support import tiny_tokenizers
from tests.support.model_zoo import save_model


def load(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Do what a worker does with a folder, in its order."""
    spec = ModelSpec.load(folder)
    table = WeightTable.build(spec, dtype)
    check_weights(folder, spec)
    arena = torch.empty(table.num_bytes, dtype=torch.uint8)
    load_weights(folder, spec, table, arena)
    with WeightsDigest(folder) as digest:
        digest.result()


def max_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_labels", "head_dim"])
@pytest.mark.parametrize("value", [10_000_000, 10**12, 2**70])
@pytest.mark.parametrize("name", ["llama", "qwen2_window"])
def test_huge_sizes_take_no_memory(name: str, key: str, value: int, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    tiny_tokenizers.byte_level(tmp_path)
    edit_json(tmp_path / "config.json", **{key: value})
    memory_mb = max_memory_mb()
    if key == "num_labels":  # of other kinds of models; transformers makes a name for each
        load(tmp_path)
        use_text(tmp_path)
    else:
        with pytest.raises(ModelError, match=f"{key}|has shape"):
            load(tmp_path)
        with contextlib.suppress(ModelError):
            use_text(tmp_path)
    assert max_memory_mb() - memory_mb < 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_values", ["one", "all"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str, num_values: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_model(tmp_path, "qwen2", dtype=dtype)
    weights = load_file(tmp_path / "model.safetensors")
    weights[name].view(-1)[-1 if num_values == "one" else slice(None)] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"model.safetensors: tensor {name} has values that are not finite"):
        load(tmp_path, dtype)


def test_weights_too_large_for_the_serving_dtype_are_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, tmp_path / "model.safetensors")
    load(tmp_path, torch.bfloat16)
    with pytest.raises(ModelError, match=r"model.norm.weight has values too large for float16; choose another"):
        load(tmp_path, torch.float16)


@pytest.mark.parametrize(
    ("section", "value"),
    [("model", {}), ("added_tokens", 3), ("normalizer", "x"), ("pre_tokenizer", [1]), ("decoder", 1.5)],
)
def test_the_section_of_a_broken_tokenizer_is_named(section: str, value: object, tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    edit_json(folder / "tokenizer.json", **{section: value})
    with pytest.raises(ModelError, match=f"tokenizer.json: {section}: "):
        Tokenizer(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_to_nowhere_is_not_a_missing_file(name: str, tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/nowhere/at/all")
    with pytest.raises(ModelError, match=f"cannot read .*{name}"):
        Tokenizer(folder)


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_for(tmp_path: Path) -> None:
    """transformers would wait for an answer at the terminal."""
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / "code.py").write_text("raise SystemExit(3)")
    auto_map = {"AutoTokenizer": ["code.X", "code.X"], "AutoConfig": "code.X"}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="X", auto_map=auto_map)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="trust_remote_code"):
        Tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "tekken.json"])
def test_a_pipe_is_no_file_to_wait_for(name: str, tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    if name == "tekken.json":
        (folder / "tokenizer.json").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"cannot read .*{name}: it is not a regular file"):
        Tokenizer(folder)
    if name in ("tokenizer.json", "tekken.json"):
        with pytest.raises(ModelError, match="it is not a regular file"):
            read_vocabulary(folder)


def test_a_refusal_does_not_repeat_the_file(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    weights = (tmp_path / "model.safetensors").read_bytes()
    header = json.dumps({"model.norm.weight": {"dtype": "x" * 100_000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights[-4:])
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert "model.safetensors cannot be read" in str(caught.value)
    assert len(str(caught.value)) < 1000
    for key, value in {
        "architectures": ["x" * 100_000],
        "layer_types": ["y" * 100_000],
        "hidden_act": "z" * 9999,
    }.items():
        save_model(tmp_path, "qwen2")
        edit_json(tmp_path / "config.json", **{key: value})
        with pytest.raises(ModelError, match=r"config\.json") as caught:
            load(tmp_path)
        assert len(str(caught.value)) <= MAX_MESSAGE_CHARS
