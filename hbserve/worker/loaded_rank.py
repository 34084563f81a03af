"""A loaded rank: its device, its part of the model, its KV transfers. Every rank loads them in its main thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hbserve.config import Config, InstanceConfig
from hbserve.kv_tiers.base import namespace
from hbserve.kv_tiers.rank_tiers import RankTiers
from hbserve.kv_transfer.head_split import Shard
from hbserve.kv_transfer.one_sided.base import ArenaSharing
from hbserve.kv_transfer.rank_transfers import RankTransfers
from hbserve.messages.tiers import FoundBlocks, HostMemory, TierResult
from hbserve.messages.transfer import TransferReply
from hbserve.model_files import is_eagle3_head
from hbserve.process.stopwatch import Stopwatch

if TYPE_CHECKING:
    from hbserve.engine.arenas import ArenaAttachment
    from hbserve.engine.model_runner import ModelRunner
    from hbserve.platform import Partition, Platform


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank that has loaded everything and can serve.

    Attributes:
        model_fingerprint: see `hbserve.models.fingerprint.model_fingerprint`.
    """

    model_fingerprint: str
    platform: Platform
    runner: ModelRunner
    transfers: RankTransfers
    tiers: RankTiers


@contextmanager
def loaded_rank(
    config: Config,
    instance: InstanceConfig,
    tp_rank: int,
    port: int,
    listener: int | None,
    report: Callable[[TransferReply], None],
    attachment: ArenaAttachment | None = None,
    partition: Partition | None = None,
    stopwatch: Stopwatch | None = None,
    host: HostMemory | None = None,
    report_copy: Callable[[TierResult], None] = lambda result: None,
    defers_graphs: bool = False,
    report_found: Callable[[FoundBlocks], None] = lambda found: None,
) -> Iterator[LoadedRank]:
    """Load one rank's part of the model. The body runs without gradients; that holds for its own thread only.

    Args:
        config: of the system.
        instance: whose rank this is.
        tp_rank: its number, from 0.
        port: where the ranks of the instance meet.
        listener: descriptor of the socket that listens there, for rank 0.
        report: called with the results of transfers, in the event loop's thread.
        attachment: to arenas that another process holds; None: the rank makes its own.
        partition: its share of the device.
        stopwatch: measures the parts of the start: ``imports``, ``driver``, ``device``, ``ranks`` (meeting them),
            those of `ModelRunner`, ``fingerprint`` (the wait for it), and ``transfers``.
        host: memory of the host for KV blocks.
        report_copy: called with the results of copies to and from KV tiers, in any thread.
        defers_graphs: see `ModelRunner`.
        report_found: called with the answers to lookups in KV tiers, in any thread.

    Raises:
        HBServeError: if the model cannot be served as configured.
    """
    import torch  # takes seconds; other processes start meanwhile

    from hbserve.engine.model_runner import ModelRunner
    from hbserve.engine.process_group import join_group
    from hbserve.models.fingerprint import WeightsDigest, model_fingerprint
    from hbserve.platform import Partition, make_platform

    stopwatch = stopwatch or Stopwatch()
    stopwatch.lap("imports")
    size = instance.num_ranks
    others = (other for other in config.gpu_instances if other.instance_id != instance.instance_id)
    if partition is None and any(map(instance.shares_gpu_with, others)):
        partition = Partition()  # each instance on this device may use all of it
    num_instances = len(config.gpu_instances)
    platform = make_platform(
        config.model.device, instance.gpu_id, instance.num_threads, num_instances, tp_rank, size, partition
    )
    stopwatch.lap("driver")
    platform.activate()
    platform.probe()
    stopwatch.lap("device")
    dummy_seed = config.model.seed if config.model.load_format == "dummy" else None
    with torch.inference_mode():
        timeout_s = max(config.rpc.start_timeout_s, config.rpc.step_timeout_s)
        parallel = join_group(platform, tp_rank, size, port, listener, timeout_s)
        stopwatch.lap("ranks")
        head = config.speculation.model  # blocks have what a head makes of hidden states, so it counts for the model
        folders = [config.model.path, *([head] if head is not None and is_eagle3_head(Path(head)) else [])]
        with ExitStack() as stack:
            digests = [stack.enter_context(WeightsDigest(folder, dummy_seed)) for folder in folders]
            runner = ModelRunner(config, instance, platform, parallel, attachment, stopwatch, defers_graphs)
            fingerprint = model_fingerprint("".join(digest.result() for digest in digests), runner.spec)
        stopwatch.lap("fingerprint")
        sharing = ArenaSharing(runner.kv_handle, platform.open_arena)
        shard = Shard.of_rank(tp_rank, size, runner.spec.num_kv_heads, runner.layout)
        transfers = RankTransfers(config, instance, shard, runner.kv_blocks, report, sharing)
        facts = fingerprint, config.model.quantization, runner.dtype, runner.layout, runner.spec.num_kv_heads, size
        tiers = RankTiers(
            config.kv_cache,
            host,
            platform,
            runner.kv_blocks,
            tp_rank,
            size,
            report_copy,
            namespace(*facts),
            report_found,
        )
        stopwatch.lap("transfers")
        yield LoadedRank(fingerprint, platform, runner, transfers, tiers)
