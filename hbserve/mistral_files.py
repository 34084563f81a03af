"""Tokenizers of folders in Mistral's own layout: ``tekken.json``, or a SentencePiece ``tokenizer.model`` alone.

Both become a tokenizer of the `tokenizers` library, which everything else here works with. Prompts begin with the
model's begin token, as in mistral-common. `hbserve.tokenizer_files` calls this.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hbserve.errors import ModelError
from hbserve.model_files import is_there, read_bytes, read_json, read_text, reason_of, shown

INSTALL = "pip install 'hbserve[mistral]'"

_OLD_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Special tokens of a tekken.json that does not list them (mistral-common: ``DEPRECATED_SPECIAL_TOKENS``)."""

_MAX_SPECIAL_TOKENS = 100_000
_MISTRALS = ("mistral", "mixtral", "ministral", "pixtral", "voxtral")
_FIRST_WITH = {"[SYSTEM_PROMPT]": "v7", "[IMG]": "v3", "[INST]": "v2"}
"""Versions of Mistral's tokenizer by a special token that they are the first to have, the newest first."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, and what its files say beside it.

    Attributes:
        hf: transformers' ``PreTrainedTokenizerFast``.
        adds_space: whether a text begins with a space that the tokenizer adds.
        no_template: why there is no chat template.
    """

    hf: Any
    adds_space: bool = False
    no_template: str = ""


def find_mistral_file(folder: Path) -> Path | None:
    """Find a tokenizer in Mistral's layout; None if the folder has another one, or says how its file is to be read."""
    if any(is_there(folder / name) for name in ("tokenizer.json", "vocab.json")):
        return None
    if is_there(folder / "tekken.json"):
        return folder / "tekken.json"
    if is_there(folder / "tokenizer_config.json"):
        return None
    # The name of a file with a version tells which chat template belongs to it.
    return next(iter([*sorted(folder.glob("tokenizer.model.v*")), *folder.glob("tokenizer.model")]), None)


def load_mistral_file(path: Path, model_type: str | None) -> LoadedTokenizer:
    """Load a result of `find_mistral_file`.

    Args:
        model_type: what config.json says of the model.

    Raises:
        ModelError: the file cannot be read, or a library that it needs is missing.
    """
    from transformers import PreTrainedTokenizerFast

    adds_space = False
    try:
        if path.name == "tekken.json":
            backend, bos, eos = _tekken(path)
        else:
            backend, bos, eos, adds_space = _sentence_piece(path)
    except ModelError:
        raise
    except Exception as error:  # the file may hold anything, and the libraries raise bare Exception
        raise ModelError(
            f"{path} is not a tokenizer that can be read: {type(error).__name__}: {reason_of(error)}"
        ) from None
    template, problem = _chat_template(path, backend, model_type)
    hf = PreTrainedTokenizerFast(tokenizer_object=_Given(backend), bos_token=bos, eos_token=eos, chat_template=template)
    return LoadedTokenizer(hf, adds_space, problem)


