"""Classes with an encoder of images, whose text part is served.

Their ``config.json`` has the text model's keys under ``text_config`` (older ones among the others), and their
checkpoints have its tensors beside those of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TEXT_PARTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text"),
        "llava": ("LlavaForConditionalGeneration", "llama"),
        "mistral3": ("Mistral3ForConditionalGeneration", "mistral"),
        "qwen2_vl": ("Qwen2VLForConditionalGeneration", "qwen2_vl_text"),
        "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text"),
        "qwen3_vl": ("Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    }
)
"""By transformers' ``model_type``, the class name, and the ``model_type`` of a ``text_config`` that names none."""

_ENCODERS = ("vision_tower.", "multi_modal_projector.", "visual.")
_BASE = {"embed_tokens", "layers", "norm", "lm_head"}
_TEXT, _NEW_TEXT = "language_model.", "model.language_model."


def text_document(document: dict[str, Any]) -> dict[str, Any]:
    """Return what ``config.json`` says of the text part; other documents as they are.

    Keys that the part leaves out, or that are null there, are the whole model's, such as the dtype. What is null in
    both is null: no class's default stands for it. The LM head is the whole model's, so either may tie it.
    """
    model_type, architectures, part = (document.get(key) for key in ("model_type", "architectures", "text_config"))
    names = architectures if isinstance(architectures, list) else []
    found = [
        text_type
        for name, (architecture, text_type) in TEXT_PARTS.items()
        if (model_type is None or model_type == name) and (not names or names[0] == architecture)
    ]
    if not found or (model_type is None and not names) or not isinstance(part, dict | None):
        return document
    whole = {key: value for key, value in document.items() if key not in ("architectures", "text_config")}
    given = {key: value for key, value in (part or {}).items() if key != "architectures"}
    given = {key: whole.get(key) if value is None else value for key, value in given.items()}
    if whole.get("tie_word_embeddings"):
        given["tie_word_embeddings"] = True
    return whole | {"model_type": found[0]} | given


def text_tensors(names: list[str]) -> dict[str, str]:
    """Return the text part's tensors: for each name in a checkpoint the one that the text model's own class gives it.

    Published checkpoints begin all names of the part with ``language_model.``; transformers 5 writes
    ``model.language_model.``, but not before the LM head. Qwen's have ``visual.`` before those of the encoder only.
    A model that was saved without a class for a task, such as ``Qwen3Model``, has names without ``model.``.
    """
    if {name.partition(".")[0] for name in names} <= _BASE:
        return {name: name if name.startswith("lm_head.") else f"model.{name}" for name in names}
    if not any(name.startswith((_TEXT, _NEW_TEXT, "visual.")) for name in names):
        return {name: name for name in names}
    return {name: text_name(name) for name in names if not name.removeprefix("model.").startswith(_ENCODERS)}


def text_name(name: str) -> str:
    """Return the name that the text model's own class gives a tensor or module of a checkpoint."""
    return f"model.{name.removeprefix(_NEW_TEXT)}" if name.startswith(_NEW_TEXT) else name.removeprefix(_TEXT)


def stored_names(name: str) -> tuple[str, ...]:
    """Return the names that a module of the text part may have in a checkpoint; `text_name` turns them back."""
    return name, f"{_TEXT}{name}", f"{_NEW_TEXT}{name.removeprefix('model.')}"
