"""Names that vLLM and SGLang give to what a key of ours does, and hints for unknown names.

The hint of a name in this table says our name and the unit. It holds for flags, keys of a file and Python arguments.
The names are those of vLLM's ``vllm serve --help`` and of SGLang's server arguments, with ``_`` for ``-``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from hbserve.config.keys import all_keys
from hbserve.hints import nearest

_VLLM, _SGLANG, _BOTH = "vLLM", "SGLang", "vLLM and SGLang"


class ForeignName(NamedTuple):
    """A name of another program.

    Attributes:
        whose: the program.
        key: our key; None if HBServe has nothing of the kind.
        note: unit of the key's value, or how it differs; without a key, what HBServe does instead.
    """

    whose: str
    key: str | None
    note: str


def _table(rows: Iterable[tuple[str, str, str | None, str]]) -> dict[str, ForeignName]:
    return {name: ForeignName(whose, key, note) for names, whose, key, note in rows for name in names.split()}


FOREIGN_NAMES = _table(
    (
        # the model
        ("model_path", _SGLANG, "model.path", "a folder, a .gguf file, or a name such as org/name"),
        ("revision", _BOTH, "model.path", "write it behind the name: org/name@revision"),
        ("download_dir", _BOTH, None, "HF_HOME is the folder of the hub's cache, HBSERVE_CACHE that of other models"),
        ("tokenizer", _VLLM, "model.tokenizer_path", "a folder"),
        ("served_model_name", _BOTH, "model.served_name", "one name"),
        ("context_length", _SGLANG, "model.max_model_len", "tokens of prompt and output together"),
        ("max_seq_len_override", _SGLANG, "model.max_model_len", "tokens of prompt and output together"),
        ("random_seed", _SGLANG, "model.seed", "of dummy weights; a request has its own seed"),
        ("sampling_defaults", _SGLANG, "model.generation_config", "auto or none"),
        ("tokenizer_mode", _BOTH, None, "the tokenizer follows from the model's files"),
        ("trust_remote_code", _BOTH, None, "HBServe runs no code from a model's folder; leave it out"),
        ("kv_cache_dtype", _BOTH, "kv_cache.dtype", "auto or fp8, which is e4m3"),
        ("enable_lora lora_modules lora_paths max_loras max_lora_rank", _BOTH, None, "HBServe has no LoRA"),
        ("chat_template", _BOTH, None, "requests may have a chat_template; else the model's own is used"),
        (
            "reasoning_parser tool_call_parser enable_auto_tool_choice",
            _BOTH,
            None,
            "the formats follow from the chat template; leave it out",
        ),
        ("guided_decoding_backend grammar_backend", _BOTH, None, "llguidance is always used; leave it out"),
        # GPUs and instances
        ("tp tp_size", _BOTH, "model.tensor_parallel_size", "GPUs of one instance: 1, 2, 4 or 8"),
        ("pipeline_parallel_size pp pp_size", _BOTH, None, "use model.tensor_parallel_size, or more gpu_instances"),
        ("data_parallel_size dp dp_size", _BOTH, "gpu_instances", "a list, one entry for each copy of the model"),
        ("enable_expert_parallel", _BOTH, "model.expert_parallel", "the ranks of an instance have whole experts"),
        ("ep_size", _BOTH, None, "use model.expert_parallel with model.tensor_parallel_size"),
        ("base_gpu_id", _SGLANG, "gpu_instances", "a list; each entry has a gpu_id"),
        ("distributed_executor_backend", _VLLM, "launcher", "local or ray"),
        ("nnodes node_rank dist_init_addr", _SGLANG, None, "each instance has a host; see docs/multi_node.md"),
        ("disable_custom_all_reduce", _BOTH, None, "ranks add by NCCL or by CUDA IPC, as the devices allow"),
        # memory and steps
        (
            "gpu_memory_utilization",
            _VLLM,
            "performance.memory_fraction",
            "a share of the memory that is free after the weights are loaded; vLLM's share is of all memory",
        ),
        (
            "mem_fraction_static",
            _SGLANG,
            "performance.memory_fraction",
            "a share of the memory that is free after the weights are loaded; SGLang's share holds the weights too",
        ),
        (
            "num_gpu_blocks_override",
            _VLLM,
            "performance.num_blocks",
            "KV blocks of one instance, of performance.block_size tokens each",
        ),
        (
            "max_total_tokens",
            _SGLANG,
            "performance.num_blocks",
            "KV blocks of one instance, of performance.block_size tokens each; not tokens",
        ),
        ("kv_cache_memory_bytes", _VLLM, "performance.num_blocks", "KV blocks of one instance; not bytes"),
        ("page_size", _SGLANG, "performance.block_size", "tokens, a power of two"),
        ("disable_radix_cache", _SGLANG, "performance.enable_prefix_caching", "false turns it off"),
        ("no_enable_prefix_caching", _VLLM, "performance.enable_prefix_caching", "false turns it off"),
        ("max_running_requests", _SGLANG, "performance.max_num_seqs", "sequences of one instance"),
        ("max_queued_requests", _SGLANG, "performance.max_waiting_requests", "requests"),
        ("scheduler_cls", _VLLM, "performance.scheduler", "package.module:Class"),
        ("disable_overlap_schedule", _SGLANG, "performance.pipeline_depth", "plans in flight; 1 turns it off"),
        ("schedule_conservativeness", _SGLANG, "performance.decode_headroom_tokens", "tokens of each sequence"),
        ("swap_space kv_offloading_size", _VLLM, "kv_cache.host_bytes", "bytes for all instances of the host, not GiB"),
        ("hicache_size", _SGLANG, "kv_cache.host_bytes", "bytes for all instances of the host, not GB of each rank"),
        ("enable_hierarchical_cache", _SGLANG, "kv_cache.host_bytes", "bytes for all instances of the host"),
        (
            "kv_offloading_backend",
            _VLLM,
            "kv_cache.store",
            "a section, for a store; RAM alone needs kv_cache.host_bytes",
        ),
        ("hicache_storage_backend", _SGLANG, "kv_cache.store", "a section with backend, bytes and master"),
        ("hicache_storage_backend_extra_config", _SGLANG, "kv_cache.store", "a section with backend, bytes and master"),
        ("hicache_ratio", _SGLANG, "kv_cache.host_bytes", "bytes for all instances of the host, not a ratio"),
        (
            "hicache_write_policy hicache_io_backend hicache_mem_layout hicache_storage_prefetch_policy",
            _SGLANG,
            None,
            "how blocks move is not configured; kv_cache.host_bytes, disk and store say where they are kept",
        ),
        ("cpu_offload_gb", _BOTH, None, "all weights stay on the device"),
        ("chunked_prefill_size", _SGLANG, "chunked_prefill.chunk_size", "tokens of one prompt in one step"),
        ("long_prefill_token_threshold", _VLLM, "chunked_prefill.chunk_size", "tokens of one prompt in one step"),
        (
            "max_prefill_tokens max_prefill_length",
            _SGLANG,
            "chunked_prefill.max_chunk_prefill_tokens",
            "tokens of all prompts in one step",
        ),
        ("enable_chunked_prefill", _VLLM, "chunked_prefill.enabled", "true or false"),
        ("no_enable_chunked_prefill", _VLLM, "chunked_prefill.enabled", "false turns it off"),
        ("enforce_eager", _VLLM, "cuda_graph.enabled", "false runs every step without graphs"),
        ("disable_cuda_graph", _SGLANG, "cuda_graph.enabled", "false runs every step without graphs"),
        ("max_seq_len_to_capture", _VLLM, "cuda_graph.max_seq_len", "tokens"),
        (
            "cuda_graph_sizes cudagraph_capture_sizes cuda_graph_max_bs cuda_graph_bs",
            _BOTH,
            "performance.max_num_seqs",
            "sequences of one instance; graphs are captured for batches up to it",
        ),
        ("compilation_config enable_torch_compile", _BOTH, None, "HBServe does not use torch.compile"),
        ("stream_interval", _BOTH, None, "each token is sent as soon as it is there"),
        (
            "speculative_model speculative_draft_model_path",
            _BOTH,
            "speculation.model",
            "the folder or name of the draft model or head, with speculation.method draft_model or eagle3",
        ),
        (
            "speculative_config speculative_algorithm",
            _BOTH,
            "speculation.method",
            "ngram, suffix, draft_model, eagle3 or auto",
        ),
        ("speculative_num_steps", _SGLANG, "speculation.max_draft_tokens", "1 to 15"),
        ("speculative_eagle_topk", _SGLANG, None, "a draft is one sequence of tokens, no tree; leave it out"),
        (
            "speculative_draft_model_revision",
            _SGLANG,
            "speculation.model",
            "write it behind the name: org/name@revision",
        ),
        ("num_speculative_tokens speculative_num_draft_tokens", _BOTH, "speculation.max_draft_tokens", "1 to 15"),
        # prefill and decode apart
        ("disaggregation_mode", _SGLANG, "mode", "disaggregated; the roles stand in gpu_instances, as instance_type"),
        ("kv_transfer_config", _VLLM, "kv_transfer.backend", "nccl, mooncake, shm or package.module:Class"),
        ("disaggregation_transfer_backend", _SGLANG, "kv_transfer.backend", "nccl, mooncake or shm"),
        ("disaggregation_ib_device", _SGLANG, "kv_transfer.mooncake_device", "adapters, comma-separated"),
        ("disaggregation_bootstrap_port", _SGLANG, "kv_transfer.port", "base port of the instances' transfers"),
        # scheduling
        ("schedule_policy", _SGLANG, "scheduler.policy", "fcfs, shortest_prompt_first or slo_aware"),
        ("scheduling_policy", _VLLM, "scheduler.policy", "fcfs, shortest_prompt_first or slo_aware"),
        # the server
        (
            "api_key",
            _BOTH,
            "server.api_keys_file",
            "a file with one key per line; or set HBSERVE_API_KEYS, because other users see a command's arguments",
        ),
        ("admin_api_key", _SGLANG, "server.admin_key_file", "a file; or set HBSERVE_ADMIN_KEY"),
        ("allowed_origins", _VLLM, "server.cors_origins", "a list of origins"),
        ("ssl_certfile", _BOTH, "server.tls_cert_file", "a PEM file"),
        ("ssl_keyfile", _BOTH, "server.tls_key_file", "a PEM file"),
        ("tokenizer_worker_num", _SGLANG, "server.num_tokenizers", "processes that encode prompts"),
        ("api_server_count", _VLLM, "server.num_tokenizers", "processes that encode prompts; there is one API server"),
        ("watchdog_timeout", _SGLANG, "rpc.step_timeout_s", "seconds of one step"),
        ("uvicorn_log_level log_level_http", _BOTH, "logging.level", "DEBUG, INFO, WARNING or ERROR"),
        (
            "log_requests enable_log_requests disable_log_requests",
            _BOTH,
            "logging.level",
            "DEBUG shows the life of every request, INFO one line of it",
        ),
        ("disable_log_stats disable_uvicorn_access_log", _VLLM, "logging.level", "WARNING leaves requests out"),
        ("enable_metrics", _SGLANG, None, "metrics are always on, under /metrics"),
        ("otlp_traces_endpoint", _BOTH, "telemetry.otlp_endpoint", "a URL, such as http://127.0.0.1:4318/v1/traces"),
    )
)


def unknown_name(name: str, valid: Sequence[str], spell: Callable[[str], str]) -> str:
    """Return a hint for an unknown name: what another program's name is here, the right section, or the nearest name.

    Args:
        valid: names that are allowed there.
        spell: writes a dotted key as the user would: as a flag, as a key, or as an argument of Python.
    """
    plain = name.lstrip("-").rpartition(".")[2].replace("-", "_")
    foreign = FOREIGN_NAMES.get(plain)
    if foreign is not None and foreign.key is None:
        return f"; that is {foreign.whose}'s name, and HBServe has no such setting: {foreign.note}"
    if foreign is not None and foreign.key is not None:
        return f"; that is {foreign.whose}'s name for {spell(foreign.key)} ({foreign.note})"
    dotted = name.lstrip("-").replace("-", "_")
    keys = [spell(key) for key in all_keys() if key == dotted]
    keys = keys or [spell(key) for key in all_keys() if key.rpartition(".")[2] == plain]
    if keys:
        return f"; write {' or '.join(keys)}"
    return nearest(name, list(valid))
