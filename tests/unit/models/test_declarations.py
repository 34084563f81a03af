"""Declarations of families against the source of transformers' classes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from hbserve.model_families import FAMILIES
from hbserve.model_spec import _CONFIG_KEYS

NO_EFFECT = {
    *("attention_dropout", "residual_dropout", "embedding_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
    *("router_jitter_noise", "initializer_range", "output_router_logits", "router_aux_loss_coef", "get_text_config"),
    *("pad_token_id", "use_cache", "_attn_implementation"),
    *("image_token_id", "mm_tokens_per_image", "text_config", "vision_config"),  # of the classes with images
}
"""Attributes of a configuration without effect on the logits of a text."""


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() & CONFIG_MAPPING.keys()))
def test_a_declaration_names_every_key_that_its_class_reads(name: str) -> None:
    """A key that no declaration names stays unread, so the model would silently be computed otherwise."""
    family = FAMILIES[name]
    config_class = CONFIG_MAPPING[name]
    path = Path(inspect.getfile(config_class))
    source = path.with_name(path.name.replace("configuration", "modeling")).read_text()
    read = {*re.findall(r"config\.(\w+)", source), *re.findall(r"config, \"(\w+)\"", source)}
    known = {*_CONFIG_KEYS, *family.config_keys}
    assert not read - known - NO_EFFECT
    aliases = getattr(config_class, "attribute_map", {})
    assert not {alias for alias, key in aliases.items() if key in known} - known
