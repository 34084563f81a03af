"""The one configuration of a system: frozen, validated when made, the same in every process.

Each section is a struct whose fields are the keys of the YAML file. `Config.load` reads a file;
errors name the key, the file, the line and the nearest valid name. The flat, mutable builder that
Python users know is `hbserve.pd_disagg.PdDisaggConfig`; it ends in a `Config` too.
"""

from __future__ import annotations

import difflib
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from hbserve.errors import ConfigError


class InstanceRole(StrEnum):
    """What an instance's workers do. A mode is nothing but which roles exist on which KV pools."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"

    @property
    def prefills(self) -> bool:
        """Whether prompts are processed there."""
        return self is not InstanceRole.DECODE

    @property
    def decodes(self) -> bool:
        """Whether output tokens are produced there after the first one."""
        return self is not InstanceRole.PREFILL


Mode = Literal["unified", "disaggregated", "semi_pd"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, keyword-only, and strict about unknown keys."""


class ModelConfig(Section, frozen=True):
    """Which model, and how it is held.

    Attributes:
        path: folder in Hugging Face layout (config.json, *.safetensors, tokenizer files).
        served_name: the name in the HTTP API; default: the folder's name.
        tokenizer_path: folder of the tokenizer, if it is not the model's.
        device: ``auto`` takes CUDA where there is a GPU, else the CPU.
        dtype: ``auto`` takes the checkpoint's dtype on a GPU and on CPU.
        load_format: ``safetensors``, or ``dummy`` for random weights from config.json alone.
        tensor_parallel_size: ranks per instance.
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
            ``mooncake`` is the Mooncake Transfer Engine; or ``package.module:Class``, a subclass
            of `hbserve.pd_disagg.kv_transfer.base.KVTransferBase`.
        buffer_size: bytes of staging memory per instance; transfers wait when it is full.
        ip: address that instances announce for transfers; default: the instance's own host.
        port: base port; the instance with KV rank r listens on port + r. Default: any free port.
        timeout_s: a transfer that takes longer has failed.
        max_attempts: how often a request's prefill is tried before the request fails.
    """

    backend: str = "nccl"
    buffer_size: int = 1 << 30
    ip: str | None = None
    port: int | None = None
    timeout_s: float = 30.0
    max_attempts: int = 3


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
        gpu_id: first GPU of the instance; has no meaning on CPU.
        host: where the instance runs and listens for the scheduler.
        port: of that listener; default: a private local socket, which needs a common launcher.
        kv_rank: its number among the KV transfer peers; default: its place in the list.
        num_threads: CPU threads of a worker, on CPU; default: the machine's cores shared evenly.
    """

    instance_id: str
    instance_type: InstanceRole
    gpu_id: int = 0
    host: str = "127.0.0.1"
    port: int | None = None
    kv_rank: int | None = None
    num_threads: int | None = None


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
        pipeline_depth: plans in flight per worker.
        max_waiting_requests: a longer queue is refused with `OverloadedError` (HTTP 503).
        scheduler: ``package.module:Class``, a subclass of
            `hbserve.pd_disagg.cpu_scheduler.CpuScheduler` with another policy.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    enable_prefix_caching: bool = True
    decode_headroom_tokens: int = 64
    pipeline_depth: int = 2
    max_waiting_requests: int = 4096
    scheduler: str | None = None


class RpcConfig(Section, frozen=True):
    """Control plane: addresses and deadlines.

    Attributes:
        host: where the scheduler listens for clients (API servers).
        port: of that listener; default: a private local socket.
        heartbeat_interval_s: how often the scheduler asks an instance for a sign of life.
        heartbeat_timeout_s: an instance that has not answered for so long is lost.
        step_timeout_s: a worker that has not finished a step for so long is lost.
        start_timeout_s: the system must be ready within this time, else the error says who is missing.
        recovery_timeout_s: requests wait so long for a lost instance to come back, then fail.
        max_restarts: how often the launcher restarts an instance that exits, within ten minutes.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    heartbeat_interval_s: float = 0.5
    heartbeat_timeout_s: float = 10.0
    step_timeout_s: float = 120.0
    start_timeout_s: float = 300.0
    recovery_timeout_s: float = 120.0
    max_restarts: int = 5


