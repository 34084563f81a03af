"""What happens in one run: the system, the requests and the faults, all drawn from one seed."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import msgspec

from hbserve import PdDisaggConfig
from hbserve.config import Config, SLOConfig
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"
VOCAB_SIZE = 64
BLOCK_SIZE = 4
BLOCK_BYTES = 64
HEARTBEAT_TIMEOUT_S = 2.0
TRANSFER_TIMEOUT_S = 3.0
TIER_TIMEOUT_S = 0.5
RECOVERY_TIMEOUT_S = 60.0
"""Longer than any instance that comes back is away."""

_SLO = SLOConfig(ttft_target_ms=100.0, tpot_target_ms=20.0)

FaultKind = Literal[
    "kill_worker",
    "kill_awaited",
    "stop_worker",
    "kill_scheduler",
    "stop_scheduler",
    "bad_wire",
    "bad_tier",
    "kill_client",
    "rotate",
    "rotate_mixed",
    "kill_holder",
    "set_role",
    "join",
    "leave",
    "remove",
]
_EVERYWHERE: tuple[FaultKind, ...] = ("kill_worker", "stop_worker", "kill_scheduler", "stop_scheduler", "kill_client")
_OF_MODE: dict[str, tuple[FaultKind, ...]] = {
    "unified": ("join", "leave", "remove"),
    "disaggregated": ("bad_wire", "bad_wire", "set_role", "join", "leave", "remove"),
    "semi_pd": ("rotate", "rotate", "rotate_mixed", "kill_holder", "kill_worker", "kill_awaited"),
}


@dataclass(frozen=True)
class RequestSpec:
    """One request: when it comes, what it holds, and when its client gives it up, if it does.

    Attributes:
        keeps_state: it has a penalty, so workers hold a history of its tokens.
        late_masks: it has a grammar, and one step in four ends without the mask for the next token.
        is_batch: it is best-effort.
        scores_prompt: its client asks for the log-probabilities of the prompt's tokens.
        ttft_ms, tpot_ms: its targets.
        wrong_guesses: its client predicts its output with this share of wrong tokens; None: it predicts nothing.
    """

    at: float
    client: int
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    keeps_state: bool = False
    late_masks: bool = False
    end_token: int | None = None
    salt: str | None = None
    abort_at: float | None = None
    is_batch: bool = False
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    wrong_guesses: float | None = None
    scores_prompt: bool = False


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, or that an operator does. ``number`` chooses its victim among those that there are."""

    at: float
    kind: FaultKind
    number: int
    lasts_s: float


@dataclass(frozen=True)
class Scenario:
    """Everything that one run depends on.

    Attributes:
        has_ladder: semi-PD has two workers of each phase, with other shares.
        has_throttle: decode waits for its turn while prefill is busy.
        tier_slots: blocks of KV that each tier holds: memory of the host, its disk, and a store that keeps blocks by
            name and that all instances share, those that join too.
        layer_group_bytes: a prompt's last blocks leave in groups of layers of at least this size; 0: all at once.
        prefill_ranks, decode_ranks: ranks of an instance that starts in this role; each holds a part of the heads.
        repeats: messages that may come twice sometimes do, and blocks are sometimes written twice.
        has_draft_model: workers have a draft model, which is right with a probability of 0.8.
        has_eagle_head: workers have an EAGLE-3 head, which is right as often.
    """

    seed: int
    mode: Literal["unified", "disaggregated", "semi_pd"]
    num_prefill: int
    num_decode: int
    one_sided: bool
    verify: bool
    num_blocks: int
    max_num_seqs: int
    chunk_size: int
    pipeline_depth: int
    shares_prefixes: bool
    policy: str
    placement: str
    local_prefill_tokens: int
    has_ladder: bool
    max_step_s: float
    has_throttle: bool
    layer_group_bytes: int
    prefill_ranks: int
    decode_ranks: int
    repeats: bool
    requests: tuple[RequestSpec, ...]
    faults: tuple[Fault, ...]
    tier_slots: dict[str, int] = field(default_factory=dict)
    has_draft_model: bool = False
    has_eagle_head: bool = False

    def config(self) -> Config:
        """The configuration that the scheduler gets."""
        return _config(
            self.mode,
            self.num_prefill,
            self.num_decode,
            self.verify,
            self.max_num_seqs,
            self.chunk_size,
            self.pipeline_depth,
            self.shares_prefixes,
            self.policy,
            self.placement,
            self.local_prefill_tokens,
            self.has_throttle,
            self.layer_group_bytes,
            self.has_draft_model or self.has_eagle_head,
        )


