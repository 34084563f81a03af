"""Text to token ids and back. The API server, its text processes and embedding programs use it."""

from hbserve.tokenizer.detokenizer import IncrementalDetokenizer
from hbserve.tokenizer.tokenizer import ChatMessage, Tokenizer

__all__ = ["ChatMessage", "IncrementalDetokenizer", "Tokenizer"]
