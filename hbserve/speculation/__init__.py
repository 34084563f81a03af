"""Speculative decoding that never changes a token: drafts of the next tokens, and how many of them are worth a try.

The scheduler makes drafts, because it owns every token; a worker verifies them in one step and keeps no state of them.
All of this is pure: no clock, no tensor. docs/speculation.md tells the whole story.
"""

from hbserve.speculation.drafters import Drafter, GrammarDrafter, ModelDrafter, NgramDrafter, PredictionDrafter
from hbserve.speculation.speculator import Draft, Speculation, Speculator
from hbserve.speculation.suffixes import SuffixDrafter

DRAFTERS = (
    *(drafter.name for drafter in (GrammarDrafter, PredictionDrafter, SuffixDrafter, NgramDrafter)),
    *ModelDrafter.names,
)
"""Names of all drafters."""

__all__ = [
    "DRAFTERS",
    "Draft",
    "Drafter",
    "GrammarDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "PredictionDrafter",
    "Speculation",
    "Speculator",
    "SuffixDrafter",
]
