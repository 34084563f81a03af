"""GGUF files become what transformers reads in them: weights, configuration, tokenizer and chat template."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbserve.cache_folder import CACHE_VARIABLE
from hbserve.errors import ModelError
from hbserve.model_spec import ModelSpec
from hbserve.model_store import fetch_model
from hbserve.model_store.gguf_process import convert
from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.gguf_files import bpe_metadata, sentencepiece_metadata, write_gguf
from tests.support.k_quants import K_QUANTS
from tests.support.model_zoo import VOCAB_SIZE, make_model
from tests.support.plan_driver import Driver
from tests.unit.engine.test_model_runner import make_runner, transformers_greedy

Kind = gguf.GGMLQuantizationType
TEXTS = ["the cat sat on the mat", "It's 12345 + 6 = ?\n\n  x", "héllo 你好 🙂", "<|im_start|>user\nhi<|im_end|>"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES: dict[str, tuple[str, Kind, dict[str, Any]]] = {
    "llama": ("llama_linear_rope", Kind.Q4_1, {"num_key_value_heads": 2}),
    "llama3": ("llama3_rope", Kind.F16, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "llama_bias": ("llama", Kind.F32, {}),
    "mistral": ("mistral_full", Kind.Q5_0, {"head_dim": 16}),
    "qwen2": ("qwen2", Kind.Q8_0, {}),
    "qwen3": ("qwen3", Kind.BF16, {"head_dim": 128}),
    "qwen3_head32": ("qwen3", Kind.F16, {}),
}
MISREAD = ("llama_bias", "qwen3_head32")
"""Files that transformers reads without biases, or with a wrong size of heads."""
MAX_ERRORS = {
    Kind.Q2_K: 0.4,
    Kind.Q3_K: 0.25,
    Kind.Q4_K: 0.1,
    Kind.Q5_K: 0.05,
    Kind.Q6_K: 0.04,
    Kind.Q4_1: 0.1,
    Kind.Q8_0: 0.01,
}
"""Root mean square errors of the weights, in standard deviations of the weights."""
STRETCHED = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer"))
    template = {"tokenizer.chat_template": tiny_tokenizers.CHAT_TEMPLATE}
    return bpe_metadata(folder, "qwen2", 341, **{"tokenizer.ggml.eos_token_id": 2}, **template)


def rounded(tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return a tensor as it is after quantisation, which the file has for matrices only."""
    if tensor.ndim == 1:
        return tensor
    return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind).astype("float32"))


@pytest.mark.parametrize("name", CASES)
def test_every_family_has_the_weights_and_numbers_of_its_file(
    name: str, tmp_path: Path, vocabulary: dict[str, Any]
) -> None:
    zoo_name, kind, changes = CASES[name]
    model = make_model(zoo_name, vocab_size=341, **changes)
    stretched = STRETCHED if name == "llama" else {}
    path = write_gguf(tmp_path / "model.gguf", model, kind, vocabulary, **stretched)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(path, folder, keep_float32=True)
    weights = load_file(folder / "model.safetensors")
    if name not in MISREAD:
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        theirs = read.state_dict()
        assert all(torch.equal(weights[key], theirs[key]) for key in weights)
    expected = {key: rounded(value, kind) for key, value in model.state_dict().items()}
    assert set(expected) - set(weights) <= {"lm_head.weight"}
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    model.save_pretrained(tmp_path / "original")
    spec, original = ModelSpec.load(folder), ModelSpec.load(tmp_path / "original")
    if name == "mistral":  # which GGUF calls llama
        original = replace(original, architecture=spec.architecture)
    assert replace(spec, norm_eps=original.norm_eps) == original
    assert spec.norm_eps == pytest.approx(original.norm_eps, rel=1e-6)


def test_a_file_that_mixes_quantisations_gives_the_tokens_that_transformers_gives(
    tmp_path: Path, vocabulary: dict[str, Any]
) -> None:
    """As the files that people have: llama.cpp's Q4_K_M mixes Q4_K and Q6_K."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    model = make_model("llama", vocab_size=341, attention_bias=False, mlp_bias=False, **sizes)
    kinds = (*K_QUANTS, Kind.Q4_1, Kind.Q8_0)
    write_gguf(tmp_path / "model.gguf", model, kinds, vocabulary)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(tmp_path / "model.gguf", folder, keep_float32=True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    theirs, ours, original = read.state_dict(), load_file(folder / "model.safetensors"), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    matrices = [name for name, weights in original.items() if weights.ndim == 2]
    assert len(matrices) >= 2 * len(kinds)
    for name, kind in zip(matrices, itertools.cycle(kinds), strict=False):
        error = (ours[name] - original[name]).square().mean().sqrt() / original[name].std()
        assert error < MAX_ERRORS[kind], f"{name} in {kind.name}"
    prompt = list(range(60, 100))
    driver = Driver(make_runner(folder))
    assert driver.run(driver.add(prompt, 16)) == [transformers_greedy(read, prompt, 16)]


def test_a_served_file_has_its_tokenizer_and_is_converted_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: dict[str, Any]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    model = make_model("qwen3", vocab_size=341)
    path = write_gguf(tmp_path / "tiny.gguf", model, Kind.Q8_0, vocabulary)
    folder = fetch_model(str(path))
    assert folder == fetch_model(str(path))
    assert ModelSpec.load(folder).dtype == torch.bfloat16
    own = Tokenizer(folder)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in TEXTS:
        assert own.encode(text) == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": "hi"}]
    assert own.encode_chat(chat) == own.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"tiny\.gguf: it is not a whole GGUF file") as caught:
        fetch_model(str(path))
    assert "Traceback" not in str(caught.value)


def test_a_sentencepiece_vocabulary_begins_prompts_as_transformers_does(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", make_model("llama"), Kind.F32, sentencepiece_metadata(VOCAB_SIZE))
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(path, folder, keep_float32=False)
    own = Tokenizer(folder)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert own.encode(text) == theirs(text)["input_ids"]
    assert own.encode("the cat")[0] == 1


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, vocabulary: dict[str, Any]) -> None:
    model = make_model("qwen2", vocab_size=341)
    split = vocabulary | {"tokenizer.ggml.pre": "unheard-of"}
    cases = [
        (split, {}, "splits words by the rule 'unheard-of'"),
        (vocabulary, {"rope__scaling__type": "longrope"}, "kind 'longrope' is not supported"),
        (vocabulary | {"split.count": 3}, {}, "one part of several"),
    ]
    for tokenizer, metadata, message in cases:
        path = write_gguf(tmp_path / "model.gguf", model, Kind.F32, tokenizer, **metadata)
        with pytest.raises(ModelError, match=message):
            convert(path, tmp_path, keep_float32=False)
