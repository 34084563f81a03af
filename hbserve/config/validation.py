"""Checks of a whole configuration before any process sees it: types, keys, files, and limits that concern several keys.

Limits of single values stand on their fields (`hbserve.config.fields`); msgspec checks them, and `_from_msgspec` turns
its messages into ours.
"""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from hbserve.config.fields import IMPORT_PATH, NAME_RULE
from hbserve.config.foreign_names import unknown_name
from hbserve.config.keys import parts_of, section_in, types_of
from hbserve.config.sections import DEFAULT_MODE, Config, InstanceConfig, InstanceRole, Mode, ModelConfig
from hbserve.config.semi_pd import SemiPDConfig
from hbserve.errors import ConfigError
from hbserve.hints import nearest, shown
from hbserve.model_source import expand_user, known_as, resolve_model

BACKENDS = ("nccl", "mooncake", "shm")
"""Names of the built-in backends that move KV."""
STORES = ("mooncake",)
"""Names of the built-in stores of KV blocks."""
_NUM_RANKS = (1, 2, 4, 8)
_MAX_NAME_LENGTH = 64
_MAX_KEY_LENGTH = 100  # in an error
_MAX_INT_BITS = 63
"""Size of integers that messages between processes can carry."""
ENVIRONMENT = {
    "logging.level": "LOG_LEVEL",
    "semi_pd.prefill_percentage": "SEMI_PD_PREFILL_SM_PERCENTILE",
    "semi_pd.decode_percentage": "SEMI_PD_DECODE_SM_PERCENTILE",
}
"""Variables of the environment that give a key's value where nothing else does."""
_DEFAULT_SHARES = {"prefill_percentage": 80, "decode_percentage": 100}
_LOG_LEVELS = {"WARN": "WARNING", "CRITICAL": "ERROR", "FATAL": "ERROR", "TRACE": "DEBUG"}
"""Names of levels in other programs that read LOG_LEVEL."""


def from_dict(document: Any, base_dir: Path | None = None) -> Config:
    """Build and validate a configuration from plain data.

    Relative model paths that do not exist from the working directory are looked up from
    ``base_dir`` and its parent, so that shipped files work from any working directory.

    Raises:
        ConfigError: with attribute ``key``, the dotted key at fault.
    """
    if not isinstance(document, dict):
        raise _error("", "the configuration must be a mapping of sections")
    _check_keys(document)
    document = _with_log_level(_with_placement(_with_mode(document)))
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise _from_msgspec(error, document) from None
    except UnicodeEncodeError as error:
        raise _error("", f"a value holds a lone surrogate, which is no character: {error.object!a}") from None
    return _complete(config, base_dir)


def with_instance(config: Config, instance: InstanceConfig) -> Config:
    """Return the configuration with one more instance, or with this one in the place of its namesake.

    Roles that the others lack are no reason to refuse it: they may have changed, or come later.

    Raises:
        ConfigError: if the instance does not fit to the others.
    """
    others = [other for other in config.gpu_instances if other.instance_id != instance.instance_id]
    values = msgspec.to_builtins(instance)
    try:
        msgspec.convert(values, InstanceConfig)
    except msgspec.ValidationError as error:
        raise _from_msgspec(error, values, f"gpu_instances[{len(others)}].") from None
    extended = msgspec.structs.replace(config, gpu_instances=(*others, instance))
    _validate(extended, is_whole=False)
    return extended


def default_instances(mode: Mode, tensor_parallel_size: int) -> tuple[InstanceConfig, ...]:
    """Return the instances of a configuration without ``gpu_instances``."""
    defaults = {
        "auto": (("unified-0", InstanceRole.UNIFIED, 0),),
        "unified": (("unified-0", InstanceRole.UNIFIED, 0),),
        "disaggregated": (
            ("prefill-0", InstanceRole.PREFILL, 0),
            ("decode-0", InstanceRole.DECODE, tensor_parallel_size),
        ),
        "semi_pd": (("semi-0", InstanceRole.SEMI_PD, 0),),
    }
    return tuple(
        InstanceConfig(name, role, gpu_id=gpu_id, kv_rank=rank, tensor_parallel_size=tensor_parallel_size)
        for rank, (name, role, gpu_id) in enumerate(defaults[mode])
    )


