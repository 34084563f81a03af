"""What a configuration must hold, key by key, before any process sees it."""

from __future__ import annotations

import math
import os
import re
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from hbserve.config.sections import Config, InstanceConfig, InstanceRole, Mode
from hbserve.config.semi_pd import LadderConfig, Section, SemiPDConfig, nearest
from hbserve.errors import ConfigError

BACKENDS = ("nccl", "mooncake", "shm")
"""Built-in ways to move KV."""
_ZERO_IS_LEGAL_IN_SLO = ("cooldown_s", "rotation_cooldown_s", "hysteresis", "min_confidence_threshold")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
    except UnicodeEncodeError as error:
        raise _error("", f"a value holds a lone surrogate, which is no character: {error.object!a}") from None
    return _complete(config, base_dir)


def _complete(given: Config, base_dir: Path | None) -> Config:
    """Fill in the defaults that depend on other keys, and validate."""
    model = msgspec.structs.replace(given.model, path=_find_folder(given.model.path, base_dir, "model.path"))
    if model.tokenizer_path is not None:
        tokenizer_path = _find_folder(model.tokenizer_path, base_dir, "model.tokenizer_path")
        model = msgspec.structs.replace(model, tokenizer_path=tokenizer_path)
    instances = given.gpu_instances or _default_instances(given.mode, model.tensor_parallel_size)
    instances = _complete_instances(instances, model.tensor_parallel_size)
    rpc = given.rpc
    if rpc.key_file is not None:
        rpc = msgspec.structs.replace(rpc, key_file=_find_key_file(rpc.key_file, base_dir))
    semi_pd = _complete_semi_pd(given.semi_pd)
    config = msgspec.structs.replace(given, model=model, gpu_instances=instances, rpc=rpc, semi_pd=semi_pd)
    _validate(config)
    return config


def default_instances(mode: Mode, tensor_parallel_size: int) -> tuple[InstanceConfig, ...]:
    """What a configuration without ``gpu_instances`` has."""
    return _complete_instances(_default_instances(mode, tensor_parallel_size), tensor_parallel_size)


def _complete_instances(instances: tuple[InstanceConfig, ...], tensor_parallel_size: int) -> tuple[InstanceConfig, ...]:
    return tuple(
        msgspec.structs.replace(
            instance,
            kv_rank=rank if instance.kv_rank is None else instance.kv_rank,
            tensor_parallel_size=(
                tensor_parallel_size if instance.tensor_parallel_size is None else instance.tensor_parallel_size
            ),
        )
        for rank, instance in enumerate(instances)
    )


_SHARES = {
    "prefill_percentage": ("SEMI_PD_PREFILL_SM_PERCENTILE", 80),
    "decode_percentage": ("SEMI_PD_DECODE_SM_PERCENTILE", 100),
}


def _complete_semi_pd(given: SemiPDConfig) -> SemiPDConfig:
    shares = {}
    for name, (variable, default) in _SHARES.items():
        value = getattr(given, name)
        if value is None:
            text = os.environ.get(variable, str(default))
            if not text.isdecimal() or not 1 <= int(text) <= 100:
                raise _error(f"semi_pd.{name}", f"the environment's {variable} must be in 1..100, got {text!r}")
            value = int(text)
        shares[name] = value
    ladder = given.ladder
    if ladder.unified is None:
        is_chosen = given.mixed or given.slo is not None
        ladder = msgspec.structs.replace(ladder, unified=(100,) if is_chosen else ())
    mixed = bool(ladder.unified) and given.slo is not None if given.mixed is None else given.mixed
    return msgspec.structs.replace(given, **shares, ladder=ladder, mixed=mixed)


def with_instance(config: Config, instance: InstanceConfig) -> Config:
    """The configuration as it is with another instance in it, in the place of one of its name.

    Raises:
        ConfigError: if the instance does not fit to the others.
    """
    others = [each for each in config.gpu_instances if each.instance_id != instance.instance_id]
    extended = msgspec.structs.replace(config, gpu_instances=(*others, instance))
    _validate(extended)
    return extended


