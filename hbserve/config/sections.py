"""Sections of the configuration: one struct each, whose fields are the keys of the YAML file and carry their limits.

docs/configuration.md explains every key; the docstrings here keep what a reader of the code needs.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from hbserve.config.fields import (
    Fraction,
    ImportPath,
    InstanceName,
    NonNegativeFloat,
    NonNegativeInt,
    Origin,
    Port,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    ServerPort,
    TraceUrl,
)
from hbserve.config.kv import KVCacheConfig, KVTransferConfig
from hbserve.config.semi_pd import SemiPDConfig
from hbserve.errors import ConfigError
from hbserve.hints import nearest, shown


class InstanceRole(StrEnum):
    """Role of an instance: which phases its workers do. A mode is a set of roles and of KV pools.

    ``unified`` is one worker for both phases; ``semi_pd`` is a set of workers for each phase that share one
    device and one KV pool.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"
    SEMI_PD = "semi_pd"

    @property
    def prefills(self) -> bool:
        """Whether the instance computes prompts."""
        return self is not InstanceRole.DECODE

    @property
    def decodes(self) -> bool:
        """Whether the instance computes output tokens after the first one."""
        return self is not InstanceRole.PREFILL


Mode = Literal["auto", "unified", "disaggregated", "semi_pd"]
DEFAULT_MODE: Mode = "auto"


