"""A draft model that does not fit is refused, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hbserve.config import from_dict
from hbserve.engine.draft_model.arenas import DraftPart
from hbserve.errors import ConfigError
from hbserve.layers.parallel import TensorParallel
from hbserve.model_spec import ModelSpec
from hbserve.platform import make_platform
from tests.support.model_zoo import VOCAB_SIZE, save_head, save_model


def tokenizer(folder: Path, vocabulary: dict[str, int], added: dict[str, int]) -> None:
    tokens = [{"content": content, "id": number} for content, number in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": tokens}))


def test_what_cannot_draft_is_refused(tmp_path: Path) -> None:
    target, draft = tmp_path / "target", tmp_path / "draft"
    save_model(target, "qwen3")

    def load(
        draft: Path = draft, method: str = "draft_model", sizes: tuple[int, ...] = (1,), **model: Any
    ) -> DraftPart | None:
        instances = [
            {"instance_id": str(size), "instance_type": role, "tensor_parallel_size": size}
            for size, role in zip(sizes, ("prefill", "decode") if len(sizes) > 1 else ("unified",), strict=True)
        ]
        document = {
            "model": {"path": str(target), "device": "cpu", **model},
            "speculation": {"method": method, "model": str(draft)},
            "gpu_instances": instances,
        }
        platform = make_platform("cpu", 0, 1, 1)
        return DraftPart.load(from_dict(document), ModelSpec.load(target), 16, platform, TensorParallel())

    save_model(draft, "llama", max_position_embeddings=512)
    assert load() is not None
    with pytest.raises(ConfigError, match=r"speculation\.model: .* takes 512 tokens, fewer than .*max_model_len: 600"):
        load(max_model_len=600)
    tokenizer(target, {"a": 0, "b": 1}, {"<end>": 2})
    assert load() is not None  # it has no tokenizer that could differ
    tokenizer(draft, {"b": 1, "a": 0}, {"<end>": 2})
    assert load() is not None
    tokenizer(draft, {"a": 0, "b": 1}, {"<end>": 3})
    with pytest.raises(ConfigError, match=r"another vocabulary than .*: token '<end>' is 2 and 3"):
        load()
    save_head(tmp_path / "head")
    with pytest.raises(ConfigError, match=r"instances of one size, and they have \[1, 2\] ranks"):
        load(draft=tmp_path / "head", method="eagle3", sizes=(1, 2))
    with pytest.raises(ConfigError, match=r"head is an EAGLE-3 head; set speculation\.method: eagle3"):
        load(draft=tmp_path / "head")
    with pytest.raises(ConfigError, match=r"speculation\.model: .*Llama.* is no EAGLE-3 head; a model is for method"):
        load(method="eagle3")
    save_model(draft, "llama", vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(ConfigError, match="it has 321 tokens, and the model has 320"):
        load()


@pytest.mark.parametrize(
    ("speculation", "what"),
    [
        ({"method": "draft_model"}, r"speculation\.model: name the draft model's folder"),
        ({"method": "ngram", "model": "."}, "has no effect with method ngram; choose draft_model, eagle3 or auto"),
        ({"method": "eagle3"}, r"speculation\.model: name the head's folder"),
        ({"method": "draft_model", "model": "nowhere"}, r"speculation\.model: there is no folder 'nowhere'"),
    ],
)
def test_a_draft_model_and_its_method_belong_together(speculation: dict[str, str], what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=what):
        from_dict({"model": {"path": str(tmp_path)}, "speculation": speculation})
