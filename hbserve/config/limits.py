"""Limits of a configuration that concern several keys, and powers of two."""

from __future__ import annotations

import re

from hbserve.config.fields import IMPORT_PATH, NAME_RULE
from hbserve.config.keys import error_at
from hbserve.config.sections import Config, InstanceRole
from hbserve.hints import nearest, shown

_BACKENDS = ("nccl", "mooncake", "shm")
"""Names of the built-in backends that move KV."""
_STORES = ("mooncake",)
"""Names of the built-in stores of KV blocks."""
_NUM_RANKS = (1, 2, 4, 8)
_MAX_NAME_LENGTH = 64


def is_loopback(host: str) -> bool:
    """Whether only this host can connect there."""
    return host in ("localhost", "::1", "lo") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def check_limits(config: Config, is_whole: bool = True) -> None:
    """Check what keys need of each other.

    Args:
        is_whole: False: instances may still be missing.

    Raises:
        ConfigError: naming the key.
    """
    sizes = {"model.tensor_parallel_size": config.model.tensor_parallel_size}
    for index, instance in enumerate(config.gpu_instances):
        sizes[f"gpu_instances[{index}].tensor_parallel_size"] = instance.num_ranks
    for key, size in sizes.items():
        if size not in _NUM_RANKS:
            raise error_at(key, f"must be 1, 2, 4 or 8, got {size}")
    block_size = config.performance.block_size
    if block_size is not None and block_size & (block_size - 1):
        raise error_at("performance.block_size", f"must be a power of two, got {block_size}")
    _check_kv_transfer(config)
    _check_speculation(config)
    _check_kv_tiers(config)
    _check_semi_pd(config)
    _check_targets(config)
    _check_roles(config, is_whole)
    _check_key(config)
    _check_addresses(config)
    _check_launcher(config)


def _check_targets(config: Config) -> None:
    if not config.scheduler.targets_are_soft:
        return
    if config.semi_pd.slo is not None:
        raise error_at(
            "scheduler.targets_are_soft", "has no effect with semi_pd.slo, which keeps its targets; leave it out"
        )
    if config.scheduler.ttft_ms is None:
        raise error_at("scheduler.targets_are_soft", "needs scheduler.ttft_ms")


def _check_speculation(config: Config) -> None:
    given = config.speculation
    names = {"draft_model": "the draft model's", "eagle3": "the head's"}
    if given.method in names and given.model is None:
        what = f"name {names[given.method]} folder, or choose another speculation.method"
        raise error_at("speculation.model", what)
    if given.method not in (*names, "auto") and given.model is not None:
        what = f"has no effect with method {given.method}; choose draft_model, eagle3 or auto"
        raise error_at("speculation.model", what)


def _check_kv_transfer(config: Config) -> None:
    given = config.kv_transfer
    if given.backend not in _BACKENDS and not re.match(IMPORT_PATH, given.backend):
        hint = nearest(given.backend, list(_BACKENDS))
        what = f"{shown(given.backend)} is neither a built-in backend nor a 'package.module:Class'{hint}"
        raise error_at("kv_transfer.backend", what)
    for name in ("mooncake_protocol", "mooncake_device"):
        if given.backend != "mooncake" and getattr(given, name) is not None:
            raise error_at(f"kv_transfer.{name}", f"has no effect with backend {shown(given.backend)}; leave it out")
    if given.backend == "shm" and given.port is not None:
        raise error_at("kv_transfer.port", "backend shm has no ports; leave it out")


def _check_kv_tiers(config: Config) -> None:
    for name in ("host_bytes", "disk", "store"):
        if getattr(config.kv_cache, name) and not config.performance.enable_prefix_caching:
            raise error_at(f"kv_cache.{name}", "needs performance.enable_prefix_caching")
    store = config.kv_cache.store
    if store is None:
        return
    if store.backend not in _STORES and not re.match(IMPORT_PATH, store.backend):
        hint = nearest(store.backend, list(_STORES))
        what = f"{shown(store.backend)} is neither a built-in store nor a 'package.module:Class'{hint}"
        raise error_at("kv_cache.store.backend", what)
    if store.backend == "mooncake" and store.master is None:
        raise error_at("kv_cache.store.master", "give the host:port of the Mooncake master; hbserve store starts one")
    if store.master is not None and not 1 <= store.address[1] <= 65535:
        raise error_at("kv_cache.store.master", f"the port must be in 1..65535, got {store.address[1]}")


def _check_semi_pd(config: Config) -> None:
    if config.semi_pd.mixed and not config.semi_pd.ladder.unified:
        raise error_at("semi_pd.mixed", "needs a worker of both phases; semi_pd.ladder.unified says there is none")
    for index, instance in enumerate(config.gpu_instances):
        if instance.instance_type is InstanceRole.SEMI_PD and instance.port is not None:
            what = "a semi_pd instance is started with its scheduler and needs no port"
            raise error_at(f"gpu_instances[{index}].port", what)


def _check_roles(config: Config, is_whole: bool) -> None:
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
            raise error_at("gpu_instances", what)
    if is_whole and config.mode == "semi_pd" and len(phases.intersection(roles)) == 1:
        raise error_at("gpu_instances", "beside semi_pd instances, prefill and decode instances need each other")
    for index, role in enumerate(roles):
        if role not in allowed:
            what = f"mode {config.mode} has no {role} instances, only {' and '.join(sorted(allowed))}"
            hint = "without a mode it follows from the types of the instances"
            raise error_at(f"gpu_instances[{index}].instance_type", f"{what}; {hint}")


def _check_addresses(config: Config) -> None:
    """Refuse names, KV ranks and addresses that two keys claim."""
    owners: dict[tuple[str, object], str] = {}

    def claim(kind: str, value: object, key: str) -> None:
        owner = owners.setdefault((kind, value), key)
        if owner != key:
            name = shown(value)[1:-1] if kind == "address" else shown(value)
            raise error_at(key, f"{kind} {name} is already taken by {owner}")

    def claim_address(host: str, port: int, key: str) -> None:
        claim("address", f"{'127.0.0.1' if host == 'localhost' else host}:{port}", key)

    if config.server.port:
        claim_address(config.server.host, config.server.port, "server.port")
    if config.rpc.port is not None:
        claim_address(config.rpc.host, config.rpc.port, "rpc.port")
    for index, instance in enumerate(config.gpu_instances):
        key = f"gpu_instances[{index}]"
        if len(instance.instance_id) > _MAX_NAME_LENGTH:
            raise error_at(f"{key}.instance_id", f"must be {NAME_RULE}, got {shown(instance.instance_id)}")
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


def _check_key(config: Config) -> None:
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
            raise error_at(key, f"{shown(host)[1:-1]} can be reached from other hosts; {make_key}")


def _check_launcher(config: Config) -> None:
    if config.launcher != "ray":
        return
    if config.rpc.port is None:
        raise error_at("rpc.port", "instances that Ray starts find the scheduler by it; set rpc.port")
    for index, instance in enumerate(config.gpu_instances):
        if instance.instance_type is InstanceRole.SEMI_PD:
            raise error_at("launcher", "Ray starts no semi_pd instances; use local")
        for name in ("port", "bind"):
            if getattr(instance, name) is not None:
                raise error_at(f"gpu_instances[{index}].{name}", "Ray decides where an instance listens; leave it out")
