"""An EAGLE-3 head guesses what a plain computation of it guesses, and what is no head for the model is refused."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hbserve.engine.noise import gumbel_noise
from hbserve.errors import ModelError
from hbserve.messages.worker import TO_BE_DRAFTED
from hbserve.model_spec import ModelSpec
from hbserve.models.eagle3_spec import Eagle3Spec
from hbserve.sampling_params import SamplingParams
from tests.support.model_zoo import HEAD_TAPS, VOCAB_SIZE, save_head, save_model
from tests.support.paths import ROOT
from tests.support.plan_driver import GREEDY, Driver, Sequence
from tests.unit.engine.test_model_runner import make_prompt, make_runner

HEAD_DIM, THETA = 16, 10000.0
DEMO = ROOT / "examples" / "models" / "hbserve-demo"


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def rotate(x: Tensor) -> Tensor:
    """Rotate ``[tokens, heads, head dim]`` by the places of the tokens."""
    angles = torch.arange(len(x))[:, None] / THETA ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@torch.no_grad()
def guess(
    model: PreTrainedModel,
    head: dict[str, Tensor],
    tokens: list[int],
    count: int,
    norm_first: bool,
    sampling: SamplingParams = GREEDY,
    start: int = 0,
) -> list[int]:
    """The guesses of a head, each from a pass over all; it reads from position ``start`` on."""
    hidden = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    layer = {name.removeprefix("midlayer."): tensor for name, tensor in head.items()}
    features = torch.cat([hidden[index][0] for index in HEAD_TAPS], -1)[start:] @ head["fc.weight"].T
    embedding, inputs = model.get_input_embeddings().weight, tokens[start + 1 :]
    guesses: list[int] = []
    for _ in range(count):
        normed = norm(features, layer["hidden_norm.weight"])
        residual = normed if norm_first else features
        x = torch.cat([norm(embedding[inputs], layer["input_layernorm.weight"]), normed], -1)
        q, k, v = (
            (x @ layer[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, HEAD_DIM)) for name in ("q", "k", "v")
        )
        q, k, v = (part.transpose(0, 1) for part in (rotate(q), rotate(k), v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        residual = residual + attended.transpose(0, 1).flatten(1) @ layer["self_attn.o_proj.weight"].T
        x = norm(residual, layer["post_attention_layernorm.weight"])
        inner = F.silu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)
        residual = residual + inner @ layer["mlp.down_proj.weight"].T
        scores = norm(residual[-1], head["norm.weight"]) @ head["lm_head.weight"].T
        token_ids = torch.arange(len(scores)) + head["d2t"]
        if sampling.temperature:
            seed, place = torch.tensor([sampling.seed]), torch.tensor([len(tokens) + len(guesses)])
            scores = scores / sampling.temperature + gumbel_noise(seed, place, VOCAB_SIZE)[0, token_ids]
        guesses.append(int(token_ids[scores.argmax()]))
        inputs, features = [*inputs, guesses[-1]], torch.cat([features, residual[-1:]])
    return guesses


@pytest.mark.parametrize(("target", "norm_first"), [("qwen3", False), ("llama", True)])
def test_guesses_are_those_of_a_plain_computation(target: str, norm_first: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", target)
    head = save_head(tmp_path / "head", norm_before_residual=norm_first)
    runner = make_runner(tmp_path / "model", draft_model=str(tmp_path / "head"), method="eagle3")
    lengths, rng = (3, 16, 31, 33), random.Random(2)
    kinds = [GREEDY, SamplingParams(temperature=1.0, seed=7, max_tokens=None)] * 2

    def add_all(driver: Driver) -> list[Sequence]:
        pairs = zip(lengths, kinds, strict=True)
        return [driver.add(make_prompt(n), 20, slot, sampling=kind) for slot, (n, kind) in enumerate(pairs)]

    plain = Driver(runner, chunk=16)
    outputs = plain.run(*add_all(plain))

    def draft(sequence: Sequence, limit: int) -> list[int]:
        return [TO_BE_DRAFTED] * min(rng.choice((0, 1, 2, 5)), limit)

    driver = Driver(runner, chunk=16, drafter=draft, rereads=True)
    assert driver.run(*add_all(driver)) == outputs
    assert len(driver.guesses) > 15
    for slot, tokens, guesses in driver.guesses:
        assert guesses == guess(model, head, tokens, len(guesses), norm_first, kinds[slot])


def load_head(folder: Path, spec: ModelSpec) -> Eagle3Spec:
    head = Eagle3Spec.load(folder, spec)
    table = head.table(torch.float32, 0, 1)
    head.load_weights(folder, table, torch.empty(table.num_bytes, dtype=torch.uint8), 0, 1)
    return head


def test_the_script_trains_a_head_that_can_be_loaded(tmp_path: Path) -> None:
    options = {"model": DEMO, "output": tmp_path, "sequences": 36, "tokens": 6, "batch": 2, "passes": 2, "seconds": 0.2}
    flags = [text for name, value in (options | {"draft-vocab": 64}).items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "scripts/train_eagle3.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "acceptance of guess 1 to 5" in done.stdout
    head = load_head(tmp_path, ModelSpec.load(DEMO))
    assert head.draft_vocab_size == 64
    assert head.has_token_map


def test_what_is_no_head_for_the_model_is_refused(tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "head"
    save_model(target, "llama")
    spec = ModelSpec.load(target)

    def load(tensors: dict[str, Tensor] | None = None, **config: Any) -> Eagle3Spec:
        saved = save_head(folder, **config)
        if tensors is not None:
            save_file({name: x for name, x in (saved | tensors).items() if x.numel()}, folder / "model.safetensors")
        return load_head(folder, spec)

    assert load().tapped_layers == (0, 1, 2)
    nested: dict[str, Any] = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}}
    assert load(**nested).tapped_layers == (1, 2, 2)  # these are layers whose outputs it reads
    own = load({"embed_tokens.weight": torch.zeros(VOCAB_SIZE, 64)})
    assert own.has_embedding
    none, refused = torch.empty(0), []
    for case in (
        {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None},
        {"vocab_size": 500},
        {"num_hidden_layers": 2},
        {"target_hidden_size": 128},
        {"hidden_size": 32},
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        {"eagle_aux_hidden_state_layer_ids": [1, 2]},
        {"draft_vocab_size": 1000},
        {"fc_norm": True},
        {"tensors": {"fc.weight": none}},
        {"tensors": {"fc.weight": torch.zeros(64, 64)}},
        {"tensors": {"midlayer.self_attn.q_norm.weight": torch.ones(16)}},
        {"tensors": {"d2t": torch.full((200,), 200)}},
        {"tensors": {"d2t": none}},
    ):
        with pytest.raises(ModelError) as error:
            load(**case)
        refused.append(str(error.value).removeprefix(str(folder)))
    assert [text.split(": ", 1)[1] for text in refused] == [
        'architectures ["LlamaForCausalLM"] is no EAGLE-3 head; a model is for method draft_model',
        "it is for another model: vocab_size is 500, and the model has 320",
        "heads of 2 layers are not supported, only 1",
        "it is for another model: target_hidden_size is 128, and the model has 64",
        "hidden_size 32 is not 64, so it cannot share the model's embedding, and has no embed_tokens.weight",
        "the head reads inputs of layers [1, 2, 3], and the model has 3",
        "eagle_aux_hidden_state_layer_ids must be 3 layers, got [1, 2]",
        "draft_vocab_size must be in 1..320, got 1000",
        "fc_norm true is not supported",
        "there is no tensor fc.weight of shape [64, 192]",
        "tensor fc.weight has shape [64, 64], config.json asks for [64, 192]",
        "tensor midlayer.self_attn.q_norm.weight has no place in an EAGLE-3 head as config.json has it",
        "d2t names tokens that are not in 0..319",
        "there is no tensor d2t of shape [200]",
    ]
