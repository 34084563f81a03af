"""The one configuration of a system: frozen, validated when made, the same in every process.

Each section is a struct whose fields are the keys of the YAML file. `hbserve.config.load` reads a file;
errors name the key, the file, the line and the nearest valid name. The flat, mutable builder that
Python users know is `hbserve.pd_disagg.PdDisaggConfig`; it ends in a `Config` too.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

from hbserve.config.semi_pd import Section, SemiPDConfig, nearest
from hbserve.errors import ConfigError


class InstanceRole(StrEnum):
    """What an instance's workers do. A mode is nothing but which roles exist on which KV pools.

    ``unified`` is one worker for both phases; ``semi_pd`` are workers for each phase that share one
    device and one KV pool.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"
    SEMI_PD = "semi_pd"

    @property
    def prefills(self) -> bool:
        """Whether prompts are processed there."""
        return self is not InstanceRole.DECODE

    @property
    def decodes(self) -> bool:
        """Whether output tokens are produced there after the first one."""
        return self is not InstanceRole.PREFILL


Mode = Literal["unified", "disaggregated", "semi_pd"]


class ModelConfig(Section, frozen=True):
    """Which model, and how it is held.

    Attributes:
        path: folder in Hugging Face layout (config.json, *.safetensors, tokenizer files).
        served_name: the name in the HTTP API; default: the folder's name.
        tokenizer_path: folder of the tokenizer, if it is not the model's.
        device: ``auto`` takes CUDA where there is a GPU, else the CPU.
        dtype: ``auto`` takes the checkpoint's dtype on a GPU and on CPU.
        load_format: ``safetensors``, or ``dummy`` for random weights from config.json alone.
        tensor_parallel_size: ranks that share an instance's model: 1, 2, 4 or 8; an instance may say otherwise.
        max_model_len: longest prompt plus output, tokens; default: the model's own limit, or less
            if the KV pool holds less.
        attention_backend: ``auto`` takes the fastest one that supports model and device.
        seed: of the dummy weights.
    """

    path: str
    served_name: str | None = None
    tokenizer_path: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    attention_backend: Literal["auto", "sdpa", "flashinfer", "flash_attn"] = "auto"
    seed: int = 0


class KVTransferConfig(Section, frozen=True):
    """How KV blocks move between instances.

    Attributes:
        backend: ``nccl`` is torch.distributed: NCCL between GPUs, gloo where a side has none;
            ``mooncake`` is the Mooncake Transfer Engine, which writes straight into the receiver's
            arena; ``shm`` maps it (shared memory, CUDA IPC), on one host; or ``package.module:Class``, a subclass
            of `hbserve.kv_transfer.base.KVTransferBase`.
        buffer_size: bytes of staging memory per instance, shared evenly by its ranks; transfers wait
            when it is full.
        ip: address that instances announce for transfers; default: the instance's own host.
        port: base port; of the instance with KV rank r, tensor-parallel rank t listens on
            port + r * s + t, where s is the largest number of ranks of an instance. Mooncake's engines choose from
            port to port + 999. Default: any free ports.
        timeout_s: a transfer that takes longer has failed.
        max_attempts: how often a request is tried without getting on before it fails.
        local_prefill_tokens: prompts of which at most so many tokens are to be computed on the decode
            side, being short or mostly in its prefix cache, are computed there and not transferred.
        layer_group_bytes: the last chunk of a prompt leaves in up to four groups of layers, each as soon as it is
            computed and of at least so many bytes; 0: as a whole.
        verify: compare checksums of every block before it is used; what differs is computed again.
        mooncake_protocol: how Mooncake moves bytes; default: what the file that
            ``MOONCAKE_CONFIG_PATH`` names says, or the engine's own choice.
        mooncake_device: RDMA adapters that Mooncake uses, comma-separated; default: that file's, or all.
    """

    backend: str = "nccl"
    buffer_size: int = 1 << 30
    ip: str | None = None
    port: int | None = None
    timeout_s: float = 30.0
    max_attempts: int = 3
    local_prefill_tokens: int = 0
    layer_group_bytes: int = 4 << 20
    verify: bool = False
    mooncake_protocol: Literal["tcp", "rdma", "nvlink"] | None = None
    mooncake_device: str | None = None


class ChunkedPrefillConfig(Section, frozen=True):
    """How prompts are cut.

    Attributes:
        enabled: False processes each prompt in one step, however long.
        chunk_size: most tokens of one prompt in one step.
        max_chunk_prefill_tokens: most prompt tokens of all requests in one step.
    """

    enabled: bool = True
    chunk_size: int = 512
    max_chunk_prefill_tokens: int = 4096


