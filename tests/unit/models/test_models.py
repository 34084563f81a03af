"""The forward pass against transformers, the weight arena, the loader, and refusals."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hbserve.attention import AttentionBatch, select_attention_backend
from hbserve.attention.base import AttentionBackend
from hbserve.errors import ConfigError, ModelError
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.mixture.plain import choose_experts
from hbserve.layers.norms import rms_norm
from hbserve.layers.parallel import TensorParallel
from hbserve.model_spec import ModelSpec
from hbserve.models import weight_reader
from hbserve.models.decoder import Decoder
from hbserve.models.expert_shares import expert_shares
from hbserve.models.loader import fill_dummy_weights, load_weights
from hbserve.models.weights import ALIGNMENT_BYTES, WeightTable, checkpoint_parts
from hbserve.platform import Platform, make_platform
from tests.support.model_zoo import MODELS, VOCAB_SIZE, make_model, save_model

BLOCK_SIZE = 16


def cpu() -> Platform:
    return make_platform("cpu", gpu_id=0, num_threads=1, num_instances=1)


def one_sequence(
    spec: ModelSpec,
    dtype: torch.dtype,
    platform: Platform,
    num_tokens: int,
    num_kv_heads: int | None = None,
    sinks: torch.Tensor | None = None,
) -> AttentionBackend:
    """Make an attention backend that has begun a step with all tokens of one sequence, from position 0."""
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    layout = KVLayout(spec.num_layers, BLOCK_SIZE, num_kv_heads or spec.num_kv_heads, spec.head_dim, dtype)
    arena = platform.allocate_arena(num_blocks * layout.block_bytes)
    arena.fill_(0xFF)  # NaN, unless written
    backend = select_attention_backend("sdpa", spec, dtype, platform)
    tp_size = 1 if sinks is None else spec.num_layers * spec.num_heads // len(sinks)
    attention = backend(spec, layout, layout.view(arena, num_blocks), platform, tp_size, sinks=sinks)
    attention.begin(
        AttentionBatch(
            num_decode_rows=int(num_tokens == 1),
            query_starts=np.array([0, num_tokens], np.int32),
            context_lens=np.array([num_tokens], np.int32),
            block_tables=np.arange(num_blocks, dtype=np.int32)[None],
            slot_mapping=torch.arange(num_tokens, device=platform.device),
        )
    )
    return attention


@torch.inference_mode()
def our_logits(
    folder: Path,
    token_ids: torch.Tensor,
    dtype: torch.dtype,
    platform: Platform,
    quantization: Literal["fp8"] | None = None,
) -> torch.Tensor:
    """Compute logits ``[tokens, vocab]`` of a sequence with HBServe's decoder."""
    spec = ModelSpec.load(folder, quantization)
    table = WeightTable.build(spec, dtype)
    arena = platform.allocate_arena(table.num_bytes)
    load_weights(folder, spec, table, arena)
    weights = table.views(arena)
    decoder = Decoder(spec, weights)
    token_ids = token_ids.to(platform.device)
    positions = torch.arange(len(token_ids), device=platform.device)
    attention = one_sequence(spec, dtype, platform, len(token_ids), sinks=weights.get("sinks"))
    hidden = decoder.forward(token_ids, positions, attention)
    return decoder.logits(hidden)


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_fp32(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, name)
    token_ids = random_tokens(150)
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
    logits = our_logits(tmp_path, token_ids, torch.float32, cpu())
    # logits are about 10 in size, so this tolerance is a hundred roundings
    torch.testing.assert_close(logits, expected, atol=100 * 10 * 2**-24, rtol=0)


