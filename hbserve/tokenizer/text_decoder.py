"""Decoders from token ids to text, one token at a time; an incomplete character is held back."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Set
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # shown for bytes that are not UTF-8
MAX_HELD_TOKENS = 32  # whose text ends in replacement characters; a character has at most 4 bytes

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")

BytesOfPiece = Callable[[str], bytes]


def bytes_of_piece(decoder: Mapping[str, Any]) -> BytesOfPiece | None:
    """Find how a vocabulary writes the bytes of its tokens.

    Args:
        decoder: the ``decoder`` in tokenizer.json.

    Returns:
        A function from an entry of the vocabulary to its bytes; None if the text of a token depends on its
        neighbours. SentencePiece drops a space before a whole text, but this does not count: an output continues
        its prompt.
    """
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    space, has_byte_pieces, is_byte_level = "", False, False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                is_byte_level = True
            case {"type": "Metaspace", "replacement": str(space)}:
                pass
            case {"type": "Replace", "pattern": {"String": str(space)}, "content": " "}:
                pass
            case {"type": "ByteFallback"}:
                has_byte_pieces = True
            case {"type": "Fuse"} | {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
                pass
            case _:
                return None
    if is_byte_level:
        return None if space or has_byte_pieces else _byte_level()
    return _sentence_piece(space, has_byte_pieces)


def _byte_level() -> BytesOfPiece:
    """Convert from the alphabet of byte-level BPE (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters stand for themselves; characters from U+0100 on stand for the other bytes.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of_char = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def convert(piece: str) -> bytes:
        try:
            return bytes(byte_of_char[char] for char in piece)
        except KeyError:  # an added token is plain text
            return piece.encode()

    return convert


def _sentence_piece(space: str, has_byte_pieces: bool) -> BytesOfPiece:
    """Convert from text with a sign for spaces, and maybe ``<0xE4>`` for bytes (Kudo and Richardson 2018)."""

    def convert(piece: str) -> bytes:
        if has_byte_pieces and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return (piece.replace(space, " ") if space else piece).encode()

    return convert


class TextDecoder(Protocol):
    """A decoder of one sequence of token ids."""

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes; it may be empty."""

    def flush(self) -> str:
        """Return the text held back until the end of the sequence; an incomplete character becomes U+FFFD."""


class ByteDecoder:
    """A decoder for vocabularies whose tokens are byte strings: exact, with constant work per token.

    Args:
        token_bytes: function from a token to its bytes; empty for tokens that are not shown.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """A decoder for all other vocabularies, where a token's text depends on its neighbours.

    ::

        window:   [ tokens of the last output text | new tokens ]
                    left context                     their text is output

    Replacement characters at the end are held back, because the next token may complete the character. After
    `MAX_HELD_TOKENS` tokens they are taken as part of the text.

    Args:
        decode: function from token ids to text.
        hidden: tokens that are not shown; they stay out of the window.
    """

    def __init__(self, decode: Callable[[list[int]], str], hidden: Set[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._window: list[int] = []
        self._num_context_tokens = 0  # at the start of the window, with their text already output
        self._num_output_chars = 0  # of the window's text

    def feed(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._num_context_tokens < MAX_HELD_TOKENS:
            return ""
        return self._output(text)

    def flush(self) -> str:
        return self._output(self._decode(self._window))

    def _output(self, text: str) -> str:
        new = text[self._num_output_chars :]
        if new:
            del self._window[: self._num_context_tokens]
            self._num_context_tokens = len(self._window)
            self._num_output_chars = len(self._decode(self._window))
        return new