class CudaGraphConfig(Section, frozen=True):
    """CUDA graphs for decode; the CPU platform has none and says so at start.

    Attributes:
        enabled: capture decode steps.
        max_seq_len: batches with a longer sequence run eagerly.
    """

    enabled: bool = True
    max_seq_len: int = 131072


class InstanceConfig(Section, frozen=True):
    """One instance: the processes (one per rank) that run one copy of the model.

    Attributes:
        instance_id: its name.
        instance_type: its role.
        gpu_id: first GPU of the instance, which has one per rank, in order; has no meaning on CPU.
        host: where the instance runs, and listens for the scheduler.
        bind: address or network interface to listen on, where that is not ``host`` itself.
        port: of that listener; default: a private local socket, which needs a common launcher.
        kv_ip: address that it announces for transfers; default: ``kv_transfer.ip``, or the host.
        kv_rank: its number among the KV transfer peers; default: its place in the list.
        num_threads: CPU threads of each rank, on CPU; default: the machine's cores shared evenly.
        tensor_parallel_size: its ranks: 1, 2, 4 or 8; default: ``model.tensor_parallel_size``. Prefill
            and decode instances may differ.
    """

    instance_id: str
    instance_type: InstanceRole
    gpu_id: int = 0
    host: str = "127.0.0.1"
    bind: str | None = None
    port: int | None = None
    kv_ip: str | None = None
    kv_rank: int | None = None
    num_threads: int | None = None
    tensor_parallel_size: int | None = None

    @property
    def num_ranks(self) -> int:
        """Its ``tensor_parallel_size``, which a complete configuration has."""
        assert self.tensor_parallel_size is not None
        return self.tensor_parallel_size

    def shares_gpu_with(self, other: InstanceConfig) -> bool:
        """Whether the two have a GPU in common."""
        begin, end = max(self.gpu_id, other.gpu_id), min(self._gpu_end, other._gpu_end)
        return self.host == other.host and begin < end

    @property
    def _gpu_end(self) -> int:
        return self.gpu_id + self.num_ranks


class PerformanceConfig(Section, frozen=True):
    """Sizes and limits of batches, KV cache and queues.

    Attributes:
        max_num_seqs: most sequences that one instance holds at a time.
        max_num_batched_tokens: most tokens in one step, prompt and decode tokens together.
        block_size: tokens per KV block; default: what the attention backend likes best.
        num_blocks: KV blocks per instance; default: from ``memory_fraction``.
        memory_fraction: share of the free memory, after the weights are loaded, that the KV arena
            takes when ``num_blocks`` is not given.
        enable_prefix_caching: reuse the KV of equal prompt prefixes.
        decode_headroom_tokens: tokens per running sequence for which blocks are kept free when a
            new request is admitted.
        placement: which of several instances a request goes to: ``least_loaded``; ``fcfs``, the first in
            the list that has room; ``prefix_aware``, where most of its prompt is cached, unless too much
            else waits there.
        pipeline_depth: most plans in flight per worker; one more in steps below 2 ms; in long ones one, until shortly
            before their end.
        max_waiting_requests: a longer queue is refused with `OverloadedError` (HTTP 503).
        scheduler: ``package.module:Class``, a subclass of
            `hbserve.scheduler.scheduler.CpuScheduler` with another policy.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    enable_prefix_caching: bool = True
    decode_headroom_tokens: int = 64
    placement: Literal["least_loaded", "fcfs", "prefix_aware"] = "least_loaded"
    pipeline_depth: int = 2
    max_waiting_requests: int = 4096
    scheduler: str | None = None


class SchedulerConfig(Section, frozen=True):
    """Whose prompt is computed next, and who is sent away.

    Attributes:
        policy: ``fcfs``: first come, first served; ``shortest_prompt_first``; ``slo_aware``: who must
            start soonest to keep its TTFT target.
        ageing_tokens_per_s: by so much a prompt seems shorter for every second it waits, under
            ``shortest_prompt_first``.
        ttft_ms, tpot_ms: targets of requests that come without.
        max_queue_s: a request whose first token is predicted to take longer is refused at once, and
            told when to come again; default: none is, for that reason.
    """

    policy: Literal["fcfs", "shortest_prompt_first", "slo_aware"] = "fcfs"
    ageing_tokens_per_s: float = 1000.0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    max_queue_s: float | None = None


class RpcConfig(Section, frozen=True):
    """Control plane: addresses and deadlines.

    Attributes:
        host: where the scheduler listens for clients (API servers).
        port: of that listener; default: a private local socket.
        key_file: cluster key, made by ``python -m hbserve.rpc.cluster_key``: control sockets over TCP then
            hear only who has it. Nothing listens beyond this host without one.
        heartbeat_interval_s: how often the scheduler asks an instance for a sign of life.
        heartbeat_timeout_s: an instance that has not answered for so long is lost.
        step_timeout_s: a worker that has not finished a step for so long is lost.
        start_timeout_s: the system must be ready within this time, else the error says who is missing.
        recovery_timeout_s: requests wait so long for a lost instance to come back, then fail.
        drain_timeout_s: an instance that is told to end on its own has so long to finish its requests;
            what is left is computed again elsewhere.
        max_restarts: how often the launcher restarts an instance that exits, within ten minutes.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    key_file: str | None = None
    heartbeat_interval_s: float = 0.5
    heartbeat_timeout_s: float = 10.0
    step_timeout_s: float = 120.0
    start_timeout_s: float = 300.0
    recovery_timeout_s: float = 120.0
    drain_timeout_s: float = 60.0
    max_restarts: int = 5


