"""The plan of a running system: what it is now, what it was, and changes of it while it serves.

Runs in the event loop of the process that started the system. Where a system in mode ``auto`` has several instances,
their roles are looked at anew when the load has changed:

    every _INTERVAL_S: window of the real load ──► changed? ──► simulation of each candidate in a child process
        ──► one gains more than the predictions are off, twice in a row ──► roles change, one instance after the other

A change of a role stops no stream (`hbserve.scheduler.drains`). Everything else of a plan stays until the next start.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Any, Literal, NamedTuple

import msgspec

from hbserve.config import Config, InstanceRole
from hbserve.errors import HBServeError, InvalidRequestError
from hbserve.frontend.engine_client import EngineClient
from hbserve.messages.admin import LoadEntry
from hbserve.messages.prediction import CandidatePrediction
from hbserve.platform import mps
from hbserve.policy.profile_store import ProfileKey, find_profile
from hbserve.process.events import OnEvent
from hbserve.system.auto_plan import (
    Plan,
    PlanChange,
    Predict,
    PredictionProcess,
    candidates_of,
    error_of,
    orders_of,
    prediction_row,
)

logger = logging.getLogger(__name__)

_INTERVAL_S = 30.0
_WINDOW_S = 120.0
_MIN_REQUESTS = 50
"""A load of fewer requests says too little."""
_MAX_REQUESTS = 300
_CHANGE_OF_LOAD = 0.25
"""Relative change of a number of the load that is worth another simulation."""
_COOLDOWN_S = 300.0
_MAX_CHANGES = 50
_DEADLINE_S = 120.0
_SYSTEM = re.compile(r"unified\*(?P<n>[1-9]\d?)|(?P<x>[1-9]\d?)p(?P<y>[1-9]\d?)d")
_PLAIN = (InstanceRole.UNIFIED, InstanceRole.PREFILL, InstanceRole.DECODE)


class LoadSummary(NamedTuple):
    """A load in four numbers; the rate is in requests per second, the others are means of a request."""

    rate: float
    prompt_tokens: float
    cached_tokens: float
    output_tokens: float

    @staticmethod
    def of(load: list[LoadEntry]) -> LoadSummary:
        """Summarise a load of at least two requests."""
        span_s = max(1e-3, load[-1].arrival_s - load[0].arrival_s)
        count = len(load)
        return LoadSummary(
            (count - 1) / span_s,
            sum(entry.prompt_tokens for entry in load) / count,
            sum(entry.cached_tokens for entry in load) / count,
            sum(entry.output_tokens for entry in load) / count,
        )

    def is_like(self, other: LoadSummary) -> bool:
        """Whether no number has changed by more than a quarter."""
        least = LoadSummary(0.0, 0.0, 0.1 * self.prompt_tokens, 0.0)  # few cached tokens more or less change nothing
        return all(
            abs(own - others) <= _CHANGE_OF_LOAD * max(own, others, floor)
            for own, others, floor in zip(self, other, least, strict=True)
        )


class RunningPlan:
    """Owner of the plan of a running system.

    Args:
        config: of the system as it was started.
        predict: returns predictions; called in a thread. Default: a child process makes them.

    Attributes:
        plan: as it is now.
    """

    def __init__(
        self, config: Config, plan: Plan, client: EngineClient, on_event: OnEvent, predict: Predict | None = None
    ) -> None:
        self.plan = plan
        self._config, self._client, self._on_event, self._predict = config, client, on_event, predict
        self._changing = asyncio.Lock()
        self._judged: LoadSummary | None = None
        self._wanted: str | None = None
        self._next_change_at = 0.0

    @property
    def can_change(self) -> bool:
        """Whether there are several instances whose roles can change."""
        roles = [InstanceRole(role) for role in self.plan.instances.values()]
        return len(roles) > 1 and all(role in _PLAIN for role in roles)

    async def watch(self) -> None:
        """Look at the load again and again; ends only by cancellation."""
        while True:
            self.prepare()
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.look(time.monotonic())
            except HBServeError as error:
                logger.warning("the plan stays as it is: %s", error)
            except Exception:  # a bug here must not end a system that serves
                logger.exception("the load is not looked at any more")
                return

    def prepare(self) -> None:
        """Have the links opened that the other systems need which `look` may choose; open ones stay as they are."""
        roles = {name: InstanceRole(role) for name, role in self.plan.instances.items()}
        for system in candidates_of(len(roles), self.plan.targets):
            self._client.prepare_roles(roles_of(system, roles))

    async def look(self, now: float) -> None:
        """Judge the plan by the load of the last two minutes, and change it if another one is better, twice in a row.

        Args:
            now: seconds, on any clock.
        """
        load = (await self._client.recent_load(_WINDOW_S))[-_MAX_REQUESTS:]
        current = await self._system()
        if len(load) < _MIN_REQUESTS or current is None:
            return
        summary = LoadSummary.of(load)
        if self._wanted is None and self._judged is not None and summary.is_like(self._judged):
            return
        predictions, is_measured = await asyncio.to_thread(self._simulate, load)
        self._judged = summary
        best, why = choose_again(predictions, current, is_measured)
        rows = [prediction_row(p) for p in sorted(predictions, key=lambda p: p.mean, reverse=True)]
        numbers = {name: round(number, 3) for name, number in summary._asdict().items()}
        self.plan = msgspec.structs.replace(
            self.plan, load={**numbers, "requests": len(load), "predictions": rows, "why": why}
        )
        if best == current:
            self._wanted = None
        elif best != self._wanted:
            self._wanted = best  # once more, to be sure that the load stays
        elif now >= self._next_change_at:
            self._wanted, self._next_change_at = None, now + _COOLDOWN_S
            await self._change(best, "auto", why, rows, _DEADLINE_S)

    async def change_to(self, system: str, deadline_s: float = _DEADLINE_S) -> Plan:
        """Change the roles of the instances to those of a system, because an operator asks for it.

        Args:
            system: ``unified*N``, or ``XpYd``, of as many instances as there are.

        Returns:
            The new plan.

        Raises:
            InvalidRequestError: if the system is none of these, or an instance cannot change; saying why. Instances
                that have changed already keep their new roles.
            EngineDeadError: if the scheduler does not answer.
        """
        await self._change(system, "operator", "an operator has asked for it", [], deadline_s)
        return self.plan

    def _simulate(self, load: list[LoadEntry]) -> tuple[list[CandidatePrediction], bool]:
        """Return the predictions, and whether they rest on measured step times."""
        config, targets = self._config, self.plan.targets
        gpus = mps.gpus()
        found = find_profile(ProfileKey.of(config.model, config.kv_cache, gpus[0] if gpus else "cpu"))
        first = load[0].arrival_s
        load = [msgspec.structs.replace(entry, arrival_s=entry.arrival_s - first) for entry in load]
        orders = orders_of(config, found, targets, candidates_of(len(self.plan.instances), targets), load)
        return (self._predict or PredictionProcess())(orders), found.is_measured

    def update(self, stats: dict[str, Any]) -> Plan:
        """Bring roles and mode up to date, which other commands than those for a plan may have changed.

        Args:
            stats: the scheduler's, as `EngineClient.stats` returns them.
        """
        instances = self.plan.instances | {name: role.value for name, role in self._roles_in(stats).items()}
        mode = self.plan.mode
        if mode != "semi_pd":
            mode = "disaggregated" if InstanceRole.PREFILL in instances.values() else "unified"
        if (instances, mode) != (self.plan.instances, self.plan.mode):
            self.plan = msgspec.structs.replace(self.plan, instances=instances, mode=mode)
        return self.plan

    def _roles_in(self, stats: dict[str, Any]) -> dict[str, InstanceRole]:
        """Return the roles of the plan's instances that are ready."""
        instances = stats["gpu_instances"]
        return {
            name: InstanceRole(instances[name]["role"])
            for name in self.plan.instances
            if instances.get(name, {}).get("status") == "ready"
        }

    async def _roles(self) -> dict[str, InstanceRole]:
        """Return the roles of the plan's instances that are ready, as they are now."""
        stats = await self._client.stats()
        self.update(stats)
        return self._roles_in(stats)

    async def _system(self) -> str | None:
        """Return the present system by its name; None: it has none, or an instance is missing."""
        roles = await self._roles()
        return name_of(list(roles.values())) if len(roles) == len(self.plan.instances) else None

    async def _change(
        self, system: str, by: Literal["auto", "operator"], why: str, rows: list[dict[str, Any]], deadline_s: float
    ) -> None:
        async with self._changing:
            began = time.monotonic()
            roles = await self._roles()
            before = name_of(list(roles.values())) or "a mix of roles"
            wanted = roles_of(system, roles)
            try:
                for name, role in wanted.items():
                    if role is not roles[name]:
                        await self._client.set_role(name, role, deadline_s)
            finally:
                await self._roles()
            if before == system:
                return
            change = PlanChange(
                at=round(time.time(), 3),
                seconds=round(time.monotonic() - began, 3),
                by=by,
                before=before,
                after=system,
                why=why,
                predictions=rows,
            )
            changes = [*self.plan.changes, change][-_MAX_CHANGES:]
            self.plan = msgspec.structs.replace(self.plan, why=why, changes=changes)
            self._on_event("plan", "the system", f"{before} to {system} in {change.seconds:.2f} s: {why}")


