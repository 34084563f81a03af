"""The model runner: step plans in, sampled tokens out. It runs in the worker's main thread, which loads the model."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hbserve.attention import select_attention_backend
from hbserve.attention.base import ScoreRules
from hbserve.config import Config, InstanceConfig, InstanceRole
from hbserve.engine.arenas import ArenaAttachment, attach_arenas, check_fp8, dtype_of, make_arenas
from hbserve.engine.batch import build_batch
from hbserve.engine.draft_model.drafter import Drafting, ModelDrafter
from hbserve.engine.draft_model.head_drafter import make_drafter
from hbserve.engine.expert_loads import ExpertLoads
from hbserve.engine.grammar_table import GrammarTable
from hbserve.engine.graph_sizes import DUE_STEPS, DelayLimit, GraphSizes
from hbserve.engine.pending_step import PendingStep, StepTimer
from hbserve.engine.prompt_scores import score
from hbserve.engine.sampler import sample
from hbserve.engine.sequence_table import SequenceTable
from hbserve.engine.staging import reserve_pinned_memory
from hbserve.engine.step_board import StepBoard
from hbserve.layers.parallel import TensorParallel
from hbserve.messages.rank import CaptureGraph
from hbserve.messages.worker import PlanRow, SequenceState, StepPlan
from hbserve.model_spec import ModelSpec
from hbserve.models.decoder import Decoder
from hbserve.platform import Platform
from hbserve.process.stopwatch import Stopwatch
from hbserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hbserve.engine.capture import Parts
    from hbserve.engine.decode_graphs import DecodeGraphs
    from hbserve.engine.prefill_graphs import PrefillGraphs

__all__ = ["ModelRunner", "PendingStep"]

logger = logging.getLogger(__name__)

_PAUSE_S = 5e-3
_MIN_FREE_BYTES = 512 << 20
"""Free device memory for a capture after the start. Other code takes from it too: one capture needs a tenth of it."""
_MAX_CPU_REHEARSAL = 512
"""Tokens of the longest rehearsed step on the CPU, where larger steps load nothing more."""


class ModelRunner:
    """Weights, KV cache and sequence table of one rank, and the step that uses them together.

    Not thread-safe: one thread launches. Plans take effect in the order of their launch.

    Args:
        platform: activated already.
        parallel: the ranks that compute the model together; every one must launch the same plans.
        attachment: to arenas that another process holds; None: the runner makes its own.
        stopwatch: measures the parts of the start: ``model``, ``arenas``, ``decoder``, ``attention``, ``tables``,
            ``graphs``, ``warm_up``.
        defers_graphs: capture only the CUDA graphs that the first steps need; `next_graph` names the others.

    Attributes:
        spec: the model. dtype: of what is not quantised. parallel: as given. layout: of this rank's part of a KV block.
        num_blocks: of the KV cache; max_model_len: most tokens of prompt and output together; both
            are the same on all ranks.
        kv_blocks: uint8 ``[block, bytes]``, the KV cache as transfers move it.
        kv_handle: with which other processes attach to it; None: they cannot.
        board: of the workers on the same arenas; None if there is only this one.

    Raises:
        ModelError: if the model folder cannot be served.
        ConfigError: if the configuration does not fit model or device.
    """

    @torch.inference_mode(False)  # transfers write to the KV cache in other threads, which are not in that mode
    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        platform: Platform,
        parallel: TensorParallel | None = None,
        attachment: ArenaAttachment | None = None,
        stopwatch: Stopwatch | None = None,
        defers_graphs: bool = False,
    ) -> None:
        stopwatch = stopwatch or Stopwatch()
        self._defers_graphs, self._delays = defers_graphs, DelayLimit()
        self.platform = platform
        parallel = replace(parallel or TensorParallel(), has_whole_experts=config.model.expert_parallel)
        self.parallel = parallel
        if attachment is None:
            self.spec = spec = ModelSpec.load(
                config.model.path, config.model.quantization, config.kv_cache.dtype, config.model.max_model_len
            )
        else:
            self.spec = spec = ModelSpec.from_plain(attachment.spec)
        check_fp8(spec, platform)
        self.dtype = dtype = dtype_of(config, spec)
        backend = select_attention_backend(config.model.attention_backend, spec, dtype, platform)
        stopwatch.lap("model")
        if attachment is None:
            arenas = make_arenas(config, spec, platform, parallel)
        else:
            arenas = attach_arenas(config, spec, platform, parallel, attachment)
        stopwatch.lap("arenas")
        weights = arenas.table.views(arenas.weights)
        self._decoder = Decoder(spec, weights, parallel)
        stopwatch.lap("decoder")
        self.layout, self.num_blocks, self.max_model_len = arenas.layout, arenas.num_blocks, arenas.max_model_len
        num_arena_blocks = self.num_blocks + (arenas.spare_block is not None)
        self.kv_blocks = self.layout.block_bytes_view(arenas.kv, self.num_blocks)
        self.kv_handle = arenas.kv_handle
        self.board: StepBoard | None = None
        if arenas.board is not None:
            samples = instance.instance_type is InstanceRole.DECODE
            self.board = StepBoard(arenas.board, config.performance.max_num_seqs, samples)
        kv_cache = self.layout.view(arenas.kv, num_arena_blocks)
        scales, sinks = weights.get("kv_scales"), weights.get("sinks")
        self._attention = backend(self.spec, self.layout, kv_cache, platform, parallel.size, scales, sinks)
        stopwatch.lap("attention")
        self._table = SequenceTable(
            max_num_seqs=config.performance.max_num_seqs,
            max_blocks_per_seq=-(-self.max_model_len // self.layout.block_size),
            num_blocks=num_arena_blocks,
            vocab_size=self.spec.vocab_size,
            device=platform.device,
            tokenizer_folder=config.tokenizer_path,
        )
        self._drafter: ModelDrafter | None = None
        if arenas.draft is not None:
            self._drafter = make_drafter(config, arenas.draft, self._decoder, self._table, num_arena_blocks, platform)
        self._config = config
        self._graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self._graph_pool: Any = None
        self._layers: list[int] | None = None
        self._expert_loads: ExpertLoads | None = None
        if platform.name == "cuda":
            reserve_pinned_memory()
        stopwatch.lap("tables")
        self._prepare_for(instance.instance_type)
        stopwatch.lap("graphs")
        if arenas.spare_block is not None:
            self._warm_up(config, instance.instance_type, arenas.spare_block)
        if self._drafter is not None and instance.instance_type.decodes:
            self._drafter.warm_up(arenas.spare_block or 0)
        stopwatch.lap("warm_up")
        if self._decoder.expert_totals is not None:
            self._expert_loads = ExpertLoads(self._decoder.expert_totals)
        logger.info(
            "%s: %s in %s%s on %s, %d KV blocks of %d tokens, sequences up to %d tokens, attention by %s",
            *(instance.instance_id, self.spec.architecture, dtype, "".join(_in_fp8(spec)), platform.describe()),
            *(self.num_blocks, self.layout.block_size, self.max_model_len, backend.name),
        )

    def end_tokens_of(self, slot: int) -> list[int]:
        """Return the tokens that end the output of a slot's sequence."""
        return self._table.end_token_ids[slot]

    @property
    def has_eagle_head(self) -> bool:
        """Whether an EAGLE-3 head makes its drafts."""
        return self._decoder.taps is not None

    @property
    def grammars(self) -> GrammarTable:
        """Grammars of the sequences."""
        return self._table.grammars

    @torch.inference_mode()
    def _prepare_for(self, role: InstanceRole) -> None:
        """Capture the graphs of the phases of a role, unless they are captured already."""
        config = self._config
        if not config.cuda_graph.enabled:
            return
        if self.platform.name != "cuda":
            logger.info("no CUDA graphs: there are none on the %s platform", self.platform.name)
            return
        if importlib.util.find_spec("triton") is None:
            logger.warning("no CUDA graphs: Triton is not installed, so decode steps run eagerly and slower")
            return
        from hbserve.attention.paged_decode import PagedDecode
        from hbserve.engine.decode_graphs import DecodeGraphs
        from hbserve.engine.prefill_graphs import PrefillGraphs

        if not self._decoder.can_be_captured:
            logger.warning("no CUDA graphs: there are no kernels for such experts; decode steps are slower")
            return
        if self.spec.uncaptured_features:
            features = ", ".join(self.spec.uncaptured_features)
            logger.warning("no CUDA graphs: they were not tried with %s; decode steps are slower", features)
            return
        reason = PagedDecode.supports(self.layout)
        if reason is not None:
            logger.warning("no CUDA graphs: the attention that can be captured %s; decode steps are slower", reason)
            return
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        if role.decodes and self._graphs is None:
            heads = self.spec.num_heads // self.parallel.size
            cache, scales = self._attention.kv_cache, self._attention.kv_scales
            rules = ScoreRules.of(self.spec, self._attention.sinks)
            attention = PagedDecode(self.layout, cache, heads, self._table.max_num_seqs, scales, rules)
            max_seq_len, defers = config.cuda_graph.max_seq_len, self._defers_graphs
            self._graphs = DecodeGraphs(self._decoder, attention, self._table, max_seq_len, defers)
            self._graph_pool = self._graphs.pool
            if self._drafter is not None:
                self._graph_pool = self._drafter.capture(self._graph_pool)
        if role.prefills and self._prefill_graphs is None:
            # The sampler and FlashInfer keep their own memory, so only the number of tokens counts here.
            max_tokens = config.performance.max_num_batched_tokens
            self._prefill_graphs = PrefillGraphs(
                self._decoder, self._attention, max_tokens, self._graph_pool, self._defers_graphs
            )

    def _graph_sizes(self) -> dict[InstanceRole, GraphSizes]:
        decode, prefill = self._graphs, self._prefill_graphs
        sizes = {} if decode is None else {InstanceRole.DECODE: decode.sizes}
        return sizes if prefill is None else sizes | {InstanceRole.PREFILL: prefill.sizes}

    @property
    def lacks_graphs(self) -> bool:
        """Whether sizes of steps are left to capture."""
        return any(sizes.missing for sizes in self._graph_sizes().values())

    def is_prepared_for(self, role: InstanceRole) -> bool:
        """Whether a plan with a new role needs no first capture."""
        decode, prefill = self._graphs is not None, self._prefill_graphs is not None
        return (decode or not role.decodes) and (prefill or not role.prefills)

    @property
    def captures_beside_steps(self) -> bool:
        """Whether steps may be launched between the parts of `capture`.

        Ranks of a group wait for each other in a rehearsal, in the order of their launches.
        """
        if self.parallel.size > 1 or self._graph_pool is None:
            return False
        from hbserve.engine.capture import can_capture_beside_steps

        return can_capture_beside_steps()

    def next_graph(self, is_idle: bool) -> CaptureGraph | None:
        """Return the size of step whose graphs should be captured now, beside other work if there is any; None: none.

        Args:
            is_idle: there is no other work. Else a size must be due, and `captures_beside_steps`.
        """
        found = self._most_missed()
        if found is None or not (is_idle or (found[1] >= DUE_STEPS and self.captures_beside_steps)):
            return None
        return found[0]

    def graph_before(self, plan: StepPlan) -> CaptureGraph | None:
        """Return the size of step whose graphs must be captured before a plan's step; None: none.

        Only where no capture goes on beside steps, only what is due, and no sequence waits twice.
        """
        found = self._most_missed()
        if found is None or self.captures_beside_steps:
            return None
        return found[0] if self._delays.allows(found[1], (row.slot for row in plan.rows)) else None

    def _most_missed(self) -> tuple[CaptureGraph, int] | None:
        """Return the missing size that most steps would have used, and their number."""
        wanted = [
            (phase, *found) for phase, sizes in self._graph_sizes().items() if (found := sizes.next()) is not None
        ]
        if not wanted:
            return None
        phase, size, misses = max(wanted, key=lambda item: item[2])
        return CaptureGraph(phase=phase, size=size), misses

    @torch.inference_mode()
    def capture(self, graph: CaptureGraph) -> Parts[None]:
        """Capture what was named, unless memory is short; all ranks of a group do this at the same place between plans.

        The KV pool keeps its size: these graphs use what ``performance.memory_fraction`` leaves, as the first ones do.
        It takes one part, or several if this `captures_beside_steps`.
        """
        if self._free_bytes() < _MIN_FREE_BYTES:
            logger.warning("no further CUDA graphs: too little device memory is free; some steps are slower")
            for sizes in self._graph_sizes().values():
                sizes.give_up()
            return
        graphs = self._graphs if graph.phase is InstanceRole.DECODE else self._prefill_graphs
        assert graphs is not None, f"there are no graphs for {graph.phase}"
        totals = self._decoder.expert_totals
        counted = None if totals is None else totals.clone()  # the padding of a rehearsal is not load
        began = part_began = time.perf_counter()
        longest_s, num_parts = 0.0, 0
        for _ in graphs.capture(graph.size):
            if totals is not None and counted is not None and not num_parts:
                totals.copy_(counted)
            num_parts += 1
            longest_s = max(longest_s, time.perf_counter() - part_began)
            if self.captures_beside_steps:
                yield
                part_began = time.perf_counter()
        ended = time.perf_counter()
        text = "captured graphs of %s steps of size %d in %.3f s, in %d parts, the longest %.1f ms"
        longest_s = max(longest_s, ended - part_began)
        logger.debug(text, graph.phase, graph.size, ended - began, num_parts + 1, 1000 * longest_s)
        if not graphs.sizes.missing:
            logger.info("captured the remaining graphs of %s steps", graph.phase)

    def note_delay(self) -> None:
        """Note that the sequences in the table have waited for a capture."""
        self._delays.on_captured(self._table.installed.nonzero()[0].tolist())

    def _free_bytes(self) -> int:
        """Return the free memory of the rank's device that has least."""
        own = torch.cuda.mem_get_info(self.platform.device)[0]
        if self.parallel.size == 1:
            return own  # without a wait for the device
        return int(self.parallel.minimum(torch.tensor([own], device=self.platform.device)))

    @torch.inference_mode()
    def _warm_up(self, config: Config, role: InstanceRole, spare_block: int) -> None:
        """Rehearse steps, so that the first real one finds everything loaded.

        Kernels and memory are loaded and allocated at their first use, and which ones depends on the size. Other
        workers' steps run on the device meanwhile. A whole step, even of one token, reads all weights as their steps
        do, and would make them twice as long. So a rehearsal runs a few layers, one at a time. It writes all KV to one
        spare block.
        """
        longest = min(config.max_chunk, self.max_model_len - 1)
        if self.platform.name == "cpu":
            longest = min(longest, _MAX_CPU_REHEARSAL)
        self._layers = self._decoder.typical_layers
        with contextlib.nullcontext() if self._graphs is None else self._graphs.of_layers(self._layers):
            short = self._attention.short_chunk_tokens
            lengths = [[1], *([] if short is None else [[short]]), [longest]] if role.prefills else [[1]]
            if role.prefills and role.decodes and self._table.max_num_seqs > 1:
                lengths.append([1, 2])  # the attention of both kinds of rows in one step
            for each in lengths:
                self.launch(self._rehearsal(each, spare_block), self._yield_device).result()
        self._layers = None

    def _yield_device(self, layer: int) -> None:
        """Let other workers' steps have the device, between two layers of a rehearsal."""
        self.platform.synchronize()
        time.sleep(_PAUSE_S)

    def _rehearsal(self, lengths: list[int], spare_block: int) -> StepPlan:
        """Return a step with whole prompts that belong to no request."""
        states = [
            SequenceState(
                slot=slot,
                block_ids=[spare_block] * -(-length // self.layout.block_size),
                sampling=SamplingParams(temperature=1.0, seed=0, max_tokens=1),
                end_token_ids=[],
                min_end_position=0,
                num_prompt_tokens=length,
            )
            for slot, length in enumerate(lengths)
        ]
        rows = [
            PlanRow(slot=slot, start=0, num_tokens=length, token_ids=[0] * length, new_block_ids=[], sample=True)
            for slot, length in enumerate(lengths)
        ]
        return StepPlan(epoch=0, step_id=0, rows=rows, new_sequences=states, sends=[])

    @torch.inference_mode()
    def launch(self, plan: StepPlan, on_stored: Callable[[int], None] = lambda layer: None) -> PendingStep:
        """Launch a step; on CPU also finish it. The plan's ``sends`` are ignored here.

        A plan that contradicts what the runner knows of a slot is a bug of the scheduler and fails an assertion.

        Args:
            on_stored: see `Decoder.forward`; not called for a step that is one captured graph.
        """
        if plan.role is not None:
            self._prepare_for(plan.role)
        pending = self._launch(plan, on_stored)
        if self._expert_loads is not None:
            pending.expert_tokens = self._expert_loads.poll()
        return pending

    @torch.inference_mode()
    def repeat(self, plan: StepPlan) -> PendingStep | None:
        """Launch the next round of ``plan``, the step or the round that was launched last, before its result is known.

        Returns:
            None: the next round's plan must be computed from the result, and launched.
        """
        if self._graphs is None or not self._graphs.rounds.can_repeat:
            return None
        timer = StepTimer(self.platform.device)
        timer.start()
        pending = PendingStep(plan, *self._graphs.rounds.repeat(), timer)
        if self._expert_loads is not None:
            pending.expert_tokens = self._expert_loads.poll()
        return pending

    def _launch(self, plan: StepPlan, on_stored: Callable[[int], None]) -> PendingStep:
        timer = StepTimer(self.platform.device)
        if self._graphs is not None:
            self._graphs.rounds.end()
        for state in plan.new_sequences:
            self._table.install(state)
        self._delays.on_installed(state.slot for state in plan.new_sequences)
        rows, drafted = plan.rows, None
        self._table.append_new_blocks(rows)
        if self._drafter is not None:
            for state in plan.new_sequences:
                self._drafter.install(state)
            drafting = self._drafter.begin(rows, functools.partial(self._wait_for_turn, plan))
            graphs = None if drafting is None else self._graphs
            if drafting is not None and graphs is not None and graphs.fits(rows) and graphs.are_plain(rows):
                return self._launch_with_guesses(plan, drafting, graphs, timer)
            if drafting is not None:
                rows, drafted = self._drafter.with_guesses(drafting, self.spec.vocab_size)
        self._table.grammars.advance(rows)
        if not rows:
            return PendingStep(plan, None, [], timer)
        if self._graphs is not None and self._graphs.fits(rows):
            rounds = 1 if any(row.num_to_draft for row in plan.rows) else plan.rounds
            take_turn = functools.partial(self._wait_for_turn, plan)
            sampled, num_logprobs = self._graphs.launch(rows, take_turn, timer, rounds)
            grammars = self._table.grammars
            missing, forced = grammars.take_missing(), grammars.take_forced()
            return PendingStep(plan, sampled, num_logprobs, timer, None, missing, drafted, forced)
        board = self._wait_for_turn(plan)
        rows = rows if board is None else board.with_tokens(rows)
        batch = build_batch(rows, self._table, self.layout.block_size, self.platform.device)
        timer.start()
        self._attention.begin(batch.attention)
        if self._prefill_graphs is not None and self._prefill_graphs.fits(len(batch.token_ids)):
            hidden = self._prefill_graphs.forward(batch, on_stored, self._layers)
        else:
            decoder, attention = self._decoder, self._attention
            hidden = decoder.forward(batch.token_ids, batch.positions, attention, on_stored, self._layers)
        scores = None
        if batch.scored is not None:
            scores = score(hidden, batch.scored, self._decoder.logits, self.spec.vocab_size)
        if not batch.num_logprobs:
            return PendingStep(plan, None, [], timer, scores, None, drafted)
        sampled = sample(self._decoder.logits(hidden[batch.sampled_tokens]), batch.sampling)
        self._table.note_sampled(batch.sampled_slots, sampled.token_ids, batch.sampling.penalties)
        missing, forced = self._table.grammars.take_missing(), self._table.grammars.take_forced()
        return PendingStep(plan, sampled, batch.num_logprobs, timer, scores, missing, drafted, forced)

    def _launch_with_guesses(
        self, plan: StepPlan, drafting: Drafting, graphs: DecodeGraphs, timer: StepTimer
    ) -> PendingStep:
        """Launch a step whose guesses are being made: the host prepares all but their tokens meanwhile."""
        assert self._drafter is not None, "something makes the guesses"
        drafter, found = self._drafter, []

        def with_guesses() -> list[PlanRow]:
            found.append(drafter.with_guesses(drafting, self.spec.vocab_size))
            return found[0][0]

        take_turn = functools.partial(self._wait_for_turn, plan)
        sampled, num_logprobs = graphs.launch(plan.rows, take_turn, timer, with_guesses=with_guesses)
        return PendingStep(plan, sampled, num_logprobs, timer, drafted=found[0][1])

    def _wait_for_turn(self, plan: StepPlan) -> StepBoard | None:
        """Wait for the other worker's step that must come first; return the board with the tokens sampled elsewhere."""
        if self.board is not None and plan.after is not None:
            self.board.wait(plan.after)
        return self.board


def _in_fp8(spec: ModelSpec) -> list[str]:
    """Name what is in FP8, for the log."""
    weights = [f", weights {spec.weights_name}"] if spec.weights_name else []
    return weights if spec.kv_format is None else [*weights, ", FP8 KV"]