class _Given:
    """A tokenizer that transformers uses as it is: it would copy one by writing it as JSON and reading that again."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def __deepcopy__(self, _: Any) -> Tokenizer:
        return self._backend


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
    words = [_byte_text(base64.b64decode(entry["token_bytes"], validate=True)) for entry in entries]
    vocab = {word: num_special + rank for rank, word in enumerate(words)}
    merges = [pair for word in words for pair in _splits(word, vocab)]
    vocab |= {text: rank for rank, text in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, special)
    return _begun(tokenizer, "<s>"), "<s>", "</s>"


def _splits(word: str, vocab: Container[str]) -> list[tuple[str, str]]:
    """List the pairs of tokens that make a word, the longest first token first.

    The libraries give all pairs of one word the same rank, and merge the leftmost. `tokenizers` gives each pair a rank
    of its own. In a run of equal letters the leftmost pair is the one whose first token is longer.
    """
    return [
        (first, second)
        for end in range(len(word) - 1, 0, -1)
        if (first := word[:end]) in vocab and (second := word[end:]) in vocab
    ]


def _sentence_piece(path: Path) -> tuple[Tokenizer, str, str, bool]:
    """Convert SentencePiece BPE: the scores of the pieces are the order of merges.

    The space that SentencePiece puts before a text is not part of the tokenizer here, which would put one after each
    special token too.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ModelError(f"{path} needs the package sentencepiece: {INSTALL}") from None
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(read_bytes(path))
    size = processor.GetPieceSize()
    pieces = [processor.IdToPiece(token_id) for token_id in range(size)]
    scores = [processor.GetScore(token_id) for token_id in range(size)]
    special = [token_id for token_id in range(size) if processor.IsControl(token_id) or processor.IsUnknown(token_id)]
    if not all(score.is_integer() for score in scores):
        raise ModelError(
            f"{path} is a SentencePiece model of type unigram; only BPE is read. Convert it to tokenizer.json"
        )
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    mergeable = {
        piece: token_id
        for piece, token_id in vocab.items()
        if not (processor.IsControl(token_id) or processor.IsUnknown(token_id) or processor.IsByte(token_id))
    }
    by_score = sorted(mergeable, key=lambda piece: -scores[mergeable[piece]])
    merges = [pair for piece in by_score for pair in _splits(piece, mergeable)]
    unknown, bos, eos = (processor.IdToPiece(token_id) for token_id in _ids(processor, path))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    adds_space = processor.EncodeAsPieces("a")[0].startswith("▁")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special(tokenizer, [pieces[token_id] for token_id in special])
    return _begun(tokenizer, bos), bos, eos, adds_space


def _ids(processor: Any, path: Path) -> tuple[int, int, int]:
    ids = processor.unk_id(), processor.bos_id(), processor.eos_id()
    if min(ids) < 0:
        raise ModelError(f"{path} has no unknown, begin or end token")
    return ids


def _byte_text(token: bytes) -> str:
    return token.decode("latin-1").translate(_BYTE_ALPHABET)


def _byte_alphabet() -> dict[int, str]:
    """Map bytes to the letters of byte-level BPE, see `hbserve.tokenizer.text_decoder`."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _add_special(tokenizer: Tokenizer, texts: list[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])


def _begun(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """Let prompts begin with the model's begin token."""
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def _chat_template(path: Path, tokenizer: Tokenizer, model_type: str | None) -> tuple[str | None, str]:
    """Find the chat template: a file of the folder, or what mistral-common makes of the tokenizer's file.

    Returns:
        The template, or None and why there is none.
    """
    jinja, plain = path.with_name("chat_template.jinja"), path.with_name("chat_template.json")
    if is_there(jinja):
        return read_text(jinja), ""
    if is_there(plain):
        template = read_json(plain).get("chat_template")
        return (template, "") if isinstance(template, str) else (None, f"{plain} has none that is text")
    if path.name != "tekken.json" and model_type is not None and not model_type.startswith(_MISTRALS):
        return None, f"a {model_type} model needs a file chat_template.jinja"
    try:
        from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    except ImportError:
        return None, f"{path.name} needs the package mistral-common for one: {INSTALL}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            return str(convert_tokenizer_to_chat_template(_as_mistral_common_reads(path, tokenizer, Path(folder)))), ""
    except Exception as error:  # it does not know the version of the file
        return None, f"mistral-common makes none of {path.name}: {reason_of(error)}"


def _as_mistral_common_reads(path: Path, tokenizer: Tokenizer, folder: Path) -> Path:
    """Return the file with its version in its name, and without the words, which no template needs.

    mistral-common takes a second to read the words of a tekken.json.
    """
    if path.name == "tekken.json":
        document = read_json(path)
        config, vocab = document["config"], document["vocab"][:256]
        sizes = {"default_vocab_size": len(vocab) + config["default_num_special_tokens"]}
        short = document | {"vocab": vocab, "config": config | sizes}
        copy = folder / path.name
        copy.write_text(json.dumps(short), encoding="utf-8")
        return copy
    if path.name != "tokenizer.model":
        return path
    version = next((version for text, version in _FIRST_WITH.items() if tokenizer.token_to_id(text) is not None), "v1")
    copy = folder / f"{path.name}.{version}"
    copy.symlink_to(path.absolute())
    return copy
