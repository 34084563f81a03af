"""The text part of checkpoints with an encoder of images. Their logits are among those of test_models.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from hbserve.errors import ModelError
from hbserve.model_families.with_images import TEXT_PARTS, text_document, text_tensors
from hbserve.model_spec import ModelSpec


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_tensors_have_the_names_of_the_text_models_own_class(stored: str, name: str) -> None:
    encoder = ["vision_tower.patch.weight", "model.vision_tower.patch.weight", "multi_modal_projector.norm.weight"]
    renamed = text_tensors([*encoder, "model.language_model.norm.weight", stored])
    assert renamed == {"model.language_model.norm.weight": "model.norm.weight", stored: name}


def test_without_a_text_part_no_tensor_is_left_out() -> None:
    names = ["model.norm.weight", "vision_tower.patch.weight"]
    assert text_tensors(names) == dict(zip(names, names, strict=True))


@pytest.mark.parametrize("model_type", TEXT_PARTS)
def test_a_text_part_without_a_type_has_that_of_its_class(model_type: str, tmp_path: Path) -> None:
    architecture, text_type = TEXT_PARTS[model_type]
    default = type(CONFIG_MAPPING[model_type]().get_text_config()).model_type
    assert text_type == default
    text = {"num_hidden_layers": 3, "architectures": ["Other"], "torch_dtype": None}
    for named in ({"model_type": model_type}, {"architectures": [architecture]}):
        (tmp_path / "config.json").write_text(json.dumps({**named, "text_config": text, "torch_dtype": "float16"}))
        spec = ModelSpec.load(tmp_path)
        assert (spec.family.model_type, spec.num_layers, str(spec.dtype)) == (text_type, 3, "torch.float16")


def test_null_in_a_text_part_is_no_default() -> None:
    """Mistral Small 3.1 has no sliding window, and transformers' default is one of 4096 tokens."""
    text = {"sliding_window": None, "rope_theta": None}
    document = {"model_type": "mistral3", "text_config": text, "rope_theta": 5.0}
    assert text_document(document) == {"model_type": "mistral", "sliding_window": None, "rope_theta": 5.0}


def test_the_whole_model_may_tie_the_head_of_its_text_part() -> None:
    """transformers writes both keys, and the head of these classes lies outside of the text part."""
    document = {"model_type": "mistral3", "text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}
    assert text_document(document)["tie_word_embeddings"] is True


def test_a_text_part_of_an_unknown_type_is_refused_by_name(tmp_path: Path) -> None:
    document = {"model_type": "llava", "text_config": {"model_type": "opt"}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="model_type 'opt' is not supported"):
        ModelSpec.load(tmp_path)


def test_other_documents_stay_as_they_are() -> None:
    for document in ({"text_config": {"hidden_size": 1}}, {"model_type": "gemma3", "text_config": 3}, {}):
        assert text_document(document) is document