class ServerConfig(Section, frozen=True):
    """The HTTP server.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0: any free one, printed at start.
    """

    host: str = "127.0.0.1"
    port: int = 8000


class LoggingConfig(Section, frozen=True):
    """Attributes: level: the least important message that is shown."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class Config(Section, frozen=True):
    """Everything that defines a system; see the sections for the keys."""

    model: ModelConfig
    mode: Mode = "unified"
    gpu_instances: tuple[InstanceConfig, ...] = ()
    kv_transfer: KVTransferConfig = KVTransferConfig()
    chunked_prefill: ChunkedPrefillConfig = ChunkedPrefillConfig()
    cuda_graph: CudaGraphConfig = CudaGraphConfig()
    performance: PerformanceConfig = PerformanceConfig()
    rpc: RpcConfig = RpcConfig()
    server: ServerConfig = ServerConfig()
    logging: LoggingConfig = LoggingConfig()

    @staticmethod
    def load(path: str | Path) -> Config:
        """Read a YAML file.

        Raises:
            ConfigError: naming key, file and line of what cannot be honoured.
        """
        path = Path(path).expanduser()
        try:
            text = path.read_text()
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
        try:
            document = yaml.safe_load(text)
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        duplicate = _duplicate_key(tree)
        if duplicate is not None:
            raise ConfigError(f"{path}:{duplicate[1]}: {duplicate[0]} is given twice")
        try:
            return Config.from_dict(document, base_dir=path.parent)
        except ConfigError as error:
            key = getattr(error, "key", "")
            line = _line_of(tree, key)
            raise ConfigError(f"{path}:{line}: {error}") from None

    @staticmethod
    def from_dict(document: Any, base_dir: Path | None = None) -> Config:
        """Build and validate a configuration from plain data.

        Relative model paths that do not exist from the working directory are looked up from
        ``base_dir`` and its parent, so that shipped files work wherever they are started from.

        Raises:
            ConfigError: with attribute ``key``, the dotted key at fault.
        """
        if not isinstance(document, dict):
            raise _error("", "the configuration must be a mapping of sections")
        _check_keys(document)
        try:
            config = msgspec.convert(document, Config)
        except msgspec.ValidationError as error:
            raise _from_msgspec(error) from None
        return config.completed(base_dir)

    def completed(self, base_dir: Path | None = None) -> Config:
        """This configuration with defaults that depend on other keys filled in, validated.

        Raises:
            ConfigError: with attribute ``key``.
        """
        model = msgspec.structs.replace(self.model, path=_find_folder(self.model.path, base_dir, "model.path"))
        if model.tokenizer_path is not None:
            tokenizer_path = _find_folder(model.tokenizer_path, base_dir, "model.tokenizer_path")
            model = msgspec.structs.replace(model, tokenizer_path=tokenizer_path)
        instances = self.gpu_instances or _default_instances(self.mode, model.tensor_parallel_size)
        instances = tuple(
            msgspec.structs.replace(instance, kv_rank=rank if instance.kv_rank is None else instance.kv_rank)
            for rank, instance in enumerate(instances)
        )
        config = msgspec.structs.replace(self, model=model, gpu_instances=instances)
        _validate(config)
        return config

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
            raise _error("gpu_instances", f"no instance {instance_id!r}{nearest(instance_id, names)}")
        return self.gpu_instances[names.index(instance_id)]


def nearest(name: str, valid: list[str]) -> str:
    """A hint such as ``; did you mean 'port'?``, or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are: {', '.join(sorted(valid))}"


def _error(key: str, what: str) -> ConfigError:
    error = ConfigError(f"{key}: {what}" if key else what)
    error.key = key  # type: ignore[attr-defined]
    return error