def _error(key: str, what: str) -> ConfigError:
    return ConfigError(f"{key}: {what}" if key else what, key)


def _from_msgspec(error: msgspec.ValidationError) -> ConfigError:
    """msgspec says ``Expected `int`, got `str` - at `$.rpc.port` ``; say the key first."""
    what, _, path = str(error).partition(" - at `$")
    key = path.rstrip("`").lstrip(".")
    if what.startswith("Invalid enum value"):
        wrong = what.partition(" value ")[2].strip("'")
        return _error(key, f"unknown value {wrong!r}{nearest(wrong, _values_at(key))}")
    return _error(key, what.replace("`", ""))


def _values_at(key: str) -> list[str]:
    """What may be said at a key that takes one of a few words."""
    kind: Any = Config
    for name in re.sub(r"\[[^]]*\]", "", key).split("."):
        structs = [each for each in _members(kind) if isinstance(each, type) and issubclass(each, msgspec.Struct)]
        kind = next(field.type for field in msgspec.structs.fields(structs[0]) if field.name == name)
    words = []
    for each in _members(kind):
        words += list(each) if isinstance(each, type) and issubclass(each, Enum) else []
        words += get_args(each) if get_origin(each) is Literal else []
    return [str(word) for word in words]


def _members(kind: Any) -> list[Any]:
    """A type, and what it is made of: of a union its members, of a tuple its items."""
    inner = get_args(kind) if get_origin(kind) is not Literal else ()
    return [kind, *(member for each in inner for member in _members(each))]


def _check_keys(document: dict[str, Any]) -> None:
    """Refuse unknown keys before types are checked: msgspec would not name the nearest valid key."""

    def check(section: type[msgspec.Struct], values: Any, prefix: str) -> None:
        if not isinstance(values, dict):
            return  # a wrong type: msgspec's message is right
        fields = {field.name: field.type for field in msgspec.structs.fields(section)}
        for key, value in values.items():
            if key not in fields:
                raise _error(f"{prefix}{key}", f"unknown key{nearest(str(key), list(fields))}")
            for kind in (fields[key], *get_args(fields[key])):  # a section, or one that may be left out
                if isinstance(kind, type) and issubclass(kind, Section):
                    check(kind, value, f"{prefix}{key}.")

    check(Config, document, "")
    instances = document.get("gpu_instances")
    for index, values in enumerate(instances if isinstance(instances, list) else ()):
        check(InstanceConfig, values, f"gpu_instances[{index}].")


def _find_folder(path: str, base_dir: Path | None, key: str) -> str:
    expanded = Path(path).expanduser()
    candidates = [expanded]
    if base_dir is not None and not expanded.is_absolute():
        candidates += [base_dir / expanded, base_dir.parent / expanded]
    for candidate in candidates:
        if os.path.isdir(candidate):  # unlike Path's own, False for what cannot be a name
            return str(candidate.resolve())
    what = f"there is no folder {path!r} (looked at {', '.join(str(c.absolute()) for c in candidates)})"
    if _HUB_NAME.fullmatch(path):
        what += f"; models are not downloaded by themselves: hf download {path} --local-dir FOLDER"
    raise _error(key, what)


def _find_key_file(path: str, base_dir: Path | None) -> str:
    for candidate in (Path(path).expanduser(), (base_dir or Path()) / path):
        if os.path.isfile(candidate):
            return str(candidate.resolve())
    raise _error("rpc.key_file", f"there is no file {path!r}; make one with python -m hbserve.rpc.cluster_key")


def _default_instances(mode: Mode, tensor_parallel_size: int) -> tuple[InstanceConfig, ...]:
    if mode == "disaggregated":
        return (
            InstanceConfig(instance_id="prefill-0", instance_type=InstanceRole.PREFILL, gpu_id=0),
            InstanceConfig(instance_id="decode-0", instance_type=InstanceRole.DECODE, gpu_id=tensor_parallel_size),
        )
    if mode == "semi_pd":
        return (InstanceConfig(instance_id="semi-0", instance_type=InstanceRole.SEMI_PD, gpu_id=0),)
    return (InstanceConfig(instance_id="unified-0", instance_type=InstanceRole.UNIFIED, gpu_id=0),)