def is_loopback(host: str) -> bool:
    """Whether only this host can connect there."""
    return host in ("localhost", "::1", "lo") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


# --- defaults that depend on other keys, files or the environment ----------------------------------


def _with_mode(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"mode": mode_of(document)}


def mode_of(document: dict[str, Any]) -> Any:
    """Return the mode of plain data: as it is given, else by the types of the instances, else the default.

    A given ``auto`` stays for unified instances that this host starts: their roles may then change.
    """
    given, instances = document.get("mode"), document.get("gpu_instances")
    if given not in (None, "auto"):
        return given
    if not instances or not isinstance(instances, list | tuple):
        return DEFAULT_MODE
    instances = [values for values in instances if isinstance(values, dict)]
    roles = [values.get("instance_type") for values in instances]
    phases = [InstanceRole.PREFILL, InstanceRole.DECODE]
    if InstanceRole.SEMI_PD in roles:
        return "semi_pd"
    if any(role in phases for role in roles):
        return "disaggregated"
    return "unified" if given is None or any(values.get("port") is not None for values in instances) else given


def _with_placement(document: dict[str, Any]) -> dict[str, Any]:
    """Have mode ``auto`` place requests where most of their prompt is cached; it may start several instances."""
    given = document.get("performance", {})
    if document["mode"] != "auto" or not isinstance(given, dict) or given.get("placement") is not None:
        return document
    return document | {"performance": given | {"placement": "prefix_aware"}}


def _with_log_level(document: dict[str, Any]) -> dict[str, Any]:
    """Take the environment's LOG_LEVEL where no ``logging.level`` is given, in any case of letters."""
    given = document.get("logging", {})
    text = os.environ.get(ENVIRONMENT["logging.level"], "").strip()
    if not text or not isinstance(given, dict) or given.get("level") is not None:
        return document
    words = _words_at("logging.level")
    level = _LOG_LEVELS.get(text.upper(), text.upper())
    if level not in words:
        what = f"the environment's LOG_LEVEL has the unknown value {shown(text)}{nearest(text.upper(), words)}"
        raise _error("logging.level", what)
    return document | {"logging": given | {"level": level}}


def _complete(given: Config, base_dir: Path | None) -> Config:
    replace = msgspec.structs.replace
    model, rpc = given.model, given.rpc
    source = _resolve(model.path, base_dir, "model.path")
    name = known_as(model.path)
    if model.served_name is None and name not in ("", ".", "..", "~", Path(source).name):
        model = replace(model, served_name=name)  # of a link to the folder: the name that the user knows
    model = replace(model, path=source)
    if model.tokenizer_path is not None:
        tokenizer_path = _resolve(model.tokenizer_path, base_dir, "model.tokenizer_path")
        if not os.path.isdir(tokenizer_path):  # only `model.path` is fetched or converted
            raise _error("model.tokenizer_path", f"must be a folder, and there is none at {shown(tokenizer_path)}")
        model = replace(model, tokenizer_path=tokenizer_path)
    size = model.tensor_parallel_size
    instances = tuple(
        replace(
            instance,
            kv_rank=rank if instance.kv_rank is None else instance.kv_rank,
            tensor_parallel_size=size if instance.tensor_parallel_size is None else instance.tensor_parallel_size,
        )
        for rank, instance in enumerate(given.gpu_instances)
    )
    speculation = given.speculation
    if speculation.model is not None:
        speculation = replace(speculation, model=_resolve(speculation.model, base_dir, "speculation.model"))
    if rpc.key_file is not None:
        rpc = replace(rpc, key_file=_find_key_file(rpc.key_file, base_dir))
    config = replace(
        given,
        model=model,
        gpu_instances=instances or default_instances(given.mode, size),
        rpc=rpc,
        speculation=speculation,
        semi_pd=_complete_semi_pd(given.semi_pd),
    )
    _validate(config)
    return config


