"""Declarations of families against the source of transformers' classes."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from hbserve.errors import ModelError
from hbserve.model_families import BY_ARCHITECTURE, FAMILIES
from hbserve.model_spec import _CONFIG_KEYS, ModelSpec

NO_EFFECT = {
    *("attention_dropout", "residual_dropout", "embedding_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
    *("router_jitter_noise", "initializer_range", "output_router_logits", "router_aux_loss_coef", "get_text_config"),
    *("pad_token_id", "use_cache", "_attn_implementation"),
    *("image_token_id", "mm_tokens_per_image", "text_config", "vision_config"),  # of the classes with images
    *("video_token_id", "depth", "embed_dim", "in_channels", "mlp_ratio", "num_heads", "out_hidden_size", "patch_size"),
    *("spatial_merge_size", "temporal_patch_size", "fullatt_block_indexes", "window_size"),
    *("deepstack_visual_indexes", "num_position_embeddings"),
    *("dtype", "enable_moe_fp32_combine"),  # of roundings
}
"""Attributes of a configuration without effect on the logits of a text."""


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() & CONFIG_MAPPING.keys()))
def test_a_declaration_names_every_key_that_its_class_reads(name: str) -> None:
    """A key that no declaration names stays unread, so the model would silently be computed otherwise."""
    family = FAMILIES[name]
    config_class = CONFIG_MAPPING[name]
    code = name if family.saved_as is None else BY_ARCHITECTURE[family.saved_as].model_type
    path = Path(inspect.getfile(CONFIG_MAPPING[code]))
    source = path.with_name(path.name.replace("configuration", "modeling")).read_text()
    read = {*re.findall(r"config\.(\w+)", source), *re.findall(r"config, \"(\w+)\"", source)}
    if name == "granitemoehybrid":  # experts and Mamba layers are refused
        read -= {key for key in read if key.startswith("mamba_")} | {"num_experts_per_tok", "time_step_limit"}
    known = {*_CONFIG_KEYS, *family.config_keys}
    assert not read - known - NO_EFFECT
    aliases = getattr(config_class, "attribute_map", {})
    assert not {alias for alias, key in aliases.items() if key in known} - known


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() & CONFIG_MAPPING.keys()))
def test_a_key_without_a_usable_value_is_refused(name: str, tmp_path: Path) -> None:
    """What a declaration computes with a value may fail in any way; null and 0 are the likeliest mistakes."""
    document = CONFIG_MAPPING[name]().to_dict()
    for key in FAMILIES[name].keys:
        for value in (None, 0) if key.startswith(("moe", "mlp", "first", "logits")) else (None,):
            (tmp_path / "config.json").write_text(json.dumps(document | {key: value}))
            with contextlib.suppress(ModelError):
                ModelSpec.load(tmp_path)


def test_a_class_that_the_installed_transformers_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.delitem(CONFIG_MAPPING._mapping, "llama")
    with pytest.raises(ModelError, match="installed transformers does not know model_type 'llama'; use a later one"):
        ModelSpec.load(tmp_path)