def _validate(config: Config) -> None:
    sizes = {"model.tensor_parallel_size": config.model.tensor_parallel_size}
    sizes |= {f"gpu_instances[{n}].tensor_parallel_size": each.num_ranks for n, each in enumerate(config.gpu_instances)}
    for key, size in sizes.items():
        if size not in (1, 2, 4, 8):
            raise _error(key, f"must be 1, 2, 4 or 8, got {size}")
    if config.kv_transfer.backend not in BACKENDS and not _is_import_path(config.kv_transfer.backend):
        raise _error(
            "kv_transfer.backend",
            f"{config.kv_transfer.backend!r} is neither a built-in backend nor a 'package.module:Class'"
            + nearest(config.kv_transfer.backend, list(BACKENDS)),
        )
    if config.kv_transfer.backend != "mooncake":
        for name in ("mooncake_protocol", "mooncake_device"):
            if getattr(config.kv_transfer, name) is not None:
                raise _error(f"kv_transfer.{name}", f"is of no use to backend {config.kv_transfer.backend}")
    if config.kv_transfer.backend == "shm" and config.kv_transfer.port is not None:
        raise _error("kv_transfer.port", "backend shm has no ports; leave it out")
    if config.performance.scheduler is not None and not _is_import_path(config.performance.scheduler):
        raise _error("performance.scheduler", "must be 'package.module:Class'")
    if config.performance.block_size is not None and config.performance.block_size & (
        config.performance.block_size - 1
    ):
        raise _error("performance.block_size", "must be a power of two")
    if not 0 < config.performance.memory_fraction <= 1:
        raise _error("performance.memory_fraction", "must be in (0, 1]")
    endpoint = config.telemetry.otlp_endpoint
    if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+/\S+", endpoint):
        raise _error("telemetry.otlp_endpoint", "must be a URL with a path, like http://127.0.0.1:4318/v1/traces")
    _require_positive(config)
    _validate_semi_pd(config)
    _validate_instances(config)
    _validate_launcher(config)


def _validate_semi_pd(config: Config) -> None:
    for name in _SHARES:
        value = getattr(config.semi_pd, name)
        if not 1 <= value <= 100:
            raise _error(f"semi_pd.{name}", f"must be in 1..100, got {value}")
    for name in LadderConfig.__struct_fields__:
        for value in getattr(config.semi_pd.ladder, name) or ():
            if not 1 <= value <= 100:
                raise _error(f"semi_pd.ladder.{name}", f"percentages must be in 1..100, got {value}")
    if len(config.semi_pd.ladder.unified or ()) > 1:
        raise _error("semi_pd.ladder.unified", "one percentage: one worker mixes both phases at a time")
    if config.semi_pd.mixed and not config.semi_pd.ladder.unified:
        raise _error("semi_pd.mixed", "needs a worker of both phases; semi_pd.ladder.unified says there is none")
    slo = config.semi_pd.slo
    for name in slo.__struct_fields__ if slo is not None else ():
        value = getattr(slo, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in _ZERO_IS_LEGAL_IN_SLO):
            must = "not be negative" if name in _ZERO_IS_LEGAL_IN_SLO else "be positive"
            raise _error(f"semi_pd.slo.{name}", f"must {must}, got {value}")
    for index, instance in enumerate(config.gpu_instances):
        if instance.instance_type is not InstanceRole.SEMI_PD:
            continue
        if instance.port is not None:
            raise _error(
                f"gpu_instances[{index}].port", "a semi_pd instance is started with its scheduler and needs no port"
            )


def _validate_launcher(config: Config) -> None:
    if config.launcher != "ray":
        return
    if config.rpc.port is None:
        raise _error("rpc.port", "instances that Ray starts find the scheduler by it; set rpc.port")
    for index, instance in enumerate(config.gpu_instances):
        if instance.instance_type is InstanceRole.SEMI_PD:
            raise _error("launcher", "Ray starts no semi_pd instances; use local")
        for name in ("port", "bind"):
            if getattr(instance, name) is not None:
                raise _error(f"gpu_instances[{index}].{name}", "Ray decides where an instance listens; leave it out")