def _complete_semi_pd(given: SemiPDConfig) -> SemiPDConfig:
    shares = {name: getattr(given, name) for name in _DEFAULT_SHARES}
    for name, default in _DEFAULT_SHARES.items():
        if shares[name] is None:
            variable = ENVIRONMENT[f"semi_pd.{name}"]
            text = os.environ.get(variable, str(default)).strip()
            if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= 100:
                raise _error(f"semi_pd.{name}", f"the environment's {variable} must be in 1..100, got {shown(text)}")
            shares[name] = int(text)
    ladder = given.ladder
    if ladder.unified is None:
        is_chosen = given.mixed or given.slo is not None
        ladder = msgspec.structs.replace(ladder, unified=(100,) if is_chosen else ())
    mixed = bool(ladder.unified) and given.slo is not None if given.mixed is None else given.mixed
    return msgspec.structs.replace(given, **shares, ladder=ladder, mixed=mixed)


def _resolve(path: str, base_dir: Path | None, key: str) -> str:
    try:
        return resolve_model(path, () if base_dir is None else (base_dir, base_dir.parent))
    except ConfigError as error:
        raise _error(key, str(error)) from None


def _find_key_file(path: str, base_dir: Path | None) -> str:
    try:
        expanded = expand_user(path)
    except ConfigError as error:
        raise _error("rpc.key_file", str(error)) from None
    for candidate in (expanded, (base_dir or Path()) / path):
        if os.path.isfile(candidate):
            return str(candidate.resolve())
    raise _error("rpc.key_file", f"there is no file {shown(path)}; make one with python -m hbserve.rpc.cluster_key")


# --- keys and types, with messages of ours ---------------------------------------------------------


def _error(key: str, what: str) -> ConfigError:
    return ConfigError(f"{key}: {what}" if key else what, key)


def _check_keys(document: dict[str, Any]) -> None:
    """Refuse unknown keys before types are checked: msgspec would not name the nearest valid key."""

    def check(section: type[msgspec.Struct], values: Any, prefix: str) -> None:
        if section is ModelConfig and isinstance(values, str):
            raise _error("model", f"is a section; write it as {{path: {shown(values)}}}")
        if not isinstance(values, dict):
            return  # a wrong type: msgspec's message is right
        fields = types_of(section)
        for key, value in values.items():
            if key not in fields:
                name = key if isinstance(key, str) else shown(key)
                raise _error(f"{prefix}{name}"[:_MAX_KEY_LENGTH], f"unknown key{unknown_name(name, list(fields), str)}")
            if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
                raise _error(f"{prefix}{key}", f"must be below 2**{_MAX_INT_BITS}, got {shown(value)}")
            inner = section_in(fields[key])
            if inner is not None:
                check(inner, value, f"{prefix}{key}.")

    check(Config, document, "")
    instances = document.get("gpu_instances")
    for index, values in enumerate(instances if isinstance(instances, list) else ()):
        check(InstanceConfig, values, f"gpu_instances[{index}].")


def _from_msgspec(error: msgspec.ValidationError, values: Any, prefix: str = "") -> ConfigError:
    """Turn ``Expected `int` >= 1 - at `$.rpc.port` `` into ``rpc.port: must be in 1..65535, got 0``.

    Args:
        values: plain data that could not be converted.
        prefix: key of these data in the configuration.
    """
    what, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    key = prefix + path
    if what.startswith("Invalid enum value"):
        wrong = what.partition(" value ")[2].strip("'")
        return _error(key, f"unknown value {shown(wrong)}{nearest(wrong, _words_at(key))}")
    if re.match(r"Expected `\w+` ([<>]=? |matching |of length )", what):
        limits = [member for member in _types_at(key) if isinstance(member, msgspec.Meta)]
        limit = limits[0] if key.endswith("]") else limits[-1]  # of an item, or of the value itself
        for part in re.findall(r"[^.\[\]]+", path):
            values = values[int(part)] if isinstance(values, list | tuple) else values[part]
        return _error(key, f"must be {limit.description}, got {shown(values)}")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing is not None:
        return _error(key, f"add the key {missing[1]}, which has no default")
    found = re.fullmatch(r"Expected `object(?: \| null)?`, got `(\w+)`", what)
    if found is not None:
        keys = ", ".join(types_of(_section_at(key)))
        return _error(key, f"must be a section with keys of its own ({keys}), got {found[1]}")
    return _error(key, what.replace("`", ""))


def _section_at(key: str) -> type:
    """Return the class of a key that is a section."""
    return next(part for part in _types_at(key) if isinstance(part, type) and issubclass(part, msgspec.Struct))