def test_a_long_step_is_computed_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "qwen3")
    token_ids = random_tokens(150)
    whole = our_logits(tmp_path, token_ids, torch.float32, cpu())
    monkeypatch.setattr("hbserve.layers.ops._UP_ROWS", 64)
    torch.testing.assert_close(our_logits(tmp_path, token_ids, torch.float32, cpu()), whole, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_close_to_fp32_as_those_of_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In a short dtype every order of roundings gives other logits, so compare errors and not logits.

    The error of a position is the root mean square over its logits, that of a model the median over positions: where a
    rounding decides between two experts, one position has another expert's answer. The reference error is that of
    transformers against its own float32 logits, in the same dtype on the same device. HBServe rounds as often, in
    another order, so the two errors differ only by chance: on the CPU their ratio is 0.71 to 1.09 over these models.
    """
    platform = make_platform("cuda", gpu_id=0, num_threads=None, num_instances=1)
    platform.activate()
    save_model(tmp_path, name, dtype=dtype)
    token_ids = random_tokens(150)
    with torch.inference_mode():
        reference = make_model(name, dtype=dtype).to(platform.device)
        reference_logits = reference(token_ids[None].to(platform.device)).logits[0].float()
        exact = reference.float()(token_ids[None].to(platform.device)).logits[0]
    ours = our_logits(tmp_path, token_ids, dtype, platform).float()
    our_error, reference_error = (
        (x - exact).square().mean(-1).sqrt().median().item() for x in (ours, reference_logits)
    )
    assert our_error < 1.25 * reference_error
    assert reference_error < 0.2 * exact.std().item(), "the reference itself is wrong"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe_groups", "dots1", "qwen2_moe"])
def test_a_single_token_of_a_mixture_of_experts_on_a_gpu(name: str, tmp_path: Path) -> None:
    """It has kernels of its own."""
    platform = make_platform("cuda", gpu_id=0, num_threads=None, num_instances=1)
    platform.activate()
    save_model(tmp_path, name)
    for token_id in (1, 5):
        token_ids = torch.tensor([token_id])
        logits = our_logits(tmp_path, token_ids, torch.float32, platform).cpu()
        torch.testing.assert_close(logits, our_logits(tmp_path, token_ids, torch.float32, cpu()), atol=1e-3, rtol=0)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    save_model(tmp_path / "single", "qwen3")
    save_model(tmp_path / "sharded", "qwen3", sharded=True)
    token_ids = random_tokens(20)
    single, sharded = (our_logits(tmp_path / kind, token_ids, torch.float32, cpu()) for kind in ("single", "sharded"))
    assert torch.equal(single, sharded)


def test_experts_in_mxfp4_are_widened(tmp_path: Path) -> None:
    model = save_model(tmp_path, "gpt_oss")
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers += [-number for number in numbers]
    path, generator = tmp_path / "model.safetensors", torch.Generator().manual_seed(3)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        shape = tensors.pop(name).movedim(1, 2).shape  # [experts, outputs, inputs]
        codes = torch.randint(16, shape, generator=generator)
        exponents = torch.randint(-4, 0, (*shape[:2], shape[2] // 32), generator=generator)
        matrices = torch.tensor(numbers)[codes] * 2.0 ** exponents.repeat_interleave(32, 2)
        model.get_parameter(name).data.copy_(matrices.movedim(1, 2))
        pairs = codes.view(*exponents.shape, 16, 2)
        tensors[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(tensors, path)
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    token_ids = random_tokens(40)
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
    logits = our_logits(tmp_path, token_ids, torch.float32, cpu())
    torch.testing.assert_close(logits, expected, atol=100 * 10 * 2**-24, rtol=0)
    ranks = [checkpoint_parts(ModelSpec.load(tmp_path), rank, 2)["layers.0.up"] for rank in range(2)]
    with safe_open(path, framework="pt") as file:
        sources = [file.get_slice(f"model.layers.0.mlp.experts.gate_up_proj_{kind}") for kind in ("blocks", "scales")]
        first, second = (parts[0].read(sources[0], cpu().device, sources[1]) for parts in ranks)
    whole = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").movedim(1, 2)
    gates_and_ups = whole.reshape(6, 2, 48, 2, 64).permute(1, 0, 3, 2, 4)  # ranks, experts, gate or up, inner, hidden
    assert torch.equal(torch.stack((first, second)).view(gates_and_ups.shape).float(), gates_and_ups)


def test_a_wrong_shape_of_experts_in_mxfp4_is_told_as_it_is_stored(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt_oss")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.experts.down_proj"
    for stacked in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, num_inputs, num_outputs = tensors.pop(stacked).shape
        tensors[f"{stacked}_blocks"] = torch.zeros(count, num_outputs, num_inputs // 32, 16, dtype=torch.uint8)
        tensors[f"{stacked}_scales"] = torch.zeros(count, num_outputs, num_inputs // 32, dtype=torch.uint8)
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    wrong = tensors[f"{name}_blocks"][:, :5].contiguous()
    save_file(tensors | {f"{name}_blocks": wrong}, path)
    with pytest.raises(
        ModelError, match=r"down_proj_blocks has shape \[6, 5, 3, 16\], config.json asks for \[6, 64, 3, 16\]"
    ):
        our_logits(tmp_path, random_tokens(3), torch.float32, cpu())
    del tensors[f"{name}_blocks"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"there is no tensor \S*down_proj_blocks of shape \[6, 64, 3, 16\]"):
        our_logits(tmp_path, random_tokens(3), torch.float32, cpu())
    edit_config(tmp_path, intermediate_size=80)
    with pytest.raises(ModelError, match=r"blocks of 32, but .*down_proj has 80"):
        our_logits(tmp_path, random_tokens(3), torch.float32, cpu())


def test_weights_are_converted_to_the_serving_dtype(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama")
    spec = ModelSpec.load(tmp_path)
    table = WeightTable.build(spec, torch.bfloat16)
    arena = cpu().allocate_arena(table.num_bytes)
    load_weights(tmp_path, spec, table, arena)
    assert torch.equal(table.views(arena)["lm_head"], model.lm_head.weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_readers_pieces_changes_nothing(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows and columns, of rank 1 of 2, straight into the arena or by a buffer: rows, or one row at a time."""
    save_model(tmp_path, "qwen3", sharded=True)
    spec = ModelSpec.load(tmp_path)
    table = WeightTable.build(spec, dtype, 1, 2)
    arenas = []
    for num_bytes in (weight_reader._BUFFER_BYTES, 3000, 1):
        monkeypatch.setattr(weight_reader, "_BUFFER_BYTES", num_bytes)
        arenas.append(cpu().allocate_arena(table.num_bytes).zero_())
        load_weights(tmp_path, spec, table, arenas[-1], 1, 2)
    assert arenas[0].any()
    assert torch.equal(arenas[0], arenas[1])
    assert torch.equal(arenas[0], arenas[2])


# --- the weight arena ---


@pytest.mark.parametrize("name", ["qwen3", "llama", "phi3", "olmo2", "starcoder2"])
def test_parameters_lie_apart_and_aligned(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    spec = ModelSpec.load(tmp_path)
    table = WeightTable.build(spec, torch.bfloat16)
    arena = torch.zeros(table.num_bytes, dtype=torch.uint8)
    views = table.views(arena)
    if spec.tied_embeddings:
        assert views["lm_head"].data_ptr() == views["embedding"].data_ptr()
        del views["lm_head"]
    for view in views.values():
        assert (view.data_ptr() - arena.data_ptr()) % ALIGNMENT_BYTES == 0
        assert not view.any(), "two parameters overlap"
        view.fill_(1)


def test_table_survives_the_wire_and_attaches_elsewhere(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    spec = ModelSpec.load(tmp_path)
    table = WeightTable.build(spec, torch.float32)
    arena = cpu().allocate_arena(table.num_bytes)
    load_weights(tmp_path, spec, table, arena)
    attached = msgspec.msgpack.decode(msgspec.msgpack.encode(table), type=WeightTable)
    assert attached == table
    for name, view in attached.views(arena).items():
        assert torch.equal(view, table.views(arena)[name])


@pytest.mark.parametrize(
    ("name", "tp_size", "in_place", "vocab_size", "whole_experts"),
    [
        ("qwen3", 2, True, 320, False),
        ("llama", 2, False, 321, False),
        ("qwen2", 4, True, 322, False),
        ("llama_linear_rope", 2, False, 320, False),
        ("phi3", 2, False, 320, False),
        ("olmo2", 4, False, 320, False),
        ("gemma2", 2, True, 320, False),
        ("qwen3_moe", 2, False, 320, False),
        ("qwen2_moe", 2, False, 320, False),
        ("qwen2_moe", 2, True, 320, True),
        ("glm4_moe_groups", 2, False, 320, True),
        ("glm4_moe", 2, True, 320, False),
        ("cohere2", 2, False, 320, False),
        ("gpt_oss", 2, False, 320, False),
        ("gpt_oss", 2, False, 320, True),
    ],
)
def test_ranks_together_compute_the_whole_model(
    name: str, tp_size: int, in_place: bool, vocab_size: int, whole_experts: bool, tmp_path: Path
) -> None:
    """Each rank runs in a thread. Ranks share KV heads if there are too few, and tokens of an odd vocabulary.

    With ``in_place`` all products of a rank go to one piece of memory, and the following norm sums them over the ranks.
    """
    save_model(tmp_path, name, vocab_size=vocab_size)
    spec = ModelSpec.load(tmp_path)
    token_ids = random_tokens(30)
    token_ids[:4] = torch.arange(vocab_size - 160, vocab_size, 53)
    token_ids[-1] = vocab_size - 1
    exchange: list[torch.Tensor] = [torch.empty(0)] * tp_size
    barrier = threading.Barrier(tp_size, timeout=30)
    results: list[torch.Tensor] = [torch.empty(0)] * tp_size

    def collect(rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        exchange[rank] = x
        barrier.wait()
        tensors = list(exchange)
        barrier.wait()
        return tensors

    @torch.inference_mode()
    def run(rank: int) -> None:
        place = torch.empty(30, spec.hidden_size)

        def all_reduce(x: torch.Tensor) -> torch.Tensor:
            total = torch.stack(collect(rank, x)).sum(0)
            barrier.wait()  # all ranks have read the summands
            return x.copy_(total) if x.data_ptr() == place.data_ptr() else total

        def sum_and_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            assert x.data_ptr() == place.data_ptr()
            return rms_norm(residual.add_(all_reduce(x)), weight, eps)

        parallel = TensorParallel(
            rank,
            tp_size,
            all_reduce,
            all_gather=lambda x: torch.cat(collect(rank, x), dim=-1),
            summand_place=lambda shape, dtype: place if in_place and shape == place.shape else None,
            sum_and_norm=sum_and_norm if in_place else None,
            has_whole_experts=whole_experts,
        )
        table = WeightTable.build(spec, torch.float32, rank, tp_size, whole_experts)
        arena = cpu().allocate_arena(table.num_bytes)
        load_weights(tmp_path, spec, table, arena, rank, tp_size, whole_experts)
        weights = table.views(arena)
        decoder = Decoder(spec, weights, parallel)
        num_kv_heads = max(1, spec.num_kv_heads // tp_size)
        attention = one_sequence(spec, torch.float32, cpu(), 30, num_kv_heads, weights.get("sinks"))
        results[rank] = decoder.logits(decoder.forward(token_ids, torch.arange(30), attention))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(tp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = our_logits(tmp_path, token_ids, torch.float32, cpu())
    for logits in results:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_every_tensor_goes_to_exactly_one_rank_or_to_all(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    spec = ModelSpec.load(tmp_path)
    ranks = [checkpoint_parts(spec, rank, 2) for rank in range(2)]
    for name, parts in ranks[0].items():
        for first, second in zip(parts, ranks[1][name], strict=True):
            whole = first.start == second.start == 0 and first.stop == second.stop == first.shape[first.dim]
            halves = first.start == 0 and first.stop == second.start and second.stop == first.shape[first.dim]
            assert whole or halves


def test_uneven_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(ModelError, match="num_attention_heads 4 cannot be shared evenly by 3"):
        WeightTable.build(ModelSpec.load(tmp_path), torch.float32, 0, 3)


def test_whole_experts_need_experts_that_the_ranks_can_divide(tmp_path: Path) -> None:
    save_model(tmp_path / "dense", "qwen3")
    with pytest.raises(ModelError, match="expert_parallel: Qwen3ForCausalLM has no experts"):
        WeightTable.build(ModelSpec.load(tmp_path / "dense"), torch.float32, 0, 2, has_whole_experts=True)
    save_model(tmp_path / "moe", "olmoe")
    with pytest.raises(ModelError, match="number of experts 6 cannot be shared evenly by 4"):
        WeightTable.build(ModelSpec.load(tmp_path / "moe"), torch.float32, 0, 4, has_whole_experts=True)


def test_dummy_weights_are_reproducible_and_sane(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", hidden_size=512, num_hidden_layers=2)
    spec = ModelSpec.load(tmp_path)
    table = WeightTable.build(spec, torch.bfloat16)
    arenas = [torch.zeros(table.num_bytes, dtype=torch.uint8) for _ in range(3)]
    for arena, seed in zip(arenas, (0, 0, 1), strict=True):
        fill_dummy_weights(spec, table, arena, seed)
    assert torch.equal(arenas[0], arenas[1])
    assert not torch.equal(arenas[0], arenas[2])
    views = table.views(arenas[0])
    for name, view in views.items():
        if name.endswith("norm"):
            assert (view == 1).all()
        else:
            assert view.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(views["layers.0.qkv"], views["layers.1.qkv"])


@pytest.mark.parametrize(("name", "ones"), [("gemma", 0.0), ("olmo2", 1.0), ("starcoder2", 1.0)])
def test_norms_of_dummy_weights_have_the_factor_1(name: str, ones: float, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    spec = ModelSpec.load(tmp_path)
    table = WeightTable.build(spec, torch.float32)
    arena = torch.zeros(table.num_bytes, dtype=torch.uint8)
    fill_dummy_weights(spec, table, arena, 0)
    weight, *bias = table.views(arena)["final_norm"].chunk(2 if name == "starcoder2" else 1)
    assert (weight == ones).all()
    assert not any(part.any() for part in bias)


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_dummy_routers_load_experts_by_zipfs_law(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name, num_hidden_layers=4, num_experts=32, n_routed_experts=32, num_experts_per_tok=4)
    spec = ModelSpec.load(tmp_path)
    assert spec.experts is not None
    table = WeightTable.build(spec, torch.bfloat16)
    arena = torch.zeros(table.num_bytes, dtype=torch.uint8)
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
    loads = {}
    for skew in (0.0, 0.8):
        fill_dummy_weights(spec, table, arena, 0, skew)
        views = table.views(arena)
        router = views["layers.3.router"].float()
        logits = x @ (router / router.square().mean().sqrt()).T / 8  # rows differ in length by chance, too
        _, chosen = choose_experts(logits, views.get("layers.3.router_bias"), spec.experts)
        loads[skew] = torch.bincount(chosen.flatten(), minlength=32) / len(x)
    shares = expert_shares(spec.experts, 0.8)
    assert sum(shares) == pytest.approx(4)
    assert loads[0.8].sort(descending=True).values[:16].tolist() == pytest.approx(shares[:16], rel=0.35)
    assert loads[0.0].max() < 0.5 * loads[0.8].max()


# --- refusals: the error names what is wrong ---


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"architectures": ["MixtureForCausalLM"]},
            "'MixtureFor.* not supported; .*'MixtralFor",
        ),
        ("llama", {"architectures": None, "model_type": "llima"}, "model_type 'llima' is not supported; .*llama"),
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4 is not supported for MixtralFor"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, 'quant_method "gptq"; supported are unquantised'),
        ("mistral", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM, .* but model_type is 'mistral'"),
        ("llama", {"architectures": "LlamaForCausalLM"}, 'architectures "LlamaForCausalLM" is not a list of names'),
        ("llama", {"architectures": None, "model_type": ["llama"]}, "model_type .* is not a name"),
        ("llama", {"quantization_config": "int8"}, "quantization_config must be an object"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be in 1..2147483647, or null for none, got 0"),
        ("qwen2_window", {"sliding_window": -1}, "sliding_window must be in"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("qwen2", {"layer_types": [1, 2, 3]}, "layer_types"),
        ("llama", {"dtype": 7}, "dtype 7 is not supported"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention.* not supported"),
        ("llama", {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}}, "rope_type"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters"),
        ("llama", {"hidden_act": "mish"}, 'hidden_act "mish" is not supported; supported are silu'),
        ("llama", {"head_dim": 15}, "15"),
        (
            "glm4",
            {"sliding_window": 24, "layer_types": ["sliding_attention"] * 3},
            "layer_types of Glm4ForCausalLM is not supported; all layers are of type full_attention",
        ),
        (
            "olmo3",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {
                        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False},
                        "original_max_position_embeddings": 64,
                    },
                }
            },
            "rope_parameters.full_attention: truncate false is not supported",
        ),
        ("gemma2", {"hidden_activation": "tanh"}, 'hidden_activation "tanh" is not .*gelu_pytorch_tanh'),
        ("gemma2", {"query_pre_attn_scalar": 0}, "factor or soft cap of attention must be positive"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("granite", {"residual_multiplier": float("inf")}, "factor or soft cap of residual must be"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "rotary embedding must be a list of 3"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.2}},
            "partial_rotary_factor 0.2 turns 3 of 16 dimensions",
        ),
        ("mixtral", {"num_local_experts": 30000}, "number of experts of a layer must be in 1..21845, got 30000"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "number of experts of a token must be in 1..6, got 7"),
        ("glm4_moe", {"n_group": 3, "topk_group": 1}, "8 experts are not 3 groups of 2 or more"),
        ("glm4_moe", {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "must be at most 2, which its groups"),
        ("glm4_moe", {"routed_scaling_factor": 0.0}, "factor of experts must be positive"),
        ("qwen3", {"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ("llama", {"dtype": "float64"}, "float64 is not supported; .*bfloat16"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type 'ntk' is not supported; supported are default, linear, dynamic, llama3, yarn, longrope",
        ),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}}, "low_freq_factor"),
        (
            "llama",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [2.5]},
            },
            "short_factor must have 8 numbers, got 1",
        ),
        ("phi3_long", {"rope_scaling": {"type": "longrope", "long_factor": [0.0] * 8}}, "list of positive numbers"),
        ("phi3_long", {"rope_scaling": {"type": "longrope", "short_factor": "8"}}, "list of positive numbers"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}}, "rope parameters"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -4.0}}, "must be positive"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_unsupported_configurations_are_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, name)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        ModelSpec.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_unreadable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        ModelSpec.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelSpec.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "spelling"),
    [("llama", "LLaMAForCausalLM"), ("ernie4_5", "Ernie4_5_ForCausalLM"), ("exaone_moe", "ExaoneMoEForCausalLM")],
)
def test_an_architecture_may_be_spelt_as_in_older_checkpoints(name: str, spelling: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    spec = ModelSpec.load(tmp_path)
    edit_config(tmp_path, architectures=[spelling])
    assert ModelSpec.load(tmp_path) == spec


def test_architecture_or_model_type_alone_is_enough(tmp_path: Path) -> None:
    save_model(tmp_path, "mistral")
    spec = ModelSpec.load(tmp_path)
    for key in ("model_type", "architectures"):
        document = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in document.items() if k != key}))
        assert ModelSpec.load(tmp_path) == spec
        (tmp_path / "config.json").write_text(json.dumps(document))


