"""Text to token ids and back. The API server, its text processes and embedding programs use it."""

from hbserve.tokenizer.detokenizer import IncrementalDetokenizer
from hbserve.tokenizer.tokenizer import ChatMessage, Tokenizer, leave_out_torch

__all__ = ["ChatMessage", "IncrementalDetokenizer", "Tokenizer", "leave_out_torch"]
