"""Marks that parts of an output have: calls of tools, reasoning, and channels. They are shown even if they are special.

Without its marks a call, or reasoning, would look like other text.
"""

from __future__ import annotations

from collections.abc import Set

_SHOWN = frozenset(
    {
        *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool_call>", "</tool_call>", "<|python_tag|>"),
        *("<think>", "</think>", "[THINK]", "[/THINK]"),
    }
)
_OF_CHANNELS = frozenset({"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"})
"""gpt-oss writes its output as several messages, each on a channel. Other models use some of these names otherwise."""


def shown_marks(added: Set[str]) -> Set[str]:
    """Return the texts of those of a tokenizer's added tokens that are shown in every text."""
    return added & _SHOWN | (_OF_CHANNELS if added >= _OF_CHANNELS else frozenset())
