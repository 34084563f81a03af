"""``python -m benchmarks chaos configs``: the files of configs/ with something broken, and generated files.

What must hold: a file is a configuration that reaches the system's processes unchanged, or is refused with a short
error that names the file; in time; and memory does not grow.
"""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import yaml

from benchmarks.chaos.campaign import Campaign
from benchmarks.chaos.mutations import mutate, mutate_bytes
from benchmarks.chaos.yaml_generator import random_configuration
from hbserve.config import Config, load
from hbserve.errors import ConfigError

_ROOT = Path(__file__).resolve().parents[2]
LOAD_S = 20.0
"""Processor time for one file."""
_MAX_CHARS = 4000
_MAX_GROWTH_MB = 200.0
_SHIPPED = sorted((_ROOT / "configs").glob("*.yaml"))


def make_file(chance: random.Random) -> tuple[bytes, str]:
    """Return the text of a configuration, and what is wrong with it, in words."""
    if chance.random() < 0.3:
        return random_configuration(chance).encode("utf-8", "surrogatepass"), "generated"
    path = chance.choice(_SHIPPED)
    changes = []
    data = path.read_bytes()
    if chance.random() < 0.7:
        document: Any = yaml.safe_load(data)
        if chance.random() < 0.5:  # sections of another file besides
            document = {**yaml.safe_load(chance.choice(_SHIPPED).read_bytes()), **document}
        for _ in range(chance.choice([1, 1, 2, 3])):
            document, change = mutate(document, chance)
            changes.append(change)
        data = yaml.safe_dump(document, sort_keys=False, allow_unicode=chance.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
    if not changes or chance.random() < 0.2:
        data, change = mutate_bytes(data, chance)
        changes.append(change)
    return data, f"{path.name}: {', '.join(changes)}"


class _Late(BaseException):
    pass


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def on_alarm(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGPROF, on_alarm)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(path: Path) -> tuple[str, str | None]:
    """Load a file; return ``valid`` or ``refused``, and what is wrong with that."""
    try:
        with _time_limit(LOAD_S):
            config = load(path)
    except ConfigError as error:
        text = str(error)
        if str(path) not in text:
            return "refused", f"the refusal does not name the file: {text:.300}"
        return "refused", f"the refusal has {len(text)} characters" if len(text) > _MAX_CHARS else None
    except _Late:
        return "refused", f"takes more than {LOAD_S:g} s of processor time"
    except Exception as error:
        return "refused", f"raises {error!r:.300}"
    there = msgspec.convert(msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(config))), Config)
    return "valid", None if there == config else f"{config} reaches a process as {there}"


def run(campaign: Campaign, folder: Path) -> None:
    """Run all cases; the figures are the memory of this process."""
    (folder / "model").mkdir()
    path = folder / "system.yaml"
    memory_mb = _max_memory_mb()
    for number in campaign.cases():
        data, change = make_file(campaign.chance(number))
        path.write_bytes(data)
        outcome, problem = check(path)
        campaign.counts[outcome] += 1
        if problem is not None:
            campaign.fail(number, f"{change}: {problem}")
    after_mb = _max_memory_mb()
    if after_mb > memory_mb + _MAX_GROWTH_MB:
        campaign.fail(0, f"the memory of the process has grown from {memory_mb:.0f} to {after_mb:.0f} MB")
    campaign.figures["memory_mb"] = {"before": round(memory_mb), "after": round(after_mb)}


def _max_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