def _from_msgspec(error: msgspec.ValidationError) -> ConfigError:
    """msgspec says ``Expected `int`, got `str` - at `$.rpc.port` ``; say the key first."""
    what, _, path = str(error).partition(" - at `$")
    return _error(path.rstrip("`").lstrip("."), what.replace("`", ""))


def _check_keys(document: dict[str, Any]) -> None:
    """Refuse unknown keys before types are checked: msgspec would not name the nearest valid key."""

    def check(section: type[msgspec.Struct], values: Any, prefix: str) -> None:
        if not isinstance(values, dict):
            return  # a wrong type: msgspec's message is right
        valid = [field.name for field in msgspec.structs.fields(section)]
        for key in values:
            if key not in valid:
                raise _error(f"{prefix}{key}", f"unknown key{nearest(str(key), valid)}")

    check(Config, document, "")
    for field in msgspec.structs.fields(Config):
        values = document.get(field.name)
        if isinstance(field.type, type) and issubclass(field.type, Section):
            check(field.type, values, f"{field.name}.")
    for index, values in enumerate(document.get("gpu_instances") or ()):
        check(InstanceConfig, values, f"gpu_instances[{index}].")


def _find_folder(path: str, base_dir: Path | None, key: str) -> str:
    expanded = Path(path).expanduser()
    candidates = [expanded]
    if base_dir is not None and not expanded.is_absolute():
        candidates += [base_dir / expanded, base_dir.parent / expanded]
    for candidate in candidates:
        if candidate.is_dir():
            return str(candidate.resolve())
    raise _error(key, f"there is no folder {path!r} (looked at {', '.join(str(c) for c in candidates)})")


def _default_instances(mode: Mode, tensor_parallel_size: int) -> tuple[InstanceConfig, ...]:
    if mode == "disaggregated":
        return (
            InstanceConfig(instance_id="prefill-0", instance_type=InstanceRole.PREFILL, gpu_id=0),
            InstanceConfig(instance_id="decode-0", instance_type=InstanceRole.DECODE, gpu_id=tensor_parallel_size),
        )
    return (InstanceConfig(instance_id="unified-0", instance_type=InstanceRole.UNIFIED, gpu_id=0),)


def _validate(config: Config) -> None:
    if config.mode == "semi_pd":
        raise _error("mode", "semi_pd is not available yet; use unified or disaggregated")
    if config.model.tensor_parallel_size != 1:
        raise _error("model.tensor_parallel_size", "tensor parallelism is not available yet; use 1")
    if config.kv_transfer.backend == "mooncake":
        raise _error("kv_transfer.backend", "mooncake is not available yet; use nccl (gloo on CPU) or your own class")
    if config.kv_transfer.backend != "nccl" and not _is_import_path(config.kv_transfer.backend):
        raise _error(
            "kv_transfer.backend",
            f"{config.kv_transfer.backend!r} is neither a built-in backend nor a 'package.module:Class'"
            + nearest(config.kv_transfer.backend, ["nccl", "mooncake"]),
        )
    if config.performance.scheduler is not None and not _is_import_path(config.performance.scheduler):
        raise _error("performance.scheduler", "must be 'package.module:Class'")
    if config.performance.block_size is not None and config.performance.block_size & (
        config.performance.block_size - 1
    ):
        raise _error("performance.block_size", "must be a power of two")
    if not 0 < config.performance.memory_fraction <= 1:
        raise _error("performance.memory_fraction", "must be in (0, 1]")
    _require_positive(config)
    _validate_instances(config)


def _is_import_path(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text) is not None


