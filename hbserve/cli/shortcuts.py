"""Flags that stand for several keys: latency targets, and the GPUs of a system.

They become values of keys, so that ``hbserve config`` shows them and a file can say the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hbserve.config.effective import Flag
from hbserve.config.validation import mode_of
from hbserve.config.yaml_file import Document
from hbserve.errors import ConfigError


@dataclass(frozen=True)
class Shortcuts:
    """The flags that were given; None for one that was not.

    Attributes:
        ttft_ms, tpot_ms: targets of requests; in mode ``semi_pd``, both together also move the split.
        no_targets: no targets for requests that have none, not even those of the machine.
        gpus: one instance on each, or on each group of ``model.tensor_parallel_size``. In mode ``disaggregated`` the
            first half of the instances prefills (of an odd number, the smaller half); mode ``auto`` chooses.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    no_targets: bool = False
    gpus: tuple[int, ...] | None = None

    def flags(self, document: Document, flags: Mapping[str, Flag]) -> dict[str, Flag]:
        """Return the values of keys that these flags stand for, beside the file and the other flags.

        Raises:
            ConfigError: naming the flag that cannot be honoured.
        """
        given = document.with_overrides({key: flag.value for key, flag in flags.items()})
        if not isinstance(given, dict):
            return {}  # no configuration, as its check says
        found = self._targets(given, flags) | self._instances(given, flags)
        for key, flag in found.items():
            if key in flags and flags[key].value != flag.value:
                raise ConfigError(f"{flag.name} and {flags[key].name} set {key} to different values; give one")
        return found

    def _targets(self, given: dict[str, Any], flags: Mapping[str, Flag]) -> dict[str, Flag]:
        targets = {"ttft": self.ttft_ms, "tpot": self.tpot_ms}
        found: dict[str, Flag] = {}
        if self.no_targets:
            if any(target is not None for target in targets.values()):
                raise ConfigError("--no-targets: a target is given; leave one of them out")
            found["scheduler.targets_by_default"] = Flag("--no-targets", False)
        for name, target in targets.items():
            if target is None:
                continue
            if f"scheduler.{name}_ms" in flags:
                raise ConfigError(f"--{name}-ms and --scheduler.{name}_ms are the same; give one")
            flag = Flag(f"--{name}-ms", target)
            found[f"scheduler.{name}_ms"] = flag
            if mode_of(given) == "semi_pd" and (None not in targets.values() or _value(given, "semi_pd", "slo")):
                found[f"semi_pd.slo.{name}_target_ms"] = flag
        return found

    def _instances(self, given: dict[str, Any], flags: Mapping[str, Flag]) -> dict[str, Flag]:
        if self.gpus is None:
            return {}
        if given.get("gpu_instances"):
            raise ConfigError("--gpus: the list gpu_instances is given, and names the GPUs; leave one out")
        size = _value(given, "model", "tensor_parallel_size") or 1
        if not isinstance(size, int) or size < 1:
            return {}  # refused later, by the name of its key
        if len(self.gpus) % size:
            raise ConfigError(
                f"--gpus: an instance has {size} GPUs (model.tensor_parallel_size); {_text(self.gpus)} do "
                "not make whole instances"
            )
        groups = [self.gpus[i : i + size] for i in range(0, len(self.gpus), size)]
        for group in groups:
            if group != tuple(range(group[0], group[0] + size)):
                raise ConfigError(
                    f"--gpus: the GPUs of an instance follow each other, {_text(group)} do not; set "
                    f"CUDA_VISIBLE_DEVICES={_text(self.gpus)} and number them from 0"
                )
        mode = mode_of(given)
        roles = _roles(mode, len(groups))
        instances = [
            {"instance_id": f"{name}-{number}", "instance_type": role, "gpu_id": group[0]}
            for (name, number, role), group in zip(roles, groups, strict=True)
        ]
        found = {"gpu_instances": Flag("--gpus", instances)}
        if mode == "auto" and "mode" not in flags:
            found["mode"] = Flag("--gpus", mode)  # else it would follow from the types of these instances
        return found


def gpu_list(text: str) -> tuple[int, ...]:
    """Read a list of GPUs such as ``0,1``, for argparse."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 5 for part in parts):
        raise argparse.ArgumentTypeError(f"must be numbers of GPUs such as 0,1, got {text!r}")
    gpus = tuple(int(part) for part in parts)
    if len(set(gpus)) < len(gpus):
        raise argparse.ArgumentTypeError(f"names a GPU twice: {text}")
    return gpus


def _roles(mode: object, number: int) -> list[tuple[str, int, str]]:
    """Return name, number and role of each instance."""
    if mode == "semi_pd":
        return [("semi", i, "semi_pd") for i in range(number)]
    if mode != "disaggregated":
        return [("unified", i, "unified") for i in range(number)]
    if number < 2:
        raise ConfigError("--gpus: mode disaggregated needs GPUs for prefill and for decode; on one, use mode semi_pd")
    num_prefill = number // 2
    prefill = [("prefill", i, "prefill") for i in range(num_prefill)]
    return prefill + [("decode", i, "decode") for i in range(number - num_prefill)]


def _value(given: dict[str, Any], section: str, name: str) -> Any:
    values = given.get(section)
    return values.get(name) if isinstance(values, dict) else None


def _text(gpus: tuple[int, ...]) -> str:
    return ",".join(map(str, gpus))
