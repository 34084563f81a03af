"""Tokenizers of folders in Mistral's own layout: ``tekken.json``, or a SentencePiece ``tokenizer.model`` alone.

Both become a tokenizer of the `tokenizers` library, which everything else here works with. Prompts begin with the
model's begin token, as in mistral-common.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hbserve.errors import ModelError
from hbserve.model_files import is_there, read_json, shown

INSTALL = "pip install 'hbserve[mistral]'"

_OLD_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Special tokens of a tekken.json that does not list them (mistral-common: ``DEPRECATED_SPECIAL_TOKENS``)."""

_MAX_SPECIAL_TOKENS = 100_000


def find_mistral_file(folder: Path) -> Path | None:
    """Find a tokenizer in Mistral's layout; None if the folder has another one, or says how its file is to be read."""
    if any(is_there(folder / name) for name in ("tokenizer.json", "vocab.json")):
        return None
    if is_there(folder / "tekken.json"):
        return folder / "tekken.json"
    if is_there(folder / "tokenizer_config.json"):
        return None
    return next(iter([*folder.glob("tokenizer.model"), *sorted(folder.glob("tokenizer.model.v*"))]), None)


def load_mistral_file(path: Path) -> Any:
    """Load a result of `find_mistral_file` as transformers' ``PreTrainedTokenizerFast``.

    Raises:
        ModelError: the file cannot be read, or a library that it needs is missing.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        backend, bos, eos = _tekken(path) if path.name == "tekken.json" else _sentence_piece(path)
    except ModelError:
        raise
    except Exception as error:  # the file may hold anything, and the libraries raise bare Exception
        raise ModelError(f"{path} is not a tokenizer that can be read: {type(error).__name__}: {error}") from None
    template = _chat_template(path)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)


def _tekken(path: Path) -> tuple[Tokenizer, str, str]:
    """Convert byte-level BPE in tiktoken's form: ranks are both token ids and the order of merges."""
    document = read_json(path)
    config = document["config"]
    listed = document.get("special_tokens") or [
        {"rank": rank, "token_str": text} for rank, text in enumerate(_OLD_SPECIAL_TOKENS)
    ]
    num_special = int(config.get("default_num_special_tokens", len(listed)))
    if not len(listed) <= num_special <= _MAX_SPECIAL_TOKENS:
        raise ModelError(f"{path}: default_num_special_tokens {shown(num_special)} does not fit {len(listed)} tokens")
    special = [f"<SPECIAL_{rank}>" for rank in range(num_special)]
    for token in listed:
        special[token["rank"]] = token["token_str"]
    size = config.get("default_vocab_size")
    entries = document["vocab"] if size is None else document["vocab"][: size - num_special]
    ranks = {base64.b64decode(entry["token_bytes"], validate=True): rank for rank, entry in enumerate(entries)}
    text_of = {token: _byte_text(token) for token in ranks}
    vocab = {text_of[token]: num_special + rank for token, rank in ranks.items()}
    vocab |= {text: rank for rank, text in enumerate(special)}
    merges = []
    for token in ranks:  # in the order of ranks
        splits = [(token[:end], token[end:]) for end in range(1, len(token))]
        found = [split for split in splits if split[0] in ranks and split[1] in ranks]
        found.sort(key=lambda split: (ranks[split[0]], ranks[split[1]]))
        merges += [(text_of[first], text_of[second]) for first, second in found]
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, special)
    return _begun(tokenizer, "<s>"), "<s>", "</s>"


def _sentence_piece(path: Path) -> tuple[Tokenizer, str, str]:
    """Convert SentencePiece BPE: the scores of the pieces are the order of merges."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ModelError(f"{path} needs the package sentencepiece: {INSTALL}") from None
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(path.read_bytes())
    size = processor.GetPieceSize()
    pieces = [processor.IdToPiece(token_id) for token_id in range(size)]
    scores = [processor.GetScore(token_id) for token_id in range(size)]
    special = [token_id for token_id in range(size) if processor.IsControl(token_id) or processor.IsUnknown(token_id)]
    if not all(score.is_integer() for score in scores):
        raise ModelError(
            f"{path} is a SentencePiece model of type unigram; only BPE is read. Convert it to tokenizer.json"
        )
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = []
    mergeable = {
        piece: token_id
        for piece, token_id in vocab.items()
        if not (processor.IsControl(token_id) or processor.IsUnknown(token_id) or processor.IsByte(token_id))
    }
    for piece, token_id in mergeable.items():
        for end in range(1, len(piece)):
            first, second = piece[:end], piece[end:]
            if first in mergeable and second in mergeable:
                merges.append((-scores[token_id], vocab[first], vocab[second], (first, second)))
    merges.sort()
    unknown, bos, eos = (processor.IdToPiece(token_id) for token_id in _ids(processor, path))
    ordered = [pair for *_, pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab, ordered, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    starts_with_space = processor.EncodeAsPieces("a")[0].startswith("▁")
    steps = [normalizers.Prepend("▁")] if starts_with_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if starts_with_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special(tokenizer, [pieces[token_id] for token_id in special])
    return _begun(tokenizer, bos), bos, eos


def _ids(processor: Any, path: Path) -> tuple[int, int, int]:
    ids = processor.unk_id(), processor.bos_id(), processor.eos_id()
    if min(ids) < 0:
        raise ModelError(f"{path} has no unknown, begin or end token")
    return ids


def _byte_text(token: bytes) -> str:
    return "".join(map(_BYTE_ALPHABET.__getitem__, token))


def _byte_alphabet() -> dict[int, str]:
    """Map bytes to the letters of byte-level BPE, see `hbserve.tokenizer.text_decoder`."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_BYTE_ALPHABET: Mapping[int, str] = _byte_alphabet()


def _add_special(tokenizer: Tokenizer, texts: list[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])


def _begun(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """Let prompts begin with the model's begin token."""
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def _chat_template(path: Path) -> str | None:
    """Find the chat template: a file of the folder, or what mistral-common makes of the tokenizer's file."""
    jinja, plain = path.with_name("chat_template.jinja"), path.with_name("chat_template.json")
    if is_there(jinja):
        return jinja.read_text(encoding="utf-8")
    if is_there(plain):
        template = read_json(plain).get("chat_template")
        return template if isinstance(template, str) else None
    try:
        from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    except ImportError:
        return None
    try:
        template = convert_tokenizer_to_chat_template(path)
    except Exception:  # it does not know the version of the file
        return None
    return template if isinstance(template, str) else None
