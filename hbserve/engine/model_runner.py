"""A worker's model: step plans in, sampled tokens out."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

import torch

from hbserve.attention import select_attention_backend
from hbserve.config import Config, InstanceConfig
from hbserve.engine.batch import build_batch
from hbserve.engine.kv_sizing import size_kv
from hbserve.engine.pending_step import PendingStep, StepTimer
from hbserve.engine.sampler import sample
from hbserve.engine.sequence_table import SequenceTable
from hbserve.errors import ConfigError
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.parallel import TensorParallel
from hbserve.messages import StepPlan
from hbserve.models.decoder import Decoder
from hbserve.models.loader import fill_dummy_weights, load_weights
from hbserve.models.spec import DTYPES, ModelSpec
from hbserve.models.weights import WeightTable
from hbserve.platform import Platform

if TYPE_CHECKING:
    from hbserve.engine.decode_graphs import DecodeGraphs
    from hbserve.engine.prefill_graphs import PrefillGraphs

__all__ = ["ModelRunner", "PendingStep"]

logger = logging.getLogger(__name__)


class ModelRunner:
    """Weights, KV cache and sequence table of one rank, and the step that ties them together.

    Not thread-safe: one thread launches. Plans take effect in the order of their launch.

    Args:
        platform: activated already.
        parallel: the ranks that compute the model together; every one must launch the same plans.

    Attributes:
        spec: the model. parallel: as given. layout: of this rank's part of a KV block.
        num_blocks: of the KV cache; max_model_len: most tokens of prompt and output together; both
            are the same on all ranks.
        kv_blocks: uint8 ``[block, bytes]``, the KV cache as transfers move it.

    Raises:
        ModelError: if the model folder cannot be served.
        ConfigError: if the configuration does not fit model or device.
    """

    @torch.inference_mode(False)  # transfers write to the KV cache from other threads, outside of that mode
    def __init__(
        self,
        config: Config,
        instance: InstanceConfig,
        platform: Platform,
        parallel: TensorParallel | None = None,
    ) -> None:
        self.platform = platform
        self.parallel = parallel = parallel or TensorParallel()
        self.spec = ModelSpec.load(config.model.path)
        dtype = self.spec.dtype if config.model.dtype == "auto" else DTYPES[config.model.dtype]
        backend = select_attention_backend(config.model.attention_backend, self.spec, dtype, platform)

        table = WeightTable.build(self.spec, dtype, parallel.rank, parallel.size)
        weights = _allocate(platform, table.num_bytes, "the model's weights")
        if config.model.load_format == "dummy":
            fill_dummy_weights(table, weights, config.model.seed)
        else:
            load_weights(config.model.path, self.spec, table, weights, parallel.rank, parallel.size)
        self._decoder = Decoder(self.spec, table.views(weights), parallel)

        block_size = config.performance.block_size or backend.preferred_block_size
        if block_size % backend.block_size_multiple:
            raise ConfigError(
                f"performance.block_size: {backend.name} attention needs a multiple of "
                f"{backend.block_size_multiple}, not {block_size}"
            )
        self.layout = KVLayout(
            num_layers=self.spec.num_layers,
            block_size=block_size,
            num_kv_heads=max(1, self.spec.num_kv_heads // parallel.size),
            head_dim=self.spec.head_dim,
            dtype=dtype,
        )
        size = size_kv(config, self.spec, self.layout, platform, parallel.size)
        sizes = torch.tensor([size.num_blocks, size.max_model_len], device=platform.device)
        self.num_blocks, self.max_model_len = parallel.minimum(sizes).tolist()
        kv_bytes = self.num_blocks * self.layout.block_bytes
        kv_arena = _allocate(platform, kv_bytes, f"a KV cache of {self.num_blocks} blocks")
        self.kv_blocks = self.layout.block_bytes_view(kv_arena, self.num_blocks)
        kv_cache = self.layout.view(kv_arena, self.num_blocks)
        self._attention = backend(self.spec, self.layout, kv_cache, platform, parallel.size)
        self._table = SequenceTable(
            max_num_seqs=config.performance.max_num_seqs,
            max_blocks_per_seq=-(-self.max_model_len // self.layout.block_size),
            num_blocks=self.num_blocks,
            vocab_size=self.spec.vocab_size,
            device=platform.device,
            tokenizer_folder=config.tokenizer_path,
        )
        self._prefill_graphs: PrefillGraphs | None = None
        self._graphs = self._capture_graphs(config)
        logger.info(
            "%s: %s in %s on %s, %d KV blocks of %d tokens, sequences up to %d tokens, attention by %s",
            *(instance.instance_id, self.spec.architecture, dtype, platform.describe(), self.num_blocks),
            *(self.layout.block_size, self.max_model_len, backend.name),
        )

    @torch.inference_mode()
    def _capture_graphs(self, config: Config) -> DecodeGraphs | None:
        if not config.cuda_graph.enabled:
            return None
        if self.platform.name != "cuda":
            logger.info("no CUDA graphs: there are none on the %s platform", self.platform.name)
            return None
        if importlib.util.find_spec("triton") is None:
            logger.warning("no CUDA graphs: Triton is not installed, so decode steps run eagerly and slower")
            return None
        from hbserve.attention.paged_decode import PagedDecode
        from hbserve.engine.decode_graphs import DecodeGraphs
        from hbserve.engine.prefill_graphs import PrefillGraphs

        reason = PagedDecode.supports(self.spec, self.layout)
        if reason is not None:
            logger.warning("no CUDA graphs: the attention that can be captured %s; decode steps are slower", reason)
            return None
        heads = self.spec.num_heads // self.parallel.size
        attention = PagedDecode(self.layout, self._attention.kv_cache, heads, self._table.max_num_seqs)
        graphs = DecodeGraphs(self._decoder, attention, self._table, config.cuda_graph.max_seq_len)
        # The sampler and FlashInfer keep memory of their own, so a step's tokens are all that counts here.
        max_tokens = config.performance.max_num_batched_tokens
        self._prefill_graphs = PrefillGraphs(self._decoder, self._attention, max_tokens, graphs.pool)
        return graphs

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step; on CPU also finish it. The plan's ``sends`` are not looked at.

        A plan that contradicts what the runner knows of a slot is a bug of its sender and fails an
        assertion.
        """
        timer = StepTimer(self.platform.device)
        for state in plan.new_sequences:
            self._table.install(state)
        self._table.append_new_blocks(plan.rows)
        self._table.grammars.advance(plan.rows)
        if not plan.rows:
            return PendingStep(plan, None, [], timer)
        if self._graphs is not None and self._graphs.fits(plan.rows):
            return PendingStep(plan, *self._graphs.launch(plan.rows, timer), timer)
        batch = build_batch(plan.rows, self._table, self.layout.block_size, self.platform.device)
        timer.start()
        self._attention.begin(batch.attention)
        if self._prefill_graphs is not None and self._prefill_graphs.fits(len(batch.token_ids)):
            hidden = self._prefill_graphs.forward(batch)
        else:
            hidden = self._decoder.forward(batch.token_ids, batch.positions, self._attention)
        if not batch.num_logprobs:
            return PendingStep(plan, None, [], timer)
        sampled = sample(self._decoder.logits(hidden[batch.sampled_tokens]), batch.sampling)
        self._table.note_sampled(batch.sampled_slots, sampled.token_ids, batch.sampling.penalties)
        return PendingStep(plan, sampled, batch.num_logprobs, timer)


def _allocate(platform: Platform, num_bytes: int, what: str) -> torch.Tensor:
    try:
        return platform.allocate_arena(num_bytes)
    except RuntimeError:  # torch's own message shows the allocator, not what it was for
        needed, free = (f"{x / (1 << 30):.1f} GiB" for x in (num_bytes, platform.free_memory_bytes()))
        raise ConfigError(f"{what} takes {needed}, and {platform.describe()} has {free} free") from None
