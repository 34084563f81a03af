"""FP8 weights: published formats against transformers with the same numerics, shares of ranks, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hbserve.errors import ModelError
from hbserve.float8 import rounded, widened
from hbserve.layers.fp8 import Fp8Linear, quantise
from hbserve.layers.linear import PlainLinear
from hbserve.layers.rotary import RotaryEmbedding, num_mixed_pairs
from hbserve.model_spec import ModelSpec
from hbserve.models.decoder import Decoder
from hbserve.models.loader import fill_dummy_weights, load_weights
from hbserve.models.weights import WeightTable
from hbserve.rope_spec import RopeSpec
from hbserve.weight_format import Fp8Format, on_load, read_weight_format
from tests.support.fp8_checkpoints import FORMATS, compressed_tensors, make_fp8, quantise_weight, spread
from tests.support.model_zoo import save_model
from tests.unit.models.test_models import cpu, our_logits, random_tokens

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "num_hidden_layers": 2}
"""The last block of 128 is half a one in some places."""


def loaded(folder: Path, rank: int = 0, size: int = 1, quantization: Any = None) -> Decoder:
    spec = ModelSpec.load(folder, quantization)
    table = WeightTable.build(spec, torch.float32, rank, size)
    arena = cpu().allocate_arena(table.num_bytes)
    load_weights(folder, spec, table, arena, rank, size)
    return Decoder(spec, table.views(arena))


def matrices(folder: Path, rank: int = 0, size: int = 1, quantization: Any = None) -> dict[str, Any]:
    """The first layer's matrices, by their names in the weight table."""
    layer = loaded(folder, rank, size, quantization).layers[0]
    assert isinstance(layer.mlp, tuple)
    return {"qkv": layer.qkv, "o": layer.o, "up": layer.mlp[0], "down": layer.mlp[1]}


def dequantised(layer: Any) -> torch.Tensor:
    assert isinstance(layer, Fp8Linear)
    return layer.dequantised_weight()


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "hf_static"])
def test_published_formats_compute_what_their_definition_says(name: str, tmp_path: Path) -> None:
    # Phi-3 has q, k and v in one matrix of the checkpoint, and gate and up in another.
    model = save_model(tmp_path, "phi3" if name in ("ct_channel", "fp8_static") else "qwen3", **SHAPE)
    token_ids = random_tokens(40)
    with torch.inference_mode():
        exact = model(token_ids[None]).logits[0]
        make_fp8(tmp_path, model, name, plain=("o_proj",))
        expected = model(token_ids[None]).logits[0]
        logits = our_logits(tmp_path, token_ids, torch.float32, cpu())
    error, effect = ((x - expected).square().mean().sqrt().item() for x in (logits, exact))
    assert error < 0.1 * effect  # a value halfway between two of FP8's may fall to either
    assert name == "fbgemm" or effect < 0.5 * exact.std().item()  # its bound of inputs is low in this test


def test_a_text_part_is_loaded_whose_modules_have_the_names_of_the_whole(tmp_path: Path) -> None:
    """As published ones are: names of plain modules begin with the part's, and scales have transformers' names."""
    model = save_model(tmp_path, "llava")
    make_fp8(tmp_path, model, "hf_static", plain=("o_proj",))
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    num_layers = document["text_config"]["num_hidden_layers"]
    names = [f"language_model.model.layers.{layer}.self_attn.o_proj" for layer in range(num_layers)]
    document["quantization_config"]["modules_to_not_convert"] = [*names, "model.vision_tower"]
    path.write_text(json.dumps(document))
    layer = loaded(tmp_path).layers[0]
    assert isinstance(layer.o, PlainLinear)
    assert isinstance(layer.qkv, Fp8Linear)
    assert layer.qkv.input_scale == 0.5
    text = model.model.language_model.layers[0].self_attn
    stacked = torch.cat([getattr(text, f"{name}_proj").weight.data for name in "qkv"])
    assert torch.equal(dequantised(layer.qkv), stacked)