@cache
def _config(
    mode: str,
    num_prefill: int,
    num_decode: int,
    verify: bool,
    max_num_seqs: int,
    chunk_size: int,
    pipeline_depth: int,
    shares_prefixes: bool,
    policy: str,
    placement: str,
    local_prefill_tokens: int,
    has_throttle: bool,
    layer_group_bytes: int,
    has_draft_model: bool,
) -> Config:
    instances = {
        "unified": [{"instance_id": f"u{n}", "instance_type": "unified"} for n in range(num_prefill)],
        "disaggregated": [{"instance_id": f"p{n}", "instance_type": "prefill"} for n in range(num_prefill)]
        + [{"instance_id": f"d{n}", "instance_type": "decode"} for n in range(num_decode)],
        "semi_pd": None,
    }[mode]
    config = PdDisaggConfig.from_arguments(
        str(DEMO),
        mode=mode,
        device="cpu",
        block_size=BLOCK_SIZE,
        **({} if instances is None else {"gpu_instances": instances}),
    ).freeze()
    replace = msgspec.structs.replace
    return replace(
        config,
        performance=replace(
            config.performance,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=shares_prefixes,
            decode_headroom_tokens=0,
            pipeline_depth=pipeline_depth,
            placement=placement,
        ),
        chunked_prefill=replace(config.chunked_prefill, chunk_size=chunk_size, max_chunk_prefill_tokens=3 * chunk_size),
        scheduler=replace(config.scheduler, policy=policy),
        semi_pd=replace(config.semi_pd, slo=_SLO if has_throttle else None),
        kv_transfer=replace(
            config.kv_transfer,
            verify=verify,
            max_attempts=10_000,
            local_prefill_tokens=local_prefill_tokens,
            layer_group_bytes=layer_group_bytes,
            timeout_s=TRANSFER_TIMEOUT_S,
        ),
        kv_cache=replace(config.kv_cache, timeout_s=TIER_TIMEOUT_S),
        speculation=replace(config.speculation, model="a model" if has_draft_model else None),
        rpc=replace(
            config.rpc,
            heartbeat_interval_s=0.25,
            heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
            recovery_timeout_s=RECOVERY_TIMEOUT_S,
        ),
    )