def _words_at(key: str) -> list[str]:
    """Return the valid values of a key that takes one of a few words."""
    words: list[Any] = []
    for kind in _types_at(key):
        words += list(kind) if isinstance(kind, type) and issubclass(kind, Enum) else []
        words += get_args(kind) if get_origin(kind) is Literal else []
    return [str(word) for word in words]


def _types_at(key: str) -> list[Any]:
    """Return the type of a key with its parts; see `parts_of`."""
    kind: Any = Config
    for name in re.sub(r"\[[^]]*\]", "", key).split("."):
        struct = next(part for part in parts_of(kind) if isinstance(part, type) and issubclass(part, msgspec.Struct))
        kind = types_of(struct)[name]
    return parts_of(kind)


# --- limits that concern several keys --------------------------------------------------------------


def _validate(config: Config, is_whole: bool = True) -> None:
    sizes = {"model.tensor_parallel_size": config.model.tensor_parallel_size}
    for index, instance in enumerate(config.gpu_instances):
        sizes[f"gpu_instances[{index}].tensor_parallel_size"] = instance.num_ranks
    for key, size in sizes.items():
        if size not in _NUM_RANKS:
            raise _error(key, f"must be 1, 2, 4 or 8, got {size}")
    block_size = config.performance.block_size
    if block_size is not None and block_size & (block_size - 1):
        raise _error("performance.block_size", f"must be a power of two, got {block_size}")
    _validate_kv_transfer(config)
    _validate_speculation(config)
    _validate_kv_tiers(config)
    _validate_semi_pd(config)
    _validate_targets(config)
    _validate_roles(config, is_whole)
    _require_key(config)
    _validate_addresses(config)
    _validate_launcher(config)


def _validate_targets(config: Config) -> None:
    if not config.scheduler.targets_are_soft:
        return
    if config.semi_pd.slo is not None:
        raise _error(
            "scheduler.targets_are_soft", "has no effect with semi_pd.slo, which keeps its targets; leave it out"
        )
    if config.scheduler.ttft_ms is None:
        raise _error("scheduler.targets_are_soft", "needs scheduler.ttft_ms")


def _validate_speculation(config: Config) -> None:
    given = config.speculation
    names = {"draft_model": "the draft model's", "eagle3": "the head's"}
    if given.method in names and given.model is None:
        what = f"name {names[given.method]} folder, or choose another speculation.method"
        raise _error("speculation.model", what)
    if given.method not in (*names, "auto") and given.model is not None:
        what = f"has no effect with method {given.method}; choose draft_model, eagle3 or auto"
        raise _error("speculation.model", what)


def _validate_kv_transfer(config: Config) -> None:
    given = config.kv_transfer
    if given.backend not in BACKENDS and not re.match(IMPORT_PATH, given.backend):
        hint = nearest(given.backend, list(BACKENDS))
        what = f"{shown(given.backend)} is neither a built-in backend nor a 'package.module:Class'{hint}"
        raise _error("kv_transfer.backend", what)
    for name in ("mooncake_protocol", "mooncake_device"):
        if given.backend != "mooncake" and getattr(given, name) is not None:
            raise _error(f"kv_transfer.{name}", f"has no effect with backend {shown(given.backend)}; leave it out")
    if given.backend == "shm" and given.port is not None:
        raise _error("kv_transfer.port", "backend shm has no ports; leave it out")


def _validate_kv_tiers(config: Config) -> None:
    for name in ("host_bytes", "disk", "store"):
        if getattr(config.kv_cache, name) and not config.performance.enable_prefix_caching:
            raise _error(f"kv_cache.{name}", "needs performance.enable_prefix_caching")
    store = config.kv_cache.store
    if store is None:
        return
    if store.backend not in STORES and not re.match(IMPORT_PATH, store.backend):
        hint = nearest(store.backend, list(STORES))
        what = f"{shown(store.backend)} is neither a built-in store nor a 'package.module:Class'{hint}"
        raise _error("kv_cache.store.backend", what)
    if store.backend == "mooncake" and store.master is None:
        raise _error("kv_cache.store.master", "give the host:port of the Mooncake master; hbserve store starts one")
    if store.master is not None and not 1 <= store.address[1] <= 65535:
        raise _error("kv_cache.store.master", f"the port must be in 1..65535, got {store.address[1]}")


