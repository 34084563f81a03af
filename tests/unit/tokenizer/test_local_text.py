"""The text service of programs that embed the engine: one grammar does not stall or end them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hbserve.errors import InvalidRequestError
from hbserve.grammar import json_schema
from hbserve.grammar_process import parent
from hbserve.tokenizer import Tokenizer
from hbserve.tokenizer.text_service import LocalText
from tests.support import tiny_tokenizers

pytest.importorskip("llguidance")

DEADLINE_S = 60.0


async def test_a_grammar_whose_check_takes_too_long_is_refused_and_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "MAX_WORK_CPU_S", 0.5)
    monkeypatch.setattr(parent, "_LOOK_S", 0.1)
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path))
    text, size = LocalText(tokenizer), tokenizer.vocab_size
    patterns = {f"^p{number}.*x{number}$": {"type": "integer"} for number in range(1500)}  # compared pair by pair
    costly = json_schema({"type": "object", "patternProperties": patterns, "additionalProperties": False})
    async with asyncio.timeout(DEADLINE_S):
        assert await text.check_grammar("start: /a/", size) == "start: /a/"
        attack = asyncio.create_task(text.check_grammar(costly, size))
        with pytest.raises(InvalidRequestError, match="too complex") as caught:
            await attack
        assert caught.value.param == "grammar"
        assert await text.check_output("start: /b/", size, tokenizer.encode("b")) is None
        assert "ends before" in (await text.check_output("start: /bb/", size, tokenizer.encode("b")) or "")
        with pytest.raises(InvalidRequestError, match="cannot be followed"):
            await text.check_grammar("start: (", size)


async def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match="structured output needs a tokenizer"):
        await LocalText(Tokenizer(tmp_path)).check_grammar("start: /a/", 100)