def draw(seed: int) -> Scenario:
    """Draw a scenario."""
    rng = random.Random(seed)
    service = random.Random(-1 - seed)  # a generator of its own, so that all else stays what it was
    speculation = random.Random(f"{seed} speculation")  # likewise
    predicts = speculation.random() < 0.4
    has_draft_model = random.Random(f"{seed} draft model").random() < 0.25
    parts = random.Random(f"{seed} parts")  # likewise
    has_scores = parts.random() < 0.3
    has_batch, has_targets = service.random() < 0.4, service.random() < 0.5
    mode = rng.choice(("unified", "disaggregated", "disaggregated", "semi_pd", "semi_pd"))
    max_tokens = rng.choice((4, 12, 20))
    longest = rng.choice((8, 20, 40))
    shared = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(longest)) for _ in range(2)]
    needed = -(-(longest + max_tokens) // BLOCK_SIZE) + 1  # blocks that hold one request
    lasts_s = rng.choice((0.3, 1.0, 3.0))  # over which requests and faults come
    requests = []
    for _ in range(rng.randint(3, 10)):
        length = rng.randint(1, longest)
        start = rng.choice(shared)[: rng.randint(0, length)] if rng.random() < 0.7 else ()
        if len(start) > BLOCK_SIZE and rng.random() < 0.3:  # equal blocks after another first block
            start = (*(rng.randrange(VOCAB_SIZE) for _ in range(BLOCK_SIZE)), *start[BLOCK_SIZE:])
        prompt = (*start, *(rng.randrange(VOCAB_SIZE) for _ in range(length - len(start))))
        at = rng.uniform(0.0, lasts_s) * rng.choice((0.1, 1.0))
        is_batch = has_batch and service.random() < 0.5
        targets_ms = service.choice((1.0, 30.0, 300.0)), service.choice((0.1, 20.0, 100.0))
        keeps_targets = has_targets and not is_batch
        requests.append(
            RequestSpec(
                at=at,
                client=rng.randrange(2),
                prompt=prompt,
                max_tokens=rng.randint(1, max_tokens),
                seed=rng.randrange(1000),
                keeps_state=rng.random() < 0.2,
                late_masks=rng.random() < 0.1,
                end_token=rng.randrange(VOCAB_SIZE) if rng.random() < 0.3 else None,
                salt="a" if rng.random() < 0.1 else None,
                abort_at=at + rng.uniform(0.0, 0.5) if rng.random() < 0.15 else None,
                is_batch=is_batch,
                ttft_ms=targets_ms[0] if keeps_targets else None,
                tpot_ms=targets_ms[1] if keeps_targets else None,
                scores_prompt=has_scores and parts.random() < 0.5,
                wrong_guesses=speculation.choice((None, 0.0, 0.2, 0.6)) if predicts else None,
            )
        )
    kinds = _EVERYWHERE + 2 * _OF_MODE[mode]
    faults = tuple(
        sorted(
            (
                Fault(
                    rng.uniform(0.0, lasts_s) * rng.choice((0.1, 1.0)),
                    rng.choice(kinds),
                    rng.randrange(100),
                    rng.choice((0.1, 0.5, 1.0, 4.0)),
                )
                for _ in range(rng.randint(0, 6))
            ),
            key=lambda fault: fault.at,
        )
    )
    tiers = random.Random(f"tiers {seed}")  # likewise
    num_slots = tiers.choice((needed // 2 + 1, 2 * needed, 10 * needed)) if tiers.random() < 0.5 else 0
    if num_slots and tiers.random() < 0.5:
        bad = Fault(tiers.uniform(0.0, lasts_s), "bad_tier", 0, tiers.choice((0.3, 1.0)))
        faults = tuple(sorted((*faults, bad), key=lambda fault: fault.at))
    if num_slots and tiers.random() < 0.7:  # prompts come again when others have evicted them
        for again in tiers.choices(requests, k=tiers.randint(2, 6)):
            at = again.at + tiers.uniform(0.0, lasts_s)
            requests.append(dataclasses.replace(again, at=at, client=tiers.randrange(2), abort_at=None))
    has_store = num_slots > 0 and tiers.random() < 0.4
    slots = {"store" if has_store else "host": num_slots} if num_slots else {}
    others = random.Random(f"other tiers {seed}")  # likewise
    is_small = num_slots > 0 and others.random() < 0.5  # several tiers, whose contents come again while they are bad
    if is_small:
        slots = {"host": 2 * needed, "disk": 3 * needed, "store": 4 * needed} | slots
        slots.pop(others.choice(("host", "disk", "store", "none")), None)
        bad = Fault(others.uniform(0.0, lasts_s), "bad_tier", 0, lasts_s)
        faults = tuple(sorted((*faults, bad), key=lambda fault: fault.at))
        for again in others.choices(requests, k=10):
            at = others.uniform(0.0, 2 * lasts_s)
            requests.append(dataclasses.replace(again, at=at, client=others.randrange(2), abort_at=None))
    bursts = random.Random(f"bursts {seed}")  # likewise
    if longest > 2 * BLOCK_SIZE and bursts.random() < 0.12:  # prompts that begin alike come while the first is computed
        begin, at = tuple(bursts.randrange(VOCAB_SIZE) for _ in range(longest)), bursts.uniform(0.0, lasts_s)
        for number in range(bursts.randint(2, 5)):
            ends = bursts.randint(BLOCK_SIZE, longest)
            tail = [bursts.randrange(VOCAB_SIZE) for _ in range(bursts.choice((0, 1, longest - ends)))]
            again = dataclasses.replace(
                bursts.choice(requests),
                at=at + bursts.uniform(0.0, 0.02),
                prompt=(*begin[:ends], *tail)[:longest],
                salt=None,
                abort_at=at + bursts.uniform(0.0, 0.05) if not number and bursts.random() < 0.3 else None,
                scores_prompt=False,
                wrong_guesses=None,
            )
            requests.append(again)
        if bursts.random() < 0.6:
            kind = bursts.choice(("kill_worker", "stop_worker", *_OF_MODE[mode]))
            broken = Fault(at + bursts.uniform(0.0, 0.06), kind, bursts.randrange(100), 0.1)
            faults = tuple(sorted((*faults, broken), key=lambda fault: fault.at))
    roles = random.Random(f"roles {seed}")  # likewise
    if mode != "semi_pd" and roles.random() < 0.3:
        changes = [Fault(roles.uniform(0.0, lasts_s), "set_role", roles.randrange(100), 1.0) for _ in range(4)]
        faults = tuple(sorted((*faults, *changes), key=lambda fault: fault.at))
    return Scenario(
        seed=seed,
        mode=mode,  # type: ignore[arg-type]
        num_prefill=rng.randint(1, 2),
        num_decode=rng.randint(1, 2),
        one_sided=rng.random() < 0.5,
        verify=rng.random() < 0.3,
        num_blocks=needed + rng.choice((0, 1, needed // 2, needed, 2 * needed)) * (not is_small),
        max_num_seqs=rng.randint(1, 6),
        chunk_size=rng.choice((3, 8, 64)),
        pipeline_depth=rng.randint(1, 3),
        shares_prefixes=rng.random() < 0.8,
        policy=rng.choice(("fcfs", "shortest_prompt_first", "slo_aware")),
        placement=rng.choice(("least_loaded", "fcfs", "prefix_aware")),
        local_prefill_tokens=rng.choice((0, 0, 6)),
        has_ladder=rng.random() < 0.8,
        max_step_s=rng.choice((0.003, 0.01, 0.03)),
        has_throttle=rng.random() < 0.5,
        layer_group_bytes=parts.choice((0, BLOCK_BYTES, 2 * BLOCK_BYTES)),
        has_draft_model=has_draft_model,
        has_eagle_head=not has_draft_model and random.Random(f"{seed} head").random() < 0.25,
        prefill_ranks=parts.choice((1, 1, 2)),
        decode_ranks=parts.choice((1, 1, 2)),
        repeats=parts.random() < 0.3,
        requests=tuple(sorted(requests, key=lambda request: request.at)),
        faults=faults,
        tier_slots=slots,
    )