def _validate_semi_pd(config: Config) -> None:
    if config.semi_pd.mixed and not config.semi_pd.ladder.unified:
        raise _error("semi_pd.mixed", "needs a worker of both phases; semi_pd.ladder.unified says there is none")
    for index, instance in enumerate(config.gpu_instances):
        if instance.instance_type is InstanceRole.SEMI_PD and instance.port is not None:
            what = "a semi_pd instance is started with its scheduler and needs no port"
            raise _error(f"gpu_instances[{index}].port", what)


def _validate_roles(config: Config, is_whole: bool) -> None:
    roles = [instance.instance_type for instance in config.gpu_instances]
    phases = {InstanceRole.PREFILL, InstanceRole.DECODE}
    needed, allowed = {
        "auto": (set(), {InstanceRole.UNIFIED}),
        "unified": (set(), {InstanceRole.UNIFIED}),
        "disaggregated": (phases, phases),
        "semi_pd": ({InstanceRole.SEMI_PD}, {InstanceRole.SEMI_PD, *phases}),
    }[config.mode]
    for role in InstanceRole:
        if is_whole and role in needed and role not in roles:
            what = f"mode {config.mode} needs at least one {role} instance; add one with instance_type: {role}"
            raise _error("gpu_instances", what)
    if is_whole and config.mode == "semi_pd" and len(phases.intersection(roles)) == 1:
        raise _error("gpu_instances", "beside semi_pd instances, prefill and decode instances need each other")
    for index, role in enumerate(roles):
        if role not in allowed:
            what = f"mode {config.mode} has no {role} instances, only {' and '.join(sorted(allowed))}"
            hint = "without a mode it follows from the types of the instances"
            raise _error(f"gpu_instances[{index}].instance_type", f"{what}; {hint}")


def _validate_addresses(config: Config) -> None:
    """Refuse names, KV ranks and addresses that two keys claim."""
    owners: dict[tuple[str, object], str] = {}

    def claim(kind: str, value: object, key: str) -> None:
        owner = owners.setdefault((kind, value), key)
        if owner != key:
            name = shown(value)[1:-1] if kind == "address" else shown(value)
            raise _error(key, f"{kind} {name} is already taken by {owner}")

    def claim_address(host: str, port: int, key: str) -> None:
        claim("address", f"{'127.0.0.1' if host == 'localhost' else host}:{port}", key)

    if config.server.port:
        claim_address(config.server.host, config.server.port, "server.port")
    if config.rpc.port is not None:
        claim_address(config.rpc.host, config.rpc.port, "rpc.port")
    for index, instance in enumerate(config.gpu_instances):
        key = f"gpu_instances[{index}]"
        if len(instance.instance_id) > _MAX_NAME_LENGTH:
            raise _error(f"{key}.instance_id", f"must be {NAME_RULE}, got {shown(instance.instance_id)}")
        claim("id", instance.instance_id, f"{key}.instance_id")
        claim("kv_rank", instance.kv_rank, f"{key}.kv_rank")
        if instance.port is not None:
            claim_address(instance.host, instance.port, f"{key}.port")
        if config.kv_transfer.port is not None and config.mode == "disaggregated":
            assert instance.kv_rank is not None
            host = instance.kv_ip or config.kv_transfer.ip or instance.host
            first = config.kv_transfer.port + instance.kv_rank * config.max_ranks
            for port in range(first, first + instance.num_ranks):
                claim_address(host, port, "kv_transfer.port")


def _require_key(config: Config) -> None:
    """Refuse listeners beyond this host without a key: a client that sends orders can read every prompt."""
    if config.rpc.key_file is not None:
        return
    listeners = [("rpc.host", config.rpc.host, config.rpc.port)]
    for index, instance in enumerate(config.gpu_instances):
        name = "host" if instance.bind is None else "bind"
        listeners.append((f"gpu_instances[{index}].{name}", instance.bind or instance.host, instance.port))
    for key, host, port in listeners:
        if port is not None and not is_loopback(host):
            make_key = (
                "make a key with python -m hbserve.rpc.cluster_key FILE, copy it to every host, and set rpc.key_file"
            )
            raise _error(key, f"{shown(host)[1:-1]} can be reached from other hosts; {make_key}")


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
