"""A grammar process in which some grammars misbehave, by the text that they begin with.

``slow``: masks wait until the file ``ODD_GRAMMARS_FILE`` exists, and each adds a letter to the file of that name with
``.begun``; ``hang``: the mask never ends; ``die``: it ends the process; ``grow``: it takes more memory than there is.
The budget of CPU time is small.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from hbserve.grammar import Matcher, Vocabulary
from hbserve.grammar_process import worker

_follow, _mask = Vocabulary.follow, Matcher.mask


def _noted(self: Vocabulary, grammar: str, end_token_ids: list[int]) -> Matcher:
    matcher = _follow(self, grammar, end_token_ids)
    matcher.oddity = grammar.removeprefix('start: "').partition('"')[0]  # type: ignore[attr-defined]
    return matcher


def _odd_mask(self: Matcher) -> Any:
    oddity = self.oddity  # type: ignore[attr-defined]
    file = Path(os.environ["ODD_GRAMMARS_FILE"])
    if oddity == "slow":
        with file.with_suffix(".begun").open("a") as begun:
            begun.write("x")
        while not file.exists():
            time.sleep(0.005)
    elif oddity == "hang":
        while True:
            time.sleep(60)
    elif oddity == "die":
        os._exit(3)
    elif oddity == "grow":
        bytearray(3 << 30)
    return _mask(self)


if __name__ == "__main__":
    Vocabulary.follow, Matcher.mask = _noted, _odd_mask  # type: ignore[method-assign, assignment]
    worker._CPU_S_AT_START, worker._CPU_S_PER_TOKEN = 0.2, 0.0
    worker.main()
