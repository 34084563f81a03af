"""Text to token ids and back."""

from hbserve.tokenizer.detokenizer import IncrementalDetokenizer
from hbserve.tokenizer.tokenizer import ChatMessage, Tokenizer

__all__ = ["ChatMessage", "IncrementalDetokenizer", "Tokenizer"]
