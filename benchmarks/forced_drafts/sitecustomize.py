"""Forces what drafts, and how often a draft model is right, in processes whose PYTHONPATH has this folder.

For `benchmarks.speculation`.

Random weights of two models agree on nothing. So the draft model computes all its guesses, and then each is replaced:
by the request's own token with the wanted probability, else by another one. Python imports a module of this name at
its start. The file that ``HBSERVE_FORCED_DRAFTS`` names has the wanted ``acceptance``, ``prompt_tokens``, and
``outputs``, by seed. New requests have those drafters alone that ``drafters`` names, if it is there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import random
import sys
from types import ModuleType
from typing import Any

_FILE = os.environ.get("HBSERVE_FORCED_DRAFTS", "")


def _read(known: dict[str, Any]) -> None:
    """Read the file again if it has changed."""
    changed = os.stat(_FILE).st_mtime_ns
    if changed != known["changed"]:
        with open(_FILE) as file:
            known.update(json.load(file), changed=changed)


def _force_drafters(module: ModuleType) -> None:
    original = module.Speculation.begin
    known: dict[str, Any] = {"changed": 0}

    def begin(*args: Any, **options: Any) -> Any:
        speculator = original(*args, **options)
        _read(known)
        if speculator is None or known.get("drafters") is None:
            return speculator
        speculator._drafters = [one for one in speculator._drafters if one[0].name in known["drafters"]]
        return speculator if speculator._drafters else None

    module.Speculation.begin = begin


def _force_guesses(module: ModuleType) -> None:
    original = module.ModelDrafter.with_guesses
    known: dict[str, Any] = {"changed": 0}
    rng = random.Random(0)

    def with_guesses(self: Any, drafting: Any, vocab_size: int) -> Any:
        rows = drafting.rows
        filled, drafted = original(self, drafting, vocab_size)
        asked = [place for place, row in enumerate(rows) if row.num_to_draft]
        if not asked:
            return filled, drafted
        _read(known)
        guesses = []
        for place in asked:
            row = rows[place]
            output = known["outputs"].get(str(int(self._table.seeds[row.slot])), [])
            begin = row.start + 1 - known["prompt_tokens"]
            right = [*output[begin : begin + row.num_drafts], *[0] * row.num_drafts][: row.num_drafts]
            forced = [token if rng.random() < known["acceptance"] else (token + 1) % vocab_size for token in right]
            filled[place] = module._with_guesses(filled[place], forced)
            guesses += forced
        return filled, drafted._replace(token_ids=guesses)

    module.ModelDrafter.with_guesses = with_guesses


_FORCED = {
    "hbserve.engine.draft_model.drafter": _force_guesses,
    "hbserve.speculation.speculator": _force_drafters,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _FORCED[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in _FORCED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _FILE:
    sys.meta_path.insert(0, _Finder())
