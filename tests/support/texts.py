"""Texts that tokenizers find hard: languages, emoji, code, white space, signs of the libraries, rare characters."""

from __future__ import annotations

from tests.support.paths import ROOT

TEXTS = [
    "",
    " ",
    "Hello wörld",
    "  two  spaces\n你好 ☃🙂",
    " lead",
    "end  ",
    "def f(a):\n    return  a\n\n\tb",
    "émigré ñandú 12,345.67 don't I'LL",
    "é decomposed: e\u0301; ﬁ ½ m²",
    "🙂🙃👩‍👩‍👧‍👦🇫🇷",
    "Столица России — это",
    "日本の首都は東京です。",
    "عاصمة مصر هي القاهرة",
    "한국의 수도는 서울",
    "हिन्दी ภาษาไทย தமிழ் ქართული Ελληνικά İstanbul ǅ ẞ",
    "\x00\x01\u200b\ufeff\u2028",
    "ℝ𝔸𝕏 \U0010ffff \ue000 ꙮ",
    "1234567890 1e-7 0x1F",
    "\r\n\r\n\t\t \n",
    "▁x ▁▁ Ġ Ċ",
    "<0x41><0xE4>",
    " " * 200,
    "a" * 100 + "\n" * 50 + "-" * 75 + " \n" * 40,
    (ROOT / "docs" / "sampling.md").read_text()[:8000],
    (ROOT / "hbserve" / "grammar" / "vocabulary.py").read_text()[:4000],
]