def _is_import_path(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text) is not None


def _require_positive(config: Config) -> None:
    zero_is_legal = {
        "kv_transfer.local_prefill_tokens",
        "kv_transfer.layer_group_bytes",
        "server.port",
        "model.seed",
        "performance.decode_headroom_tokens",
        "rpc.max_restarts",
        "server.num_tokenizers",
        "semi_pd.prefill_priority",
        "semi_pd.num_sleepers",
    }
    for section_name in config.__struct_fields__:
        section = getattr(config, section_name)
        if not isinstance(section, Section):
            continue
        for name in section.__struct_fields__:
            key, value = f"{section_name}.{name}", getattr(section, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and key not in zero_is_legal):
                must = "not be negative" if key in zero_is_legal else "be positive"
                raise _error(key, f"must {must if math.isfinite(value) else 'be finite'}, got {value}")
            if name == "port" and value > 65535:
                raise _error(key, f"must be at most 65535, got {value}")


def _validate_instances(config: Config) -> None:
    instances = config.gpu_instances
    roles = [instance.instance_type for instance in instances]
    if config.mode == "disaggregated":
        for role in (InstanceRole.PREFILL, InstanceRole.DECODE):
            if role not in roles:
                raise _error("gpu_instances", f"mode disaggregated needs at least one {role} instance")
    if config.mode == "semi_pd":
        if InstanceRole.SEMI_PD not in roles:
            raise _error("gpu_instances", "mode semi_pd needs at least one semi_pd instance")
        if (InstanceRole.PREFILL in roles) != (InstanceRole.DECODE in roles):
            raise _error("gpu_instances", "beside semi_pd instances, prefill and decode instances need each other")
    allowed = {
        "unified": {InstanceRole.UNIFIED},
        "disaggregated": {InstanceRole.PREFILL, InstanceRole.DECODE},
        "semi_pd": {InstanceRole.SEMI_PD, InstanceRole.PREFILL, InstanceRole.DECODE},
    }[config.mode]
    seen: dict[tuple[str, object], str] = {}
    if config.server.port:
        seen["address", (config.server.host, config.server.port)] = "server.port"
    _require_key(config)
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
            kv_port = config.kv_transfer.port + instance.kv_rank * config.max_ranks
            for rank in range(instance.num_ranks):
                address = (instance.kv_ip or config.kv_transfer.ip or instance.host, kv_port + rank)
                _claim(seen, "address", address, "kv_transfer.port")


def _require_key(config: Config) -> None:
    """Whoever can give orders to an instance can read every prompt: beyond this host only with a key."""
    if config.rpc.key_file is not None:
        return
    listeners = [("rpc.host", config.rpc.host, config.rpc.port)]
    for index, instance in enumerate(config.gpu_instances):
        name = "host" if instance.bind is None else "bind"
        listeners.append((f"gpu_instances[{index}].{name}", instance.bind or instance.host, instance.port))
    for key, host, port in listeners:
        if port is not None and not is_loopback(host):
            raise _error(
                key,
                f"{host} can be reached from other hosts; make a key with python -m hbserve.rpc.cluster_key FILE, "
                "copy it to every host, and set rpc.key_file",
            )


def is_loopback(host: str) -> bool:
    """Whether only this host can connect there."""
    return host in ("localhost", "::1", "lo") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def _claim(seen: dict[tuple[str, object], str], kind: str, value: object, key: str) -> None:
    """Refuse a value that another key has taken; localhost and 127.0.0.1 are one address."""
    if kind == "address" and isinstance(value, tuple) and value[0] == "localhost":
        value = ("127.0.0.1", value[1])
    owner = seen.setdefault((kind, value), key)
    if owner != key:
        shown = f"{value[0]}:{value[1]}" if isinstance(value, tuple) else repr(value)
        raise _error(key, f"{kind} {shown} is already taken by {owner}")
