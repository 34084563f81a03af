"""FP8 checkpoints of less common forms, made by hand as published ones are, beside the model that they are made of."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbserve.errors import ModelError
from hbserve.float8 import widened
from hbserve.layers.fp8 import Fp8Linear
from hbserve.layers.fp8 import quantise_weight as quantise_on_load
from hbserve.layers.linear import PlainLinear
from hbserve.model_spec import ModelSpec
from hbserve.models.decoder import Decoder
from hbserve.models.loader import load_weights
from hbserve.models.weights import WeightTable
from tests.support.fp8_checkpoints import (
    MODULES,
    compressed_tensors,
    group_of,
    make_fp8,
    quantise_linear,
    quantise_module,
)
from tests.support.model_zoo import save_model
from tests.unit.models.test_models import cpu, our_logits, random_tokens

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "num_hidden_layers": 2}
MIXED = {
    "format": "mixed-precision",
    "config_groups": {
        "group_0": group_of("channel", False, "re:.*self_attn.*") | {"format": "float-quantized"},
        "group_1": group_of("block", False, "Linear") | {"format": "float-quantized"},
        "group_2": group_of("tensor", True, "model.layers.1.mlp.down_proj") | {"format": "float-quantized"},
    },
}


def loaded(folder: Path, rank: int = 0, size: int = 1, **options: Any) -> tuple[Decoder, dict[str, Tensor]]:
    spec = ModelSpec.load(folder, **options)
    table = WeightTable.build(spec, torch.float32, rank, size)
    arena = cpu().allocate_arena(table.num_bytes)
    load_weights(folder, spec, table, arena, rank, size)
    views = table.views(arena)
    return Decoder(spec, views), views


def rewrite(folder: Path, weights: dict[str, Tensor], quantization_config: dict[str, Any]) -> None:
    save_file(weights, folder / "model.safetensors")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": quantization_config}))


def test_groups_have_formats_of_their_own(tmp_path: Path) -> None:
    """Attention by rows, the feed-forward layers by blocks, and one matrix by a static scale."""
    model = save_model(tmp_path, "qwen3", **SHAPE)
    weights = load_file(tmp_path / "model.safetensors")
    token_ids = random_tokens(40)
    with torch.inference_mode():
        exact = model(token_ids[None]).logits[0]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in MODULES:
                is_static = name == "model.layers.1.mlp.down_proj"
                granularity = "channel" if "self_attn" in name else "tensor" if is_static else "block"
                quantise_linear(weights, name, module, granularity, is_static=is_static)
        expected = model(token_ids[None]).logits[0]
        rewrite(tmp_path, weights, compressed_tensors("channel", False, **MIXED))
        logits = our_logits(tmp_path, token_ids, torch.float32, cpu())
    error, effect = ((x - expected).square().mean().sqrt().item() for x in (logits, exact))
    assert error < 0.1 * effect
    spec = ModelSpec.load(tmp_path)
    assert spec.weight_format is not None
    assert spec.weight_format.name == "block+channel+tensor"
    assert ModelSpec.from_plain(spec.as_plain()) == spec


def test_matrices_that_are_computed_as_one_must_be_of_one_group(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", **SHAPE)
    groups = {"a": group_of("channel", False, "re:.*q_proj"), "b": group_of("tensor", False, "Linear")}
    rewrite(
        tmp_path,
        load_file(tmp_path / "model.safetensors"),
        compressed_tensors("channel", False, config_groups=groups),
    )
    with pytest.raises(ModelError, match=r"only some of .*q_proj, .*k_proj.* are quantised in the same way"):
        WeightTable.build(ModelSpec.load(tmp_path), torch.float32)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_weights_without_quantised_inputs_are_widened(granularity: str, tmp_path: Path) -> None:
    """Every rank has its share of the dequantised matrices, also of experts; nothing else is rounded."""
    shape: dict[str, Any] = {"moe_intermediate_size": 192, "num_hidden_layers": 1, "hidden_size": 256}
    shape["mlp_only_layers"] = []
    model = save_model(tmp_path, "qwen3_moe", **shape)
    weights = load_file(tmp_path / "model.safetensors")
    plain = dict(weights)
    for name in [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]:
        module = torch.nn.Linear(1, 1)
        module.weight.data = weights[f"{name}.weight"]
        quantise_module(weights, name, module, granularity)
        plain[f"{name}.weight"] = module.weight.data
    del model
    save_file(plain, tmp_path / "model.safetensors")
    expected = [loaded(tmp_path, rank, 2)[1] for rank in range(2)]
    group = group_of(granularity, False, "Linear") | {"input_activations": None}
    names = ["lm_head", "re:.*mlp.gate$"]
    config = compressed_tensors(granularity, False, config_groups={"g": group}, ignore=names)
    rewrite(tmp_path, weights, config)
    for rank, views in enumerate(expected):
        found = loaded(tmp_path, rank, 2)[1]
        assert found.keys() == views.keys()
        assert all(torch.equal(found[name], views[name]) for name in views)


def test_an_lm_head_in_fp8_is_widened(tmp_path: Path) -> None:
    """As where ``ignore`` does not name it; the rest of the model is FP8 as ever."""
    model = save_model(tmp_path, "llama", **SHAPE, tie_word_embeddings=False)
    make_fp8(tmp_path, model, "ct_channel")
    weights = load_file(tmp_path / "model.safetensors")
    quantise_module(weights, "lm_head", model.lm_head, "channel")
    rewrite(tmp_path, weights, compressed_tensors("channel", False, ignore=[]))
    decoder, _ = loaded(tmp_path)
    assert torch.equal(decoder.lm_head, model.lm_head.weight.data)
    assert isinstance(decoder.layers[0].qkv, Fp8Linear)
    start, stop = decoder.lm_head.shape[0] // 2, decoder.lm_head.shape[0]
    assert torch.equal(loaded(tmp_path, 1, 2)[0].lm_head, model.lm_head.weight.data[start:stop])


@pytest.mark.parametrize("prefix", ["model.layers.1", "re:.*layers\\.1\\."])
def test_a_layer_stays_plain_that_is_named_by_its_beginning(prefix: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", **SHAPE)
    original = load_file(tmp_path / "model.safetensors")
    make_fp8(tmp_path, model, "ct_channel")
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if name.startswith("model.layers.1.") and "proj" in name]:
        weights.pop(name)
        if name in original:
            weights[name] = original[name]
    rewrite(tmp_path, weights, compressed_tensors("channel", False, ignore=[prefix]))
    first, second = loaded(tmp_path)[0].layers
    assert isinstance(first.qkv, Fp8Linear)
    assert isinstance(second.qkv, PlainLinear)
    assert torch.equal(second.o.weight, original["model.layers.1.self_attn.o_proj.weight"])  # type: ignore[attr-defined]


SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize("names", ["{}_scale", "{}_proj.{}_scale", "{}_proj.output_scale"])
@pytest.mark.parametrize("num_heads", [None, 2])
def test_scales_of_kv_are_read_where_kv_is_fp8(
    names: str, num_heads: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A ``kv_cache_scheme`` turns nothing on by itself; scales of queries are of no use."""
    model = save_model(tmp_path, "qwen3", **SHAPE)
    make_fp8(tmp_path, model, "ct_channel")
    weights = load_file(tmp_path / "model.safetensors")
    expected = []
    for layer in range(2):
        for number, kind in enumerate("kv"):
            scales = torch.tensor([0.5 + layer + 0.1 * number])
            if num_heads is not None:
                scales = scales + torch.arange(num_heads).view(-1, 1, 1)
            growth = (
                32**0.5 if kind == "k" else 1
            )  # a mixed number may be that often the largest of its head's 32 pairs
            expected.append(scales.flatten().expand(2) * growth)
            weights[f"model.layers.{layer}.self_attn.{names.format(kind, kind)}"] = scales
        weights[f"model.layers.{layer}.self_attn.q_scale"] = torch.ones(1)
    rewrite(tmp_path, weights, compressed_tensors("channel", False, kv_cache_scheme=SCHEME))
    assert torch.equal(loaded(tmp_path, kv_dtype="fp8")[1]["kv_scales"], torch.stack(expected))
    caplog.set_level(logging.INFO)
    assert "kv_scales" not in loaded(tmp_path)[1]
    assert "kv_cache.dtype: fp8 would use" in caplog.text