def test_whole_numbers_may_be_written_with_a_fraction(tmp_path: Path) -> None:
    save_model(tmp_path, "llama3_rope")
    spec = ModelSpec.load(tmp_path)
    edit_config(tmp_path, num_hidden_layers=3.0, vocab_size=320.0, rope_theta=10000, eos_token_id=2.0)
    assert ModelSpec.load(tmp_path) == spec


@pytest.mark.parametrize("name", [None, "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_weights_tell_a_dtype_that_the_configuration_leaves_open(
    name: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_model(tmp_path, "llama", dtype=dtype)
    edit_config(tmp_path, dtype=name)
    assert ModelSpec.load(tmp_path).dtype == dtype
    (tmp_path / "model.safetensors").unlink()
    assert ModelSpec.load(tmp_path).dtype == torch.float32


def test_older_config_files_mean_the_same(tmp_path: Path) -> None:
    save_model(tmp_path, "llama3_rope")
    spec = ModelSpec.load(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    scaling = document.pop("rope_parameters")
    document["rope_theta"] = scaling.pop("rope_theta")
    document["rope_scaling"] = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    document["torch_dtype"] = document.pop("dtype")
    del document["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert ModelSpec.load(tmp_path) == spec


def test_older_config_files_of_gemma_3_mean_the_same(tmp_path: Path) -> None:
    save_model(tmp_path, "gemma3")
    spec = ModelSpec.load(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["rope_parameters"], document["layer_types"]
    document |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
    document["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert ModelSpec.load(tmp_path) == spec


def load(folder: Path) -> None:
    spec = ModelSpec.load(folder)
    table = WeightTable.build(spec, torch.float32)
    load_weights(folder, spec, table, cpu().allocate_arena(table.num_bytes))


@torch.inference_mode()
def expect_transformers_logits(folder: Path) -> None:
    token_ids = random_tokens(150)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(token_ids[None]).logits[0]
    logits = our_logits(folder, token_ids, torch.float32, cpu())
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


def edit_weights(folder: Path, added: dict[str, torch.Tensor] | None = None, removed: str = "") -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.pop(removed, None)
    save_file(weights | (added or {}), path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    edit_weights(tmp_path, removed="model.layers.1.self_attn.k_proj.bias")
    with pytest.raises(ModelError, match=r"model.safetensors: .*model.layers.1.self_attn.k_proj.bias of shape \[32\]"):
        load(tmp_path)


def test_untied_model_needs_its_lm_head(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load(tmp_path)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    edit_weights(tmp_path, {"model.norm.weight": torch.zeros(63)})
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \[63\], config.json asks for \[64\]"):
        load(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    edit_weights(tmp_path, {"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"model.norm.weight is I8; supported are .*BF16"):
        load(tmp_path)


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    edit_weights(tmp_path, {"model.layers.0.self_attn.sinks": torch.zeros(4)})
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.sinks has no place in Qwen2ForCausalLM"):
        load(tmp_path)


def test_known_leftovers_are_ignored(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    edit_weights(
        tmp_path,
        {
            "lm_head.weight": torch.zeros(VOCAB_SIZE, 64),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
        },
    )
    load(tmp_path)


@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2"])
def test_layers_that_draft_tokens_stay_unread(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    num_layers = ModelSpec.load(tmp_path).num_layers
    edit_weights(tmp_path, {f"model.layers.{num_layers}.eh_proj.weight": torch.zeros(64, 128)})
    load(tmp_path)
    last = f"model.layers.{num_layers - 1}.eh_proj.weight"
    edit_weights(tmp_path, {last: torch.zeros(64, 128)})
    with pytest.raises(ModelError, match=f"{last} has no place in"):
        load(tmp_path)


def test_a_head_of_its_own_is_used_although_the_configuration_ties_it(tmp_path: Path) -> None:
    """transformers 5 ties head and embeddings only if the checkpoint has no head that differs."""
    save_model(tmp_path, "qwen3")
    head = torch.randn(VOCAB_SIZE, 64, generator=torch.Generator().manual_seed(3))
    edit_weights(tmp_path, {"lm_head.weight": head})
    assert not ModelSpec.load(tmp_path).tied_embeddings
    expect_transformers_logits(tmp_path)
    # the last element alone differs
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    embeddings[-1, -1] += 1
    edit_weights(tmp_path, {"lm_head.weight": embeddings})
    expect_transformers_logits(tmp_path)


def test_a_tied_model_may_be_saved_with_its_head_alone(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    edit_weights(tmp_path, {"lm_head.weight": embeddings}, removed="model.embed_tokens.weight")
    assert ModelSpec.load(tmp_path).tied_embeddings
    expect_transformers_logits(tmp_path)


def test_a_model_that_was_saved_by_its_base_class_is_the_same(tmp_path: Path) -> None:
    """Its names lack the prefix; transformers loads it, too."""
    save_model(tmp_path, "gemma3")
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expect_transformers_logits(tmp_path)


@pytest.mark.parametrize("first_sharded", [True, False])
def test_the_whole_file_wins_over_an_index_of_another_save(first_sharded: bool, tmp_path: Path) -> None:
    """save_pretrained leaves the files of an earlier save of another size; transformers reads model.safetensors."""
    save_model(tmp_path, "qwen3", sharded=first_sharded)
    whole = make_model("qwen3")
    with torch.no_grad():
        whole.model.norm.weight += 1
    whole.save_pretrained(tmp_path, max_shard_size="5GB" if first_sharded else "100KB")
    assert len([*tmp_path.glob("model.safetensors*")]) == 2
    expect_transformers_logits(tmp_path)
    for shard in tmp_path.glob("model-*.safetensors"):  # nor need the stale shards be there
        shard.unlink()
    expect_transformers_logits(tmp_path)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
@pytest.mark.parametrize("inner", [None, 512])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_the_original_context_may_stand_at_the_top_level(
    kind: str, inner: int | None, key: str, tmp_path: Path
) -> None:
    """There it has priority, as in transformers."""
    save_model(tmp_path, "llama3_rope")
    scaling = {"rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        scaling = {"rope_type": kind, "factor": 4.0, "beta_fast": 16}
    scaling |= {} if inner is None else {"original_max_position_embeddings": inner}
    if key == "rope_scaling":
        edit_config(tmp_path, rope_parameters=None)
    edit_config(tmp_path, rope_theta=1e4, original_max_position_embeddings=64, **{key: scaling})
    spec = ModelSpec.load(tmp_path)
    assert {rope.original_max_position_embeddings for rope in spec.ropes if rope} == {64}
    assert spec.max_position_embeddings == 1024
    expect_transformers_logits(tmp_path)
    edit_config(tmp_path, original_max_position_embeddings=None)
    rope = ModelSpec.load(tmp_path).ropes[0]
    assert rope is not None
    assert rope.original_max_position_embeddings == (inner or 1024)


@torch.inference_mode()
def test_long_and_short_contexts_have_factors_of_their_own(tmp_path: Path) -> None:
    save_model(tmp_path, "phi3_long")
    ropes = [ModelSpec.load(tmp_path, max_model_len=length).ropes[0] for length in (None, 65, 64)]
    assert [rope.pair_factors[0] for rope in ropes if rope] == [2.0, 2.0, 1.0]
    assert {rope.magnitude for rope in ropes if rope} == {(1 + math.log(1024 / 64) / math.log(64)) ** 0.5}
    edit_config(tmp_path, max_position_embeddings=64)
    token_ids = random_tokens(60)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(token_ids[None]).logits[0]
    torch.testing.assert_close(our_logits(tmp_path, token_ids, torch.float32, cpu()), expected, atol=1e-3, rtol=0)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2", sharded=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"]["model.norm.weight"]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=f"{file.name} cannot be read"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=f'index.json names "{file.name}", which is not a file'):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"neither model.safetensors nor"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attn", "flash_attn needs a CUDA device"),
        ("flashinfer", "flashinfer needs a CUDA device"),
        ("sdpaa", "no backend 'sdpaa'; did you mean 'sdpa'"),
    ],
)
def test_unavailable_attention_backends_are_refused(name: str, message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    with pytest.raises(ConfigError, match=message):
        select_attention_backend(name, ModelSpec.load(tmp_path), torch.float32, cpu())


@pytest.mark.parametrize("model", ["gemma2", "gpt_oss"])
def test_backends_that_do_not_know_a_models_scores_are_not_chosen(model: str, tmp_path: Path) -> None:
    save_model(tmp_path, model)
    spec = ModelSpec.load(tmp_path)
    for name in ("flash_attn", "flashinfer"):
        with pytest.raises(ConfigError, match=f"{name} .* a soft cap or sinks of attention scores"):
            select_attention_backend(name, spec, torch.float32, cpu())
    assert select_attention_backend("auto", spec, torch.float32, cpu()).name == "sdpa"