def name_of(roles: list[InstanceRole]) -> str | None:
    """Return the name of a system with these roles; None: it has none."""
    num_prefill, num_decode = roles.count(InstanceRole.PREFILL), roles.count(InstanceRole.DECODE)
    if roles and set(roles) == {InstanceRole.UNIFIED}:
        return f"unified*{len(roles)}"
    return f"{num_prefill}p{num_decode}d" if num_prefill and num_prefill + num_decode == len(roles) > 1 else None


def roles_of(system: str, roles: dict[str, InstanceRole]) -> dict[str, InstanceRole]:
    """Return the roles of a system's instances, in the order in which they change; as few as possible change.

    Args:
        roles: the present ones, by instance.

    Raises:
        InvalidRequestError: if the name is none of a system of as many instances.
    """
    match, count = _SYSTEM.fullmatch(system), len(roles)
    example = f"unified*{count}" + (f" or {count // 2}p{count - count // 2}d" if count > 1 else "")
    if match is None:
        raise InvalidRequestError(f"system must be unified*N or XpYd, such as {example}; got {system!r:.60}", "system")
    num_prefill, num_decode = int(match["x"] or 0), int(match["y"] or 0)
    if (num_prefill + num_decode or int(match["n"])) != count:
        what = f"{count} instances are ready, so it must be of {count}, such as {example}"
        raise InvalidRequestError(f"system {system}: {what}", "system")
    if not num_prefill:
        return dict.fromkeys(roles, InstanceRole.UNIFIED)
    # Prefill first: an instance that decodes finishes that, while one that is unified still takes new requests.
    order = [InstanceRole.PREFILL, InstanceRole.UNIFIED, InstanceRole.DECODE]
    names = sorted(roles, key=lambda name: order.index(roles[name]))
    chosen = dict.fromkeys(names[:num_prefill], InstanceRole.PREFILL)
    chosen |= dict.fromkeys(names[num_prefill:], InstanceRole.DECODE)
    # Where no instance is unified, one that changes from decode to prefill must not be waited for by the others.
    return dict(sorted(chosen.items(), key=lambda item: item[1] is not InstanceRole.PREFILL))


def choose_again(predictions: list[CandidatePrediction], current: str, is_measured: bool) -> tuple[str, str]:
    """Return the best system for a load, and why.

    It is the present one, unless another gains more than predictions are off.

    Args:
        is_measured: the predictions rest on step times of this model on this kind of GPU.
    """
    means = {prediction.system: prediction.mean for prediction in predictions}
    if current not in means:
        return current, "there are no predictions"
    least = means[current]
    rivals = {name: mean - least for name, mean in means.items() if name != current}
    if not rivals:
        return current, f"{current} is the only candidate"
    best = max(rivals, key=lambda name: rivals[name])
    needed = max(error_of(best), error_of(current))
    text = f"under the load of the last {_WINDOW_S:g} s {current} is predicted to serve {100 * least:.1f} % within the "
    text += f"targets, and {best} {100 * means[best]:.1f} %; a change must gain more than {100 * needed:.1f} points"
    if rivals[best] > needed and not is_measured:
        return current, f"{text}, with step times that were measured; these are a guess"
    return (best if rivals[best] > needed else current), text