def _require_positive(config: Config) -> None:
    zero_is_legal = {"server.port", "model.seed", "performance.decode_headroom_tokens", "rpc.max_restarts"}
    for section_name in config.__struct_fields__:
        section = getattr(config, section_name)
        if not isinstance(section, Section):
            continue
        for name in section.__struct_fields__:
            key, value = f"{section_name}.{name}", getattr(section, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if value < 0 or (value == 0 and key not in zero_is_legal) or value != value:
                raise _error(key, f"must be positive, got {value}")
            if name == "port" and value > 65535:
                raise _error(key, f"must be at most 65535, got {value}")


def _validate_instances(config: Config) -> None:
    instances = config.gpu_instances
    roles = [instance.instance_type for instance in instances]
    if config.mode == "disaggregated":
        for role in (InstanceRole.PREFILL, InstanceRole.DECODE):
            if role not in roles:
                raise _error("gpu_instances", f"mode disaggregated needs at least one {role} instance")
    allowed = {
        "unified": {InstanceRole.UNIFIED},
        "disaggregated": {InstanceRole.PREFILL, InstanceRole.DECODE},
        "semi_pd": {InstanceRole.PREFILL, InstanceRole.DECODE},
    }[config.mode]
    seen: dict[tuple[str, object], str] = {}
    if config.server.port:
        seen["address", (config.server.host, config.server.port)] = "server.port"
    if config.rpc.port is not None:
        _claim(seen, "address", (config.rpc.host, config.rpc.port), "rpc.port")
    for index, instance in enumerate(instances):
        key = f"gpu_instances[{index}]"
        if instance.instance_type not in allowed:
            raise _error(f"{key}.instance_type", f"mode {config.mode} has no {instance.instance_type} instances")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", instance.instance_id):
            raise _error(f"{key}.instance_id", "must be 1 to 64 letters, digits, '_', '.' or '-'")
        if instance.gpu_id < 0:
            raise _error(f"{key}.gpu_id", f"must not be negative, got {instance.gpu_id}")
        if instance.num_threads is not None and instance.num_threads < 1:
            raise _error(f"{key}.num_threads", f"must be positive, got {instance.num_threads}")
        if instance.port is not None and not 0 < instance.port <= 65535:
            raise _error(f"{key}.port", f"must be in 1..65535, got {instance.port}")
        if instance.kv_rank is not None and instance.kv_rank < 0:
            raise _error(f"{key}.kv_rank", f"must not be negative, got {instance.kv_rank}")
        _claim(seen, "id", instance.instance_id, f"{key}.instance_id")
        _claim(seen, "kv_rank", instance.kv_rank, f"{key}.kv_rank")
        if instance.port is not None:
            _claim(seen, "address", (instance.host, instance.port), f"{key}.port")
        if config.kv_transfer.port is not None and config.mode == "disaggregated":
            assert instance.kv_rank is not None
            kv_port = config.kv_transfer.port + instance.kv_rank
            _claim(seen, "address", (config.kv_transfer.ip or instance.host, kv_port), "kv_transfer.port")


def _claim(seen: dict[tuple[str, object], str], kind: str, value: object, key: str) -> None:
    """Refuse a value that another key has taken; localhost and 127.0.0.1 are one address."""
    if kind == "address" and isinstance(value, tuple) and value[0] == "localhost":
        value = ("127.0.0.1", value[1])
    owner = seen.setdefault((kind, value), key)
    if owner != key:
        shown = f"{value[0]}:{value[1]}" if isinstance(value, tuple) else repr(value)
        raise _error(key, f"{kind} {shown} is already taken by {owner}")


def _line_of(tree: yaml.Node | None, key: str) -> int:
    """Line of a dotted key such as ``gpu_instances[1].port``, or of the nearest enclosing one that is there."""
    line, node = 1, tree
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, yaml.MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == part), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _duplicate_key(node: yaml.Node | None) -> tuple[str, int] | None:
    """The first key that stands twice in one mapping, and its line: YAML would keep the last in silence."""
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if key.value in keys:
                return key.value, key.start_mark.line + 1
            keys.add(key.value)
            found = _duplicate_key(value)
            if found:
                return found
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found = _duplicate_key(item)
            if found:
                return found
    return None