@pytest.mark.parametrize("name", ["fp8_block", "ct_channel", "fp8_static", None])
def test_ranks_hold_shares_of_values_and_scales(name: str | None, tmp_path: Path) -> None:
    """``None``: quantised while it is loaded; a row's scale is then that of the whole row on every rank."""
    model = save_model(tmp_path, "qwen3", **SHAPE | {"intermediate_size": 512})
    if name is not None:
        make_fp8(tmp_path, model, name)
    quantization = "fp8" if name is None else None
    whole = matrices(tmp_path, quantization=quantization)
    ranks = [matrices(tmp_path, rank, 2, quantization) for rank in range(2)]
    for column_parallel, sizes in (("qkv", [256, 128, 128]), ("up", [512, 512])):
        stacked = torch.split(dequantised(whole[column_parallel]), sizes)
        for rank, layer in enumerate(ranks):
            expected = torch.cat([part.chunk(2)[rank] for part in stacked])
            assert torch.equal(dequantised(layer[column_parallel]), expected)
    for row_parallel in ("o", "down"):
        shares = [dequantised(layer[row_parallel]) for layer in ranks]
        assert torch.equal(torch.cat(shares, dim=1), dequantised(whole[row_parallel]))


def test_on_load_every_row_is_within_half_a_step(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama", **SHAPE)
    down = matrices(tmp_path, quantization="fp8")["down"]
    weight = model.model.layers[0].mlp.down_proj.weight.data
    error = (dequantised(down) - weight).abs()
    assert (error <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 / 512).all()
    # scales are chosen for less error than those that use the whole range have
    assert error.square().sum() < 0.95 * (quantise(weight).dequantised() - weight).square().sum()
    assert down.bias is not None


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("fp8_block", "qwen3_moe"),
        ("ct_channel", "qwen3_moe"),
        ("fp8_static", "qwen3_moe"),
        ("fp8_block", "glm4_moe"),
        ("ct_tensor_static", "qwen2_moe"),
    ],
)
def test_experts_have_quantised_weights_and_plain_inputs(name: str, family: str, tmp_path: Path) -> None:
    """The same as a checkpoint with the dequantised weights; only inputs of an expert of every token are rounded."""
    shape: dict[str, Any] = {"hidden_size": 320, "moe_intermediate_size": 192, "num_hidden_layers": 2}
    shape["attention_bias"] = False
    has_shared = family != "qwen3_moe"
    if has_shared:  # a second layer's router would choose other experts for rounded inputs
        shape |= {"shared_expert_intermediate_size": 128, "num_hidden_layers": 1}
    dense: dict[str, Any] = {"first_k_dense_replace": 0} if family == "glm4_moe" else {"mlp_only_layers": []}
    save_model(tmp_path, family, **shape, **dense)
    granularity, is_static, quantization_config = FORMATS[name]
    weights = load_file(tmp_path / "model.safetensors")
    quantised = dict(weights)
    for key in [key for key in weights if "expert" in key and key.endswith("proj.weight")]:
        values, scales = quantise_weight(weights[key], granularity)
        suffix = "_scale_inv" if name == "fp8_block" else "_scale"
        quantised |= {key: values, f"{key}{suffix}": scales}
        if is_static:
            quantised[key.replace("weight", "input_scale")] = torch.tensor([0.5])
        weights[key] = values.float() * spread(scales, values.shape)
    token_ids = random_tokens(40)
    save_file(weights, tmp_path / "model.safetensors")
    expected = our_logits(tmp_path, token_ids, torch.float32, cpu())
    save_file(quantised, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    plain = {"ignore": ["re:.*self_attn.*"], "modules_to_not_convert": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    key = "ignore" if "config_groups" in quantization_config else "modules_to_not_convert"
    plain[key] += ["re:.*shared_expert_gate"] if key == "ignore" else ["shared_expert_gate"]
    config["quantization_config"] = quantization_config | {key: plain[key]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mlp = loaded(tmp_path).layers[0].mlp
    assert mlp.up.dtype == torch.float8_e4m3fn  # type: ignore[union-attr]
    error = (our_logits(tmp_path, token_ids, torch.float32, cpu()) - expected).square().mean().sqrt().item()
    if not has_shared:
        assert error < 1e-5
        return
    assert error < 0.04 * expected.std().item()
    prefix = "model.layers.0.mlp.shared_expert" + ("s" if family == "glm4_moe" else "")
    shared = torch.cat([weights[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(dequantised(mlp.shared_up), shared)  # type: ignore[union-attr]


def test_dummy_weights_are_alike_in_fp8(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", **SHAPE)
    spec = ModelSpec.load(tmp_path, "fp8")
    table = WeightTable.build(spec, torch.bfloat16)
    arena = torch.zeros(table.num_bytes, dtype=torch.uint8)
    fill_dummy_weights(spec, table, arena, 0)
    decoder = Decoder(spec, table.views(arena))
    assert dequantised(decoder.layers[0].qkv).std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(dequantised(decoder.layers[0].qkv), dequantised(decoder.layers[1].qkv))
    assert decoder.embedding.float().std().item() == pytest.approx(0.02, rel=0.1)
    plain = WeightTable.build(ModelSpec.load(tmp_path), torch.bfloat16)
    last: Any = decoder.layers[-1].mlp
    assert [type(linear) for linear in last] == [PlainLinear] * 2
    assert decoder.typical_layers == [0, 1]
    saved = sum(decoder.token_parameters(layer) for layer in range(spec.num_layers))  # of two bytes each
    saved -= sum(linear.num_weights for linear in last)
    assert plain.num_bytes - table.num_bytes == pytest.approx(saved, rel=0.03)


def test_a_token_is_quantised_alike_in_every_batch() -> None:
    x = torch.randn(9, 300) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    for is_grouped in (False, True):
        together = quantise(x, is_grouped=is_grouped)
        for row in range(9):
            alone = quantise(x[row : row + 1], is_grouped=is_grouped)
            assert torch.equal(alone.dequantised()[0], together.dequantised()[row])
        assert ((together.dequantised() - x).abs() <= x.abs() / 16 + x.abs().amax(1, keepdim=True) / 448 / 512).all()


@pytest.mark.parametrize(("rotated_dim", "is_interleaved"), [(None, False), (None, True), (32, False), (32, True)])
def test_mixed_heads_have_the_same_products_and_less_error_in_fp8(
    rotated_dim: int | None, is_interleaved: bool
) -> None:
    """Slow pairs have the largest numbers here, as in models."""
    rotary = RotaryEmbedding(RopeSpec(1e4, rotated_dim=rotated_dim, is_interleaved=is_interleaved), 64, cpu().device)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 100, 3, 64, generator=generator)
    slowest = [14, 15, 30, 31] if rotated_dim else [30, 31, 62, 63]
    if is_interleaved:
        slowest = [28, 29, 30, 31] if rotated_dim else [60, 61, 62, 63]
    q[..., slowest] *= 10
    k[..., slowest] *= 10
    exact = torch.einsum("qhd,khd->hqk", q, k)
    plain = torch.einsum("qhd,khd->hqk", q, widened(rounded(k)))
    mixed = torch.einsum("qhd,khd->hqk", rotary.mix(q), rotary.mix(k))
    short = torch.einsum("qhd,khd->hqk", rotary.mix(q), widened(rounded(rotary.mix(k))))
    torch.testing.assert_close(mixed, exact, atol=1e-3, rtol=1e-5)
    assert (short - exact).norm() < 0.6 * (plain - exact).norm()
    extreme = rotary.mix(torch.ones(1, 1, 64)).abs().max().item()
    assert extreme == pytest.approx(num_mixed_pairs(64) ** 0.5)
    other = RotaryEmbedding(RopeSpec(1e4), 96, cpu().device)  # as Phi-3's: 48 pairs
    assert other.mix(x := torch.randn(2, 3, 96)) is x


# --- what the format says ---


def test_only_targets_are_quantised_where_they_are_named() -> None:
    config = compressed_tensors("channel", False, ignore=["re:.*o_proj"])
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*_proj", "up_proj"]
    weight_format = read_weight_format({"quantization_config": config})
    assert weight_format is not None
    names = ("self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj", "mlp.down_proj")
    converted = [weight_format.converts(f"model.layers.0.{name}") for name in names]
    assert converted == [True, True, False, False]


def test_modules_that_stay_plain_are_named_in_several_ways() -> None:
    names = ("model.layers.0", "mlp.down_proj", r"re:.*layers\.[12]\.self_attn.*")
    weight_format = Fp8Format("tensor", plain_modules=names)
    plain = ["model.layers.0.mlp.up_proj", "model.layers.7.mlp.down_proj", "model.layers.2.self_attn.q_proj"]
    converted = ["model.layers.10.mlp.up_proj", "model.layers.3.self_attn.q_proj", "model.layers.4.mlp.my_down_proj"]
    assert [weight_format.converts(module) for module in plain + converted] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, 'quant_method "awq"; supported are unquantised weights, and FP8 of'),
        ({"bits": 4}, "quant_method null"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\] is not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, 'fmt "e5m2"'),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, 'scale_fmt "ue8m0"'),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
            "blocks with static activations",
        ),
        (compressed_tensors("group", False), 'compressed-tensors: strategy "group" is not supported'),
        (compressed_tensors("channel", False, format="pack-quantized"), 'format "pack-quantized"'),
        (compressed_tensors("channel", False, config_groups={}), "config_groups must be an object of groups"),
        (compressed_tensors("channel", False, ignore=[r"re:(a+)+$"]), "may take too long to match"),
        (compressed_tensors("channel", False, ignore=["re:("]), "is invalid"),
        (compressed_tensors("channel", False, sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
    ],
)
def test_other_formats_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_weight_format({"quantization_config": config})


@pytest.mark.parametrize(
    ("key", "changed", "message"),
    [
        ("weight_scale", None, r"there is no tensor .*down_proj.weight_scale of shape \[256, 1\]"),
        ("weight_scale", torch.ones(3), r"down_proj.weight_scale has shape \[3\], config.json asks for \[256, 1\]"),
        ("weight_scale", torch.full((256, 1), torch.nan), "down_proj.weight_scale has values that are not finite"),
        ("weight", torch.ones(256, 320), "down_proj.weight is F32; supported are F8_E4M3"),
        ("weight", torch.full((256, 320), torch.nan).to(torch.float8_e4m3fn), "down_proj.weight has values that are"),
    ],
)
def test_wrong_tensors_are_named(key: str, changed: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", **SHAPE)
    make_fp8(tmp_path, model, "ct_channel")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = f"model.layers.1.mlp.down_proj.{key}"
    del weights[name]
    save_file(weights | ({} if changed is None else {name: changed}), path)
    with pytest.raises(ModelError, match=message):
        loaded(tmp_path)


def test_shares_that_cut_blocks_and_half_quantised_stacks_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", **SHAPE)
    make_fp8(tmp_path, model, "fp8_block")
    with pytest.raises(ModelError, match=r"down_proj.* 320 columns in blocks of 128, which cannot be shared by 2"):
        WeightTable.build(ModelSpec.load(tmp_path), torch.float32, 0, 2)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["quantization_config"]["modules_to_not_convert"] = ["k_proj"]
    path.write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"only some of .*q_proj, .*k_proj, .* are quantised"):
        WeightTable.build(ModelSpec.load(tmp_path), torch.float32)


def test_a_quantised_checkpoint_keeps_its_format(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3", **SHAPE)
    assert ModelSpec.load(tmp_path, "fp8").weight_format == on_load("model.layers.1.mlp")
    make_fp8(tmp_path, model, "fp8_static")
    spec = ModelSpec.load(tmp_path, "fp8")
    assert spec.weight_format == Fp8Format("tensor", is_static=True)
    assert ModelSpec.from_plain(spec.as_plain()) == spec