class ModelConfig(Section, frozen=True):
    """Model, and how it is loaded.

    Attributes:
        path: folder in Hugging Face layout (config.json, *.safetensors, tokenizer files), or a name to fetch.
        served_name: name in the HTTP API; default: from ``path``.
        tokenizer_path: folder of the tokenizer; default: the model's.
        device, dtype: ``auto`` takes CUDA where there is a GPU, and the checkpoint's dtype.
        generation_config: ``auto`` takes default sampling parameters from the model's generation_config.json.
        load_format: ``dummy`` makes random weights from config.json alone, from ``seed``.
        dummy_expert_skew: with ``dummy``, exponent of Zipf's law that the loads of experts follow; 0: all are alike.
        tensor_parallel_size: ranks of an instance: 1, 2, 4 or 8; an instance may override it.
        expert_parallel: the ranks of an instance have some experts each, not a slice of every expert.
        max_model_len: longest prompt plus output, in tokens; default: the limit of the model or of the KV pool.
        attention_backend: ``auto`` takes the fastest backend that supports model and device.
        quantization: ``fp8`` quantises an unquantised checkpoint while it is loaded; default: as the checkpoint is.
    """

    path: str
    served_name: str | None = None
    tokenizer_path: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    generation_config: Literal["auto", "none"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    dummy_expert_skew: NonNegativeFloat = 0.5
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    max_model_len: PositiveInt | None = None
    attention_backend: Literal["auto", "sdpa", "flashinfer", "flash_attn", "triton"] = "auto"
    quantization: Literal["fp8"] | None = None
    seed: NonNegativeInt = 0


class ChunkedPrefillConfig(Section, frozen=True):
    """Chunks of prompts: at most ``chunk_size`` tokens of one prompt, ``max_chunk_prefill_tokens`` of all, in one step.

    Without these limits the time that a step takes decides how many prompt tokens it has; see docs/scheduler.md.
    Without ``enabled`` each prompt is computed in one step, at any length.
    """

    enabled: bool = True
    chunk_size: PositiveInt | None = None
    max_chunk_prefill_tokens: PositiveInt | None = None


class CudaGraphConfig(Section, frozen=True):
    """CUDA graphs for decode steps without a sequence longer than ``max_seq_len``; the CPU platform has none."""

    enabled: bool = True
    max_seq_len: PositiveInt = 131072


MAX_DRAFT_TOKENS = 15


class SpeculationConfig(Section, frozen=True):
    """Speculative decoding: several tokens of a sequence in one step, and the same tokens as without it.

    Attributes:
        method: ``none``: only a request's own ``prediction`` is tried; ``ngram``: tokens that followed the last three
            when they were in the prompt or the output before; ``suffix``: what followed the longest match, there or in
            recent outputs of the same ``cache_salt``; ``draft_model``: a small model in the same workers; ``eagle3``: a
            head in the same workers that reads the model's hidden states; ``auto``: whichever of these was right more
            often, the draft model or head among them if ``model`` names one.
        model: folder or name of the draft model, which must have the same vocabulary, or of the head.
        max_draft_tokens: guesses of one sequence in one step, at most; acceptance and step times decide how many.
    """

    method: Literal["none", "ngram", "suffix", "draft_model", "eagle3", "auto"] = "none"
    model: str | None = None
    max_draft_tokens: Annotated[int, Meta(ge=1, le=MAX_DRAFT_TOKENS, description=f"in 1..{MAX_DRAFT_TOKENS}")] = 7


class InstanceConfig(Section, frozen=True):
    """Instance: the processes (one per rank) that run one copy of the model.

    Attributes:
        gpu_id: first GPU of the instance, which has one GPU per rank, in order; ignored on CPU.
        host: host where the instance runs, and listens for the scheduler.
        bind: address or network interface to listen on; default: ``host``.
        port: port of that listener; default: a private local socket, which needs a common launcher.
        kv_ip: address that the instance announces for transfers; default: ``kv_transfer.ip``, or the host.
        kv_rank: number among the KV transfer peers; default: place in the list.
        num_threads: CPU threads of each rank, on CPU; default: the machine's cores shared evenly.
        tensor_parallel_size: number of ranks; default: that of the model. Prefill and decode instances may differ.
    """

    instance_id: InstanceName
    instance_type: InstanceRole
    gpu_id: NonNegativeInt = 0
    host: str = "127.0.0.1"
    bind: str | None = None
    port: Port | None = None
    kv_ip: str | None = None
    kv_rank: NonNegativeInt | None = None
    num_threads: PositiveInt | None = None
    tensor_parallel_size: int | None = None

    @property
    def num_ranks(self) -> int:
        """The ``tensor_parallel_size``, which a complete configuration has."""
        assert self.tensor_parallel_size is not None
        return self.tensor_parallel_size

    def shares_gpu_with(self, other: InstanceConfig) -> bool:
        """Whether the two have a GPU in common."""
        end = min(self.gpu_id + self.num_ranks, other.gpu_id + other.num_ranks)
        return self.host == other.host and max(self.gpu_id, other.gpu_id) < end


class PerformanceConfig(Section, frozen=True):
    """Sizes and limits of batches, KV cache and queues.

    Attributes:
        max_num_seqs: maximum of sequences that one instance holds at a time.
        max_num_batched_tokens: maximum of tokens in one step, prompt and decode tokens together.
        block_size: tokens per KV block, a power of two; default: the attention backend's preference.
        num_blocks: KV blocks per instance; default: from ``memory_fraction``, the KV arena's share of the memory that
            is free after the weights are loaded.
        decode_headroom_tokens: tokens per running sequence for which blocks stay free when a new request is admitted.
        placement: choice of the instance for a request: ``least_loaded``; ``fcfs``, the first in the list that has
            room; ``prefix_aware``, the one that has most of the prompt cached, unless its queue is too long.
        pipeline_depth: maximum of plans in flight per worker. Steps below 3 ms have up to three more; long steps have
            one, until shortly before their end.
        max_waiting_requests: a longer queue is refused with `OverloadedError` (HTTP 503).
        scheduler: ``package.module:Class``, a subclass of `hbserve.scheduler.scheduler.CpuScheduler`.
    """

    max_num_seqs: PositiveInt = 256
    max_num_batched_tokens: PositiveInt = 8192
    block_size: PositiveInt | None = None
    num_blocks: PositiveInt | None = None
    memory_fraction: Fraction = 0.9
    enable_prefix_caching: bool = True
    decode_headroom_tokens: NonNegativeInt = 64
    placement: Literal["least_loaded", "fcfs", "prefix_aware"] = "least_loaded"
    pipeline_depth: PositiveInt = 2
    max_waiting_requests: PositiveInt = 4096
    scheduler: ImportPath | None = None


class SchedulerConfig(Section, frozen=True):
    """Order of waiting prompts, and refusal of late ones.

    Attributes:
        policy: ``slo_aware``: as many prompts within their TTFT targets as possible, by arrival where there are no
            targets; ``fcfs``: first come, first served; ``shortest_prompt_first``.
        ageing_tokens_per_s: under ``shortest_prompt_first``, tokens by which a prompt shrinks per second of waiting.
        ttft_ms, tpot_ms: targets of requests that have none of their own.
        ttft_ms_per_1k_tokens: added to ``ttft_ms`` for every 1000 tokens of the prompt.
        targets_are_soft: the targets are a guess of what clients want; mode ``auto`` sets it with the targets of the
            machine. Prompts are then in nearly the order of arrival; at most 0.7 % of them stand back for others.
        targets_by_default: without ``ttft_ms`` and ``tpot_ms`` they are multiples of what a lone request takes on this
            machine (`hbserve.system.auto_plan`).
        max_queue_s: a request whose first token is predicted to take longer is refused at once, with the time after
            which to try again.
    """

    policy: Literal["slo_aware", "fcfs", "shortest_prompt_first"] = "slo_aware"
    ageing_tokens_per_s: PositiveFloat = 1000.0
    ttft_ms: PositiveFloat | None = None
    ttft_ms_per_1k_tokens: NonNegativeFloat = 0.0
    tpot_ms: PositiveFloat | None = None
    targets_are_soft: bool = False
    targets_by_default: bool = True
    max_queue_s: Seconds | None = None

    def ttft_target_ms(self, num_prompt_tokens: int) -> float | None:
        """Return the TTFT target of a request that has none of its own; None for no target."""
        if self.ttft_ms is None:
            return None
        return self.ttft_ms + self.ttft_ms_per_1k_tokens * num_prompt_tokens / 1000


class RpcConfig(Section, frozen=True):
    """Control plane: addresses and deadlines.

    Attributes:
        host, port: address where the scheduler listens for clients; default: a private local socket.
        key_file: cluster key, made by ``python -m hbserve.rpc.cluster_key``: control sockets over TCP then
            accept only holders of the key. Without a key, processes listen on this host alone.
        heartbeat_interval_s: time between two pings from the scheduler to an instance.
        heartbeat_timeout_s, step_timeout_s: an instance that does not answer, or finish a step, for so long is lost.
            So is a scheduler that does not answer its clients.
        start_timeout_s: the system must be ready within this time, else the error names the missing parts.
        recovery_timeout_s: requests wait so long for a lost instance, or a lost scheduler, to come back, then fail.
        drain_timeout_s: an instance that is told to end on its own has so long to finish its requests.
        max_restarts: restarts of one process within ten minutes; after one more exit it stays down.
    """

    host: str = "127.0.0.1"
    port: Port | None = None
    key_file: str | None = None
    heartbeat_interval_s: Seconds = 0.5
    heartbeat_timeout_s: Seconds = 10.0
    step_timeout_s: Seconds = 120.0
    start_timeout_s: Seconds = 300.0
    recovery_timeout_s: Seconds = 120.0
    drain_timeout_s: Seconds = 60.0
    max_restarts: NonNegativeInt = 5


class ServerConfig(Section, frozen=True):
    """HTTP server.

    Attributes:
        port: port to listen on; 0: any free one, printed at start.
        num_tokenizers: processes that encode prompts; 0: the detokenizer encodes them too.
        api_keys_file: one key per line, with an optional name before it; without keys the API is open.
        admin_key_file: file with the key for administration; without it administration is off.
        cors_origins: origins of web pages whose scripts may use the API from a browser; ``*``: of all pages.
        tls_cert_file, tls_key_file: PEM files; with both the server speaks HTTPS.
        max_open_requests: requests that are with the scheduler at once; others wait, and keys take turns.
        max_requests_per_key, requests_per_minute_per_key: requests that one key may have open, or begin.
        request_timeout_s: a request that takes longer ends with an error.
        drain_timeout_s: at the end open requests have so long to finish, then they end with an error.
    """

    host: str = "127.0.0.1"
    port: ServerPort = 8000
    num_tokenizers: NonNegativeInt = 0
    api_keys_file: str | None = None
    admin_key_file: str | None = None
    cors_origins: tuple[Origin, ...] = ()
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    max_body_bytes: PositiveInt = 33554432
    max_prompt_tokens: PositiveInt | None = None
    max_open_requests: PositiveInt | None = None
    max_requests_per_key: PositiveInt | None = None
    requests_per_minute_per_key: PositiveInt | None = None
    request_timeout_s: Seconds | None = None
    drain_timeout_s: Seconds = 10.0


class LoggingConfig(Section, frozen=True):
    """Log on standard error: least level, and ``text`` for people or ``json``, one object per line, for programs."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


class TelemetryConfig(Section, frozen=True):
    """Telemetry for other systems: ``otlp_endpoint`` is the URL of an OTLP/HTTP receiver of traces."""

    otlp_endpoint: TraceUrl | None = None


class Config(Section, frozen=True):
    """Configuration of a system: frozen, validated, and the same in every process. The sections explain the keys.

    Attributes:
        mode: ``auto`` until a system starts; `hbserve.system.auto_plan` then puts the mode that it chose in its place.
            Its instances are ``unified`` until then.
        launcher: starter of the instances: the server itself, or a Ray cluster, on hosts of its choice.
    """

    model: ModelConfig
    mode: Mode = DEFAULT_MODE
    launcher: Literal["local", "ray"] = "local"
    gpu_instances: tuple[InstanceConfig, ...] = ()
    kv_transfer: KVTransferConfig = KVTransferConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()
    chunked_prefill: ChunkedPrefillConfig = ChunkedPrefillConfig()
    cuda_graph: CudaGraphConfig = CudaGraphConfig()
    performance: PerformanceConfig = PerformanceConfig()
    semi_pd: SemiPDConfig = SemiPDConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    rpc: RpcConfig = RpcConfig()
    server: ServerConfig = ServerConfig()
    logging: LoggingConfig = LoggingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def max_ranks(self) -> int:
        """Largest number of ranks of an instance."""
        return max(instance.num_ranks for instance in self.gpu_instances)

    @property
    def prefill_budget(self) -> int:
        """Largest number of prompt tokens in a step."""
        budget, chunked = self.performance.max_num_batched_tokens, self.chunked_prefill
        return min(budget, (chunked.enabled and chunked.max_chunk_prefill_tokens) or budget)

    @property
    def max_chunk(self) -> int:
        """Largest number of one prompt's tokens in a step."""
        budget, chunked = self.prefill_budget, self.chunked_prefill
        return min(budget, (chunked.enabled and chunked.chunk_size) or budget)

    @property
    def served_name(self) -> str:
        """The model's name in the HTTP API."""
        return self.model.served_name or Path(self.model.path).name

    @property
    def tokenizer_path(self) -> str:
        """Folder of the tokenizer."""
        return self.model.tokenizer_path or self.model.path

    def instance(self, instance_id: str) -> InstanceConfig:
        """Return the instance of that name.

        Raises:
            ConfigError: if there is none.
        """
        names = [instance.instance_id for instance in self.gpu_instances]
        if instance_id not in names:
            hint = nearest(instance_id, names)
            raise ConfigError(f"gpu_instances: no instance {shown(instance_id)}{hint}", "gpu_instances")
        return self.gpu_instances[names.index(instance_id)]
