"""Mode ``auto``: which system to start on this machine, and the latency targets of requests that have none.

Runs in the process that starts a system, before anything else is started. The simulator's predictions come from a
child process (`hbserve.simulate.prediction`).

The choice, in order:

1. On the CPU, and where Ray places the instances: one unified worker.
2. On GPUs: as many GPUs for an instance as the weights need (`hbserve.system.rank_count`), and as many replicas of a
   unified worker as there is room for, unless another candidate is predicted to serve more requests of the standard
   loads within the targets, by more than its own predictions have been wrong (`PREDICTION_ERRORS`). Candidates on one
   GPU are the SLO controller; on several, prefill and decode on GPUs of their own.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from hbserve.config import Config, InstanceConfig, InstanceRole, from_dict
from hbserve.config.validation import default_instances
from hbserve.messages.admin import LoadEntry
from hbserve.messages.prediction import CandidatePrediction, PredictionOrders
from hbserve.platform import mps
from hbserve.policy.profile_file import LearntProfile, profiled_predictor
from hbserve.policy.profile_store import FoundProfile, ProfileKey, ProfileOrigin, find_profile
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.process.parent import ChildProcess
from hbserve.system.rank_count import num_ranks_needed

logger = logging.getLogger(__name__)

TTFT_MULTIPLE = 7.5
TPOT_MULTIPLE = 10.0
TPOTS_BEFORE_FIRST_TOKEN = 2.0
"""The default targets. TPOT: so many times a lone request's decode step. TTFT: so many times a lone request's prompt,
by its length, and so many TPOT targets: a prompt waits for the step under way, and its own step has others in it."""
PREDICTION_ERRORS = {"unified": 0.015, "slo": 0.005, "disaggregated": 0.084}
"""Mean distance of the simulated attainment from the measured one, by the kind of system: what
``python -m benchmarks agreement`` finds over docs/results/compare_*.json, and no other number (docs/simulate.md)."""
_CHANCE = 0.03
"""Difference of two systems' attainments that the requests of the simulated loads cannot tell from chance."""
_PREDICTION_TIMEOUT_S = 30.0
_NUM_REQUESTS = 100
_LONE_PROMPT_TOKENS = 8192
_LONE_CONTEXT = 1024
_CONTROLLER = "slo@80-100+mixed"
_CONTROLLER_PROMPT_TOKENS = 2000
"""The controller has one TTFT target: that of a prompt of this length."""
_CONFIGURATION = "the configuration"
Predict = Callable[[PredictionOrders], list[CandidatePrediction]]
OnPlaces = Callable[[int, int], None]


