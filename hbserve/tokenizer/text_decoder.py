"""Token ids to text, one at a time, holding back what is not yet a whole character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Set
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding shows for bytes that are not UTF-8
MAX_HELD_TOKENS = 32  # of text that ends in replacement characters; a character has 4 bytes at most

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")

BytesOfPiece = Callable[[str], bytes]


def bytes_of_piece(decoder: Mapping[str, Any]) -> BytesOfPiece | None:
    """How a vocabulary writes the bytes of its tokens.

    Args:
        decoder: its ``decoder`` in tokenizer.json.

    Returns:
        A function from an entry of the vocabulary to its bytes; None where there is none, as the text of a token
        depends on its neighbours. That SentencePiece drops a space before a whole text is no such dependence:
        an output goes on from its prompt.
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
    """The alphabet of byte-level BPE (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters stand for themselves, the other bytes for characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of_char = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def convert(piece: str) -> bytes:
        try:
            return bytes(byte_of_char[char] for char in piece)
        except KeyError:  # an added token is written as it is
            return piece.encode()

    return convert


def _sentence_piece(space: str, has_byte_pieces: bool) -> BytesOfPiece:
    """Text with a sign for spaces, and perhaps ``<0xE4>`` for bytes (Kudo and Richardson 2018)."""

    def convert(piece: str) -> bytes:
        if has_byte_pieces and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return (piece.replace(space, " ") if space else piece).encode()

    return convert


class TextDecoder(Protocol):
    """Turns a sequence of token ids into text."""

    def feed(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""

    def flush(self) -> str:
        """What was held back, at the end of the sequence; incomplete characters as U+FFFD."""


class ByteDecoder:
    """For vocabularies whose tokens are byte strings: exact, and constant work per token.

    Args:
        token_bytes: the bytes that a token stands for; empty for tokens that are not shown.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any other vocabulary, where a token's text depends on its neighbours.

    Decodes a window that begins with the tokens of the last text that was given out, which are the
    left context of the new ones, and gives out what comes after that text. Trailing replacement
    characters are held back, as the next token may complete the character; after `MAX_HELD_TOKENS`
    they are taken to be meant.

    Args:
        decode: a list of token ids to text.
        hidden: tokens that are not shown; they would only make the window longer.
    """

    def __init__(self, decode: Callable[[list[int]], str], hidden: Set[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._window: list[int] = []
        self._num_context = 0  # first tokens of the window, whose text is out
        self._num_out = 0  # characters of the window's text that are out

    def feed(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._num_context < MAX_HELD_TOKENS:
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        return self._give_out(self._decode(self._window))

    def _give_out(self, text: str) -> str:
        new = text[self._num_out :]
        if new:
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._num_out = len(self._decode(self._window))
        return new