def test_scales_of_other_kv_are_refused_by_name(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", **SHAPE)
    make_fp8(tmp_path, model, "ct_channel")
    config = compressed_tensors("channel", False, kv_cache_scheme=SCHEME | {"type": "int"})
    rewrite(tmp_path, load_file(tmp_path / "model.safetensors"), config)
    with pytest.raises(ModelError, match='kv_cache_scheme: type "int" is not supported'):
        ModelSpec.load(tmp_path, kv_dtype="fp8")
    assert ModelSpec.load(tmp_path).kv_format is None


@pytest.mark.parametrize("family", ["granitemoe", "granitemoe_swa", "gpt_oss"])
def test_experts_in_one_tensor_are_quantised_on_load(family: str, tmp_path: Path) -> None:
    """Each row has the scale that it would have alone, on every rank, also of a slice of its columns."""
    save_model(tmp_path, family, hidden_size=192, intermediate_size=128)
    plain = loaded(tmp_path)[1]
    quantised = loaded(tmp_path, quantization="fp8")[1]
    names = [name for name in plain if name.endswith((".up", ".down")) and f"{name}_scale" in quantised]
    assert len(names) == 6
    for name in names:
        expected = quantise_on_load(plain[name])
        assert torch.equal(quantised[name].view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(quantised[f"{name}_scale"], expected.scales[:, 0])
    values = [loaded(tmp_path, rank, 2)[1] for rank in range(2)]
    shares = [loaded(tmp_path, rank, 2, quantization="fp8")[1] for rank in range(2)]
    for name in names:
        found = [widened(own[name]) * own[f"{name}_scale"][:, None] for own in shares]
        for rank in range(2):
            assert (found[rank] - values[rank][name]).abs().max() < 0.04 * plain[name].abs().max()
        if name.endswith(".down"):
            assert torch.equal(torch.cat(found, 1), widened(quantised[name]) * quantised[f"{name}_scale"][:, None])


def test_experts_in_one_tensor_are_no_linear_layers(tmp_path: Path) -> None:
    """llm-compressor leaves them as they are, though ``ignore`` does not name them."""
    model = save_model(tmp_path, "granitemoe", hidden_size=192, intermediate_size=128)
    before = loaded(tmp_path)[1]
    make_fp8(tmp_path, model, "ct_channel")
    decoder, after = loaded(tmp_path)
    assert isinstance(decoder.layers[0].qkv, Fp8Linear)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith((".up", ".down")))