class Targets(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Latency targets of requests that have none of their own.

    Attributes:
        ttft_ms, ttft_ms_per_1k_tokens: the TTFT target is the first, and the second for every 1000 prompt tokens.
        source: where they come from.
    """

    ttft_ms: float | None = None
    ttft_ms_per_1k_tokens: float = 0.0
    tpot_ms: float | None = None
    source: str


class PlanChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a plan while the system served.

    Attributes:
        at: when it was complete, in seconds since 1970; ``seconds``: how long it took.
        by: ``auto`` or ``operator``.
        before, after: the systems, by the simulator's names.
        why: in a sentence.
        predictions: of the candidates under the load of that time, the best first; empty: none were made.
    """

    at: float
    seconds: float
    by: Literal["auto", "operator"]
    before: str
    after: str
    why: str
    predictions: list[dict[str, Any]] = []


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a system consists of, and why; ``GET /v1/plan`` shows it.

    Attributes:
        chosen_by: ``auto`` or ``configuration``.
        instances: role of each, by name.
        why: one or two sentences.
        profile: which step times the choice and the targets rest on; None: none were needed.
        profile_origin: ``cache`` (measured here), ``learnt`` (by a system that ran here), ``shipped``, ``derived`` from
            that of another format, or ``built-in``.
        learnt_profile: where better ones are kept that the system learns while it serves.
        profile_path: their file, if they are of this model on this kind of GPU; the scheduler's predictions start
            from it.
        predictions: share of the standard loads' requests within the targets, the best candidate first.
        runner_up: the best candidate that was not chosen.
        load: the real load that was looked at last while serving, and what was predicted for it; None: none yet.
        changes: of the plan since the start, the last ones.
    """

    mode: str
    chosen_by: str
    instances: dict[str, str]
    targets: Targets
    why: str
    profile: str | None = None
    profile_origin: ProfileOrigin | None = None
    learnt_profile: LearntProfile | None = None
    profile_path: str | None = None
    predictions: list[dict[str, Any]] = []
    runner_up: str | None = None
    load: dict[str, Any] | None = None
    changes: list[PlanChange] = []


def choose(
    config: Config, predict: Predict | None = None, on_places: OnPlaces = lambda num_instances, num_ranks: None
) -> tuple[Config, Plan]:
    """Replace mode ``auto`` by a mode and its instances, and set the default targets.

    Args:
        config: of any mode; its model is a folder.
        predict: returns the predictions; default: a child process makes them.
        on_places: called before predictions, which take seconds, with the likely number of instances and their ranks.

    Raises:
        ConfigError: mode is ``auto``, and the GPUs cannot hold the model.
    """
    is_auto = config.mode == "auto"
    found, model = None, config.model
    if model.device != "cpu" and config.launcher != "ray" and mps.num_visible_gpus():
        if is_auto and config.gpu_instances == default_instances("auto", model.tensor_parallel_size):
            model = msgspec.structs.replace(
                model, tensor_parallel_size=num_ranks_needed(model, len(mps.free_gpus()), mps.smallest_gpu_bytes())
            )
            instances = default_instances("auto", model.tensor_parallel_size)
            config = msgspec.structs.replace(config, model=model, gpu_instances=instances)
        found = find_profile(ProfileKey.of(model, config.kv_cache, mps.gpus()[0]))
    targets = _targets(config, found)
    if targets.source != _CONFIGURATION:
        config = _with_targets(config, targets)
    if not is_auto:
        return config, _plan(config, "configuration", targets, "mode and instances are configured", found)
    if found is None:
        where = "Ray places the instances" if config.launcher == "ray" else "no GPU: the CPU serves"
        config = msgspec.structs.replace(config, mode="unified")
        return _told(config, _plan(config, "auto", targets, f"one unified worker: {where}", None))
    places = _places(config)
    candidates = candidates_of(len(places), targets)
    orders = orders_of(config, found, targets, candidates)
    on_places(len(places), config.model.tensor_parallel_size)
    predictions = (predict or PredictionProcess())(orders)
    # Learnt times are of the whole GPU alone, and say nothing of two phases side by side.
    is_enough = found.is_measured and (len(places) > 1 or bool(found.profile.pairs))
    chosen, why = _best(predictions, candidates[0], is_enough)
    config = _with_system(config, chosen, places, targets, found)
    ranked = sorted(predictions, key=lambda prediction: prediction.mean, reverse=True)
    plan = _plan(config, "auto", targets, why, found)
    others = [prediction.system for prediction in ranked if prediction.system != chosen]
    plan = msgspec.structs.replace(
        plan, predictions=[prediction_row(prediction) for prediction in ranked], runner_up=others[0] if others else None
    )
    return _told(config, plan)


def _told(config: Config, plan: Plan) -> tuple[Config, Plan]:
    """Log a plan."""
    instances = ", ".join(f"{name} ({role})" for name, role in plan.instances.items())
    logger.info("mode auto chose %s with %s: %s", plan.mode, instances, plan.why)
    if plan.profile is not None:
        logger.info("step times: %s (%s)", plan.profile, plan.profile_origin)
    if plan.targets.ttft_ms is not None and plan.targets.tpot_ms is not None:
        logger.info(
            "targets: TTFT %.0f ms and %.0f ms per 1000 prompt tokens, TPOT %.1f ms, from %s",
            *(plan.targets.ttft_ms, plan.targets.ttft_ms_per_1k_tokens, plan.targets.tpot_ms, plan.targets.source),
        )
    return config, plan


# --- targets -----------------------------------------------------------------------------------------


def _targets(config: Config, found: FoundProfile | None) -> Targets:
    """Return the configured targets, else those of the machine."""
    given, slo = config.scheduler, config.semi_pd.slo
    if given.ttft_ms is not None or given.tpot_ms is not None:
        per_token = given.ttft_ms_per_1k_tokens
        return Targets(
            ttft_ms=given.ttft_ms, ttft_ms_per_1k_tokens=per_token, tpot_ms=given.tpot_ms, source=_CONFIGURATION
        )
    if slo is not None:
        return Targets(ttft_ms=slo.ttft_target_ms, tpot_ms=slo.tpot_target_ms, source=_CONFIGURATION)
    if not given.targets_by_default:
        return Targets(source="none: scheduler.targets_by_default is false")
    if found is None:
        return Targets(source="none: there is no profile of this machine")
    return machine_targets(found)


def machine_targets(found: FoundProfile) -> Targets:
    """Compute targets as multiples of what a lone request takes."""
    steps = profiled_predictor(found.profile)
    prompt_s = steps.seconds(StepWork(0, 0, _LONE_PROMPT_TOKENS, num_pairs(_LONE_PROMPT_TOKENS, 0)))
    tpot_ms = TPOT_MULTIPLE * 1000 * steps.seconds(StepWork(1, _LONE_CONTEXT))
    return Targets(
        ttft_ms=round(TPOTS_BEFORE_FIRST_TOKEN * tpot_ms, 1),
        ttft_ms_per_1k_tokens=round(TTFT_MULTIPLE * 1e6 * prompt_s / _LONE_PROMPT_TOKENS, 1),
        tpot_ms=round(tpot_ms, 1),
        source=f"{TTFT_MULTIPLE:g} times a lone request's prompt and {TPOT_MULTIPLE:g} times its decode step",
    )


def _with_targets(config: Config, targets: Targets) -> Config:
    scheduler = msgspec.structs.replace(
        config.scheduler,
        ttft_ms=targets.ttft_ms,
        ttft_ms_per_1k_tokens=targets.ttft_ms_per_1k_tokens,
        tpot_ms=targets.tpot_ms,
        targets_are_soft=targets.ttft_ms is not None,
    )
    return msgspec.structs.replace(config, scheduler=scheduler)


# --- candidates --------------------------------------------------------------------------------------


def _places(config: Config) -> list[InstanceConfig]:
    """Return a unified instance for each place that the system may use: those configured, else all free GPUs."""
    size = config.model.tensor_parallel_size
    default = default_instances("auto", size)
    if config.gpu_instances != default:
        return list(config.gpu_instances)
    free = mps.free_gpus()
    firsts = [gpu for gpu in range(0, max(free, default=0) + 1, size) if set(range(gpu, gpu + size)) <= set(free)]
    if not firsts:
        return list(default)  # its worker says what is missing
    return [
        msgspec.structs.replace(default[0], instance_id=f"unified-{number}", gpu_id=gpu, kv_rank=number)
        for number, gpu in enumerate(firsts)
    ]


def candidates_of(num_places: int, targets: Targets) -> list[str]:
    """Return the names of the candidates; the first is taken where nothing speaks against it."""
    if num_places == 1:
        return ["unified"] if None in (targets.ttft_ms, targets.tpot_ms) else ["unified", _CONTROLLER]
    ratios = {max(1, num_places // 4), num_places // 2, num_places - max(1, num_places // 4)}
    return [f"unified*{num_places}", *(f"{x}p{num_places - x}d" for x in sorted(ratios))]


def orders_of(
    config: Config, found: FoundProfile, targets: Targets, candidates: list[str], load: list[LoadEntry] | None = None
) -> PredictionOrders:
    """Make the orders. Where a target is missing, systems are compared by the machine's.

    Args:
        load: None: the standard loads.
    """
    machine = machine_targets(found)
    has_ttft = targets.ttft_ms is not None
    return PredictionOrders(
        profile=msgspec.to_builtins(found.profile),
        candidates=candidates,
        num_requests=_NUM_REQUESTS,
        ttft_ms=(targets if has_ttft else machine).ttft_ms or 0.0,
        ttft_ms_per_1k_tokens=(targets if has_ttft else machine).ttft_ms_per_1k_tokens,
        tpot_ms=targets.tpot_ms or machine.tpot_ms or 0.0,
        max_num_seqs=config.performance.max_num_seqs,
        load=load or [],
        targets_are_soft=config.scheduler.targets_are_soft,
    )


class PredictionProcess:
    """A child process that simulates the candidates.

    Attributes:
        is_stopped: `stop` has been called, in any thread.
    """

    def __init__(self) -> None:
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.is_stopped = False

    def __call__(self, orders: PredictionOrders) -> list[CandidatePrediction]:
        """Return the predictions; none if the process fails, takes too long or is stopped."""
        process = ChildProcess(
            "auto-plan",
            "hbserve.simulate.prediction",
            {"orders": msgspec.to_builtins(orders)},
            on_status=self._reports.put,
            on_exit=lambda code: self._reports.put({"exit": code}),
        )
        process.start()
        try:
            report = self._reports.get(timeout=_PREDICTION_TIMEOUT_S)
            return msgspec.convert(report["predictions"], list[CandidatePrediction])
        except (queue.Empty, KeyError) as error:
            logger.warning("no predictions for mode auto, so it takes the first candidate: %r", error)
            return []
        finally:
            process.kill()
            process.end(_END_TIMEOUT_S)

    def stop(self) -> None:
        """End the process, and the wait for it."""
        self.is_stopped = True
        self._reports.put({"stopped": True})


_END_TIMEOUT_S = 5.0


def _best(predictions: list[CandidatePrediction], default: str, is_measured: bool) -> tuple[str, str]:
    """Choose the system, and say why."""
    means = {prediction.system: prediction.mean for prediction in predictions}
    if default not in means:
        return default, f"{default}: there are no predictions, and it is the best known choice"
    least = means[default]
    rivals = {name: mean - least - error_of(name) for name, mean in means.items() if name != default}
    best = max(rivals, key=lambda name: rivals[name], default=None)
    if best is not None and rivals[best] > 0 and is_measured:
        gain = 100 * (means[best] - least)
        return best, (
            f"{best} is predicted to serve {100 * means[best]:.1f} % of the standard loads within the targets, "
            f"{gain:.1f} points more than {default}; its predictions are off by {100 * error_of(best):.1f}"
        )
    why = f"{default} is predicted to serve {100 * least:.1f} % of the standard loads within the targets"
    if best is not None:
        why += (
            f"; the runner-up {best}, {100 * means[best]:.1f} %, would have to gain more than "
            f"{100 * error_of(best):.1f} points, by which its predictions are off"
        )
        if rivals[best] > 0:
            why += ", with a profile of this model and GPU; there is none"
    return default, why


def error_of(system: str) -> float:
    """Return how far the prediction for a system may be off."""
    kind = system.partition("@")[0].partition("*")[0]
    return PREDICTION_ERRORS.get(kind, PREDICTION_ERRORS["disaggregated"]) + _CHANCE


# --- the system --------------------------------------------------------------------------------------


def _with_system(
    config: Config, chosen: str, places: list[InstanceConfig], targets: Targets, found: FoundProfile
) -> Config:
    """Return the configuration of the chosen system."""
    replace = msgspec.structs.replace
    if chosen == _CONTROLLER:
        ttft_ms = config.scheduler.ttft_target_ms(_CONTROLLER_PROMPT_TOKENS)
        slo: dict[str, Any] = {"ttft_target_ms": ttft_ms, "tpot_target_ms": targets.tpot_ms}
        if found.path is not None:
            slo["profile"] = str(found.path)
        document = msgspec.to_builtins(config)
        document["semi_pd"] |= {"slo": slo, "mixed": None}
        document["scheduler"]["targets_are_soft"] = False  # the controller keeps them
        document["semi_pd"]["ladder"]["unified"] = None
        place = replace(places[0], instance_id="semi-0", instance_type=InstanceRole.SEMI_PD)
        return from_dict(document | {"mode": "semi_pd", "gpu_instances": [msgspec.to_builtins(place)]})
    if chosen.startswith("unified"):
        return replace(config, mode="unified", gpu_instances=tuple(places))
    num_prefill = int(chosen.partition("p")[0])
    roles = [InstanceRole.PREFILL] * num_prefill + [InstanceRole.DECODE] * (len(places) - num_prefill)
    numbers = [*range(num_prefill), *range(len(places) - num_prefill)]
    instances = tuple(
        replace(place, instance_id=f"{role}-{number}", instance_type=role)
        for place, role, number in zip(places, roles, numbers, strict=True)
    )
    return replace(config, mode="disaggregated", gpu_instances=instances)


def _plan(
    config: Config, chosen_by: Literal["auto", "configuration"], targets: Targets, why: str, found: FoundProfile | None
) -> Plan:
    learns = found is not None and chosen_by == "auto" and config.mode == "unified"
    return Plan(
        mode=config.mode,
        chosen_by=chosen_by,
        instances={instance.instance_id: instance.instance_type.value for instance in config.gpu_instances},
        targets=targets,
        why=why,
        profile=None if found is None else found.source,
        profile_origin=None if found is None else found.origin,
        learnt_profile=found.learnt if found is not None and learns else None,
        profile_path=str(found.path) if found is not None and found.is_measured else None,
    )


def prediction_row(prediction: CandidatePrediction) -> dict[str, Any]:
    """Return a prediction as ``GET /v1/plan`` shows it."""
    return {
        "system": prediction.system,
        "mean": round(prediction.mean, 4),
        "attainment": prediction.attainment,
        "bound": prediction.bound,
        "error": round(error_of(prediction.system), 4),
    }