class ServerConfig(Section, frozen=True):
    """The HTTP server.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0: any free one, printed at start.
        num_tokenizers: processes that encode prompts; 0: the detokenizer does it too.
        api_keys_file: one key per line, a name before it if it has one; without keys none is asked for.
        admin_key_file: holds the key for administration; without it there is none.
        tls_cert_file, tls_key_file: PEM files; with both the server speaks HTTPS.
        max_body_bytes: of a request.
        max_prompt_tokens: a longer prompt is refused; default: what the context holds.
        max_open_requests: requests that are with the scheduler at once; others wait, and keys take turns.
        max_requests_per_key: requests that one key may have open at once.
        requests_per_minute_per_key: requests that one key may begin per minute.
        request_timeout_s: a request that takes longer ends with an error.
        drain_timeout_s: at the end open requests have so long to finish, then they are handed back.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    num_tokenizers: int = 0
    api_keys_file: str | None = None
    admin_key_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    max_body_bytes: int = 33554432
    max_prompt_tokens: int | None = None
    max_open_requests: int | None = None
    max_requests_per_key: int | None = None
    requests_per_minute_per_key: int | None = None
    request_timeout_s: float | None = None
    drain_timeout_s: float = 10.0


class LoggingConfig(Section, frozen=True):
    """What goes to standard error.

    Attributes:
        level: the least important message that is shown.
        format: ``text`` for people, ``json`` for programs: one object per line.
    """

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


class TelemetryConfig(Section, frozen=True):
    """What is sent to others about requests.

    Attributes:
        otlp_endpoint: URL of an OTLP/HTTP receiver of traces; default: no traces.
    """

    otlp_endpoint: str | None = None


class Config(Section, frozen=True):
    """Everything that defines a system; see the sections for the keys.

    Attributes:
        launcher: who starts the instances: the server itself, or a Ray cluster, on hosts of its choice.
    """

    model: ModelConfig
    mode: Mode = "unified"
    launcher: Literal["local", "ray"] = "local"
    gpu_instances: tuple[InstanceConfig, ...] = ()
    kv_transfer: KVTransferConfig = KVTransferConfig()
    chunked_prefill: ChunkedPrefillConfig = ChunkedPrefillConfig()
    cuda_graph: CudaGraphConfig = CudaGraphConfig()
    performance: PerformanceConfig = PerformanceConfig()
    semi_pd: SemiPDConfig = SemiPDConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    rpc: RpcConfig = RpcConfig()
    server: ServerConfig = ServerConfig()
    logging: LoggingConfig = LoggingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def max_ranks(self) -> int:
        """Of any instance."""
        return max(instance.num_ranks for instance in self.gpu_instances)

    @property
    def served_name(self) -> str:
        """The model's name in the HTTP API."""
        return self.model.served_name or Path(self.model.path).name

    @property
    def tokenizer_path(self) -> str:
        """Folder of the tokenizer."""
        return self.model.tokenizer_path or self.model.path

    def instance(self, instance_id: str) -> InstanceConfig:
        """The instance of that name.

        Raises:
            ConfigError: if there is none.
        """
        names = [instance.instance_id for instance in self.gpu_instances]
        if instance_id not in names:
            raise ConfigError(
                f"gpu_instances: no instance {instance_id!r}{nearest(instance_id, names)}", "gpu_instances"
            )
        return self.gpu_instances[names.index(instance_id)]
