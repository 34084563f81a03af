"""Configurations: the shipped files load; errors name the key, the file, the line and a hint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from hbserve import PdDisaggConfig
from hbserve.config import Config, InstanceConfig, InstanceRole, from_dict, load
from hbserve.config.fields import Section
from hbserve.config.validation import with_instance
from hbserve.errors import ConfigError, StartupError
from hbserve.rpc.instance_line import scheduler_address
from hbserve.system.launcher import fit_to_gpus
from tests.support.paths import ROOT


def write(folder: Path, text: str) -> Path:
    (folder / "model").mkdir(exist_ok=True)
    path = folder / "system.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path: Path) -> None:
    config = load(path)
    assert Path(config.model.path).is_dir()
    assert config.gpu_instances


def test_defaults_make_one_prefill_and_one_decode_instance(tmp_path: Path) -> None:
    config = load(write(tmp_path, "mode: disaggregated\nmodel: {path: model}\n"))
    assert [i.instance_type for i in config.gpu_instances] == [InstanceRole.PREFILL, InstanceRole.DECODE]
    assert [i.kv_rank for i in config.gpu_instances] == [0, 1]
    assert config.served_name == "model"


@pytest.mark.parametrize(
    ("first", "size", "host", "shares"),
    [
        (0, 2, "a", True),
        (1, 1, "a", True),
        (2, 2, "a", False),
        (0, 1, "b", False),
        (3, 1, "a", False),
        (0, 4, "a", True),
    ],
)
def test_instances_share_a_gpu_if_their_ranges_overlap(first: int, size: int, host: str, shares: bool) -> None:
    instance, other = (
        InstanceConfig(name, InstanceRole.DECODE, gpu_id=gpu_id, host=at, tensor_parallel_size=num_ranks)
        for name, gpu_id, at, num_ranks in (("one", 0, "a", 2), ("other", first, host, size))
    )
    assert instance.shares_gpu_with(other) is other.shares_gpu_with(instance) is shares


@pytest.mark.parametrize(("visible", "gpu_ids"), [("3", [0, 0]), ("0,1", [0, 1]), ("", [0, 1]), ("0,-1,2", [0, 0])])
def test_default_instances_share_a_lone_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, gpu_ids: list[int]
) -> None:
    smi = tmp_path / "nvidia-smi"  # as on a machine with four
    smi.write_text("#!/bin/sh\nfor i in 1 2 3 4; do echo NVIDIA H200; done\n")
    smi.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    text = "mode: disaggregated\nmodel: {path: model}\n"
    given = load(write(tmp_path, text))
    monkeypatch.setenv("PATH", "/nowhere")
    assert fit_to_gpus(given) is given
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fitted = fit_to_gpus(given)
    assert [instance.gpu_id for instance in fitted.gpu_instances] == gpu_ids
    share = given.performance.memory_fraction / (1 + (gpu_ids == [0, 0]))
    assert fitted.performance.memory_fraction == share
    placed = "gpu_instances: [{instance_id: p, instance_type: prefill}, {instance_id: d, instance_type: decode}]"
    config = load(write(tmp_path, text + placed))
    assert fit_to_gpus(config) is config


def test_a_folder_too_deep_for_sockets_is_named(tmp_path: Path) -> None:
    config = load(write(tmp_path, "mode: unified\nmodel: {path: model}\n"))
    with pytest.raises(StartupError, match="TMPDIR: the path of a socket has at most 107 bytes"):
        scheduler_address(config, "/" + 100 * "x")


MODEL = "model:\n  path: model\n"
TWO = (
    "mode: disaggregated\n"
    + MODEL
    + "gpu_instances:\n"
    + "  - {instance_id: a, instance_type: prefill, port: 6000}\n"
    + "  - {instance_id: b, instance_type: decode, port: 6000}\n"
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (MODEL + "chunked_prefil: {}\n", 3, "chunked_prefil: unknown key; did you mean 'chunked_prefill'"),
        (MODEL + "rpc:\n  hoist: x\n", 4, "rpc.hoist: unknown key; did you mean 'host'"),
        (MODEL + "semi_pd:\n  ladder: {prefil: [1]}\n", 4, "ladder.prefil: unknown key; did you mean 'prefill'"),
        (MODEL + "rpc:\n  heartbeat_timeout_s: .inf\n", 4, "heartbeat_timeout_s: must be positive and at most 10^6"),
        (MODEL + "rpc:\n  step_timeout_s: 1.0e+300\n", 4, "step_timeout_s: must be positive and at most 10^6"),
        (
            MODEL + "semi_pd: {slo: {ttft_target_ms: 9, tpot_target_ms: 1, cooldown_s: 10000000}}\n",
            3,
            "cooldown_s: must be in 0..10^6",
        ),
        (MODEL + "performance:\n  num_blocks: many\n", 4, "performance.num_blocks: Expected int | null, got str"),
        (MODEL + "performance:\n  num_blocks: -1\n", 4, "performance.num_blocks: must be positive, got -1"),
        (MODEL + "performance:\n  block_size: 12\n", 4, "performance.block_size: must be a power of two, got 12"),
        (MODEL + "performance:\n  memory_fraction: 1.5\n", 4, "memory_fraction: must be in (0, 1], got 1.5"),
        (MODEL + "performance:\n  scheduler: mine\n", 4, "scheduler: must be 'package.module:Class', got 'mine'"),
        (MODEL + "server:\n  port: 70000\n", 4, "server.port: must be in 0..65535, got 70000"),
        (MODEL + "semi_pd:\n  ladder:\n    decode:\n      - 100\n      - 101\n", 7, "[1]: must be in 1..100, got 101"),
        (MODEL + "semi_pd: {ladder: {unified: [50, 100]}}\n", 3, "unified: must be one percentage"),
        (MODEL + "semi_pd: {slo: {ttft_target_ms: .nan, tpot_target_ms: 1}}\n", 3, "ttft_target_ms: must be positive"),
        (MODEL + "scheduler: {targets_are_soft: true}\n", 3, "targets_are_soft: needs scheduler.ttft_ms"),
        (MODEL + "kv_cache:\n  store: {master: 'a:1'}\n", 4, "kv_cache.store: add the key bytes, which has no default"),
        (MODEL + "kv_cache: {store: mooncake}\n", 3, "must be a section with keys of its own (bytes, backend, master)"),
        (MODEL + "speculation: true\n", 3, "must be a section with keys of its own (method, model, max_draft_tokens)"),
        (
            MODEL + "scheduler: {targets_are_soft: true}\nsemi_pd: {slo: {ttft_target_ms: 9, tpot_target_ms: 1}}\n",
            3,
            "targets_are_soft: has no effect with semi_pd.slo",
        ),
        (MODEL + "mode: turbo\n", 3, "mode: unknown value 'turbo'; valid are: auto, disaggregated, semi_pd, unified"),
        (
            MODEL + "performance:\n  placement: fcsf\n",
            4,
            "performance.placement: unknown value 'fcsf'; did you mean 'fcfs'",
        ),
        (MODEL + "kv_transfer:\n  backend: ncc\n", 4, "did you mean 'nccl'"),
        (MODEL + "kv_transfer:\n  backend: moonc\n", 4, "did you mean 'mooncake'"),
        ("model:\n  path: nowhere\n", 2, "model.path: there is no folder 'nowhere'"),
        ("model:\n  path: tiny.gguf\n", 2, "there is no file 'tiny.gguf'"),
        ("model:\n  path: model\n  path: model\n", 3, "path is given twice"),
        ("mode: unified\n", 1, "add the key model, which has no default"),
        (TWO, 6, "gpu_instances[1].port: address 127.0.0.1:6000 is already taken by gpu_instances[0].port"),
        (TWO.replace("port: 6000", "port: 0"), 5, "gpu_instances[0].port: must be in 1..65535, got 0"),
        (TWO.replace("instance_id: b", f"instance_id: {65 * 'b'}"), 6, "instance_id: must be 1 to 64 letters"),
        (TWO.replace("instance_id: b", "instance_id: b/c"), 6, "must be 1 to 64 letters, digits, '_', '.' or '-', got"),
        (
            TWO.replace("decode", "decod"),
            6,
            "gpu_instances[1].instance_type: unknown value 'decod'; did you mean 'decode'",
        ),
        (TWO.replace("instance_id: b", "instance_id: a"), 6, "gpu_instances[1].instance_id: id 'a' is already taken"),
        (TWO.replace("disaggregated", "unified"), 5, "mode unified has no prefill instances"),
        (TWO.replace("decode", "prefill"), 4, "needs at least one decode instance"),
    ],
)
def test_an_error_names_key_file_line_and_hint(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(write(tmp_path, "model: [\n"))
    with pytest.raises(ConfigError, match="must be a mapping"):
        load(write(tmp_path, "- 1\n"))
    with pytest.raises(ConfigError, match="holds itself"):
        load(write(tmp_path, "model: &model [*model]\n"))
    with pytest.raises(ConfigError, match="lone surrogate"):
        load(write(tmp_path, 'mode: "\\ud83d"\n'))
    with pytest.raises(ConfigError, match=r"model\.path: there is no folder"):
        load(write(tmp_path, f"model: {{path: {'a' * 5000}}}\n"))


def test_the_flat_configuration_can_change_until_it_is_frozen(tmp_path: Path) -> None:
    flat = PdDisaggConfig(model_path=str(tmp_path), kv_transfer_backend="nccl")
    flat.chunk_size = 256
    flat.kv_buffer_size = 512 * 1024 * 1024
    config = flat.freeze()
    assert config.mode == "disaggregated"
    assert config.chunked_prefill.chunk_size == 256
    assert config.kv_transfer.buffer_size == 512 * 1024 * 1024
    with pytest.raises(AttributeError):
        config.chunked_prefill.chunk_size = 1  # type: ignore[misc]


def test_an_instance_that_joins_is_checked_like_one_of_the_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, "mode: disaggregated\nmodel: {path: model}\n"))
    joined = InstanceConfig("more", InstanceRole.DECODE, kv_rank=2, tensor_parallel_size=1)
    assert with_instance(config, joined).gpu_instances == (*config.gpu_instances, joined)
    without_prefill = msgspec.structs.replace(config, gpu_instances=config.gpu_instances[1:])
    assert with_instance(without_prefill, joined).gpu_instances == (*config.gpu_instances[1:], joined)
    for changes, key in (({"instance_id": "a b"}, "instance_id"), ({"kv_rank": -1}, "kv_rank"), ({"port": 0}, "port")):
        with pytest.raises(ConfigError, match=rf"gpu_instances\[2\]\.{key}: must be "):
            with_instance(config, msgspec.structs.replace(joined, **changes))


def test_workers_of_an_instance_may_have_longer_names() -> None:
    instance = InstanceConfig(f"{64 * 'a'}.prefill-100.12", InstanceRole.PREFILL)
    assert msgspec.convert(msgspec.to_builtins(instance), InstanceConfig) == instance


def test_every_limit_says_what_is_allowed() -> None:
    def limits(kind: object) -> Iterator[msgspec.Meta]:
        if isinstance(kind, type) and issubclass(kind, Section):
            for field in msgspec.structs.fields(kind):
                yield from limits(field.type)
        elif isinstance(kind, msgspec.Meta):
            yield kind
        else:
            for part in get_args(kind):
                yield from limits(part)

    found = list(limits(Config))
    assert len(found) > 60
    assert all(limit.description for limit in found)


def test_the_flat_configuration_names_its_own_fields_in_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_transfer_backend: "):
        PdDisaggConfig(str(tmp_path), kv_transfer_backend="moonc").freeze()
    with pytest.raises(TypeError, match=r"unknown argument 'chunk_sise'; did you mean 'chunk_size'"):
        PdDisaggConfig.from_arguments(str(tmp_path), chunk_sise=1)
    flat = PdDisaggConfig(str(tmp_path), chunk_size=0)
    with pytest.raises(AttributeError, match=r"no field 'chunk_sise'; did you mean 'chunk_size'"):
        flat.chunk_sise = 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"^chunk_size: must be positive, got 0"):
        flat.freeze()


def test_the_environment_sets_the_log_level_where_the_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "mode: unified\nmodel: {path: model}\n"
    monkeypatch.setenv("LOG_LEVEL", "debug")
    assert load(write(tmp_path, text)).logging.level == "DEBUG"
    assert load(write(tmp_path, text + "logging: {format: json}\n")).logging.level == "DEBUG"
    assert load(write(tmp_path, text + "logging: {level: ERROR}\n")).logging.level == "ERROR"
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="LOG_LEVEL has the unknown value 'loud'; valid are: DEBUG"):
        load(write(tmp_path, text))


INSTANCES = "gpu_instances: [{instance_id: a, instance_type: %s}, {instance_id: b, instance_type: %s}]\n"


@pytest.mark.parametrize(
    ("types", "mode"),
    [
        (("prefill", "decode"), "disaggregated"),
        (("decode", "prefill"), "disaggregated"),
        (("unified", "unified"), "unified"),
        (("semi_pd", "semi_pd"), "semi_pd"),
    ],
)
def test_the_mode_follows_from_the_types_of_the_instances(tmp_path: Path, types: tuple[str, str], mode: str) -> None:
    assert load(write(tmp_path, MODEL + INSTANCES % types)).mode == mode
    assert load(write(tmp_path, MODEL + "mode:\n" + INSTANCES % types)).mode == mode
    instances = [{"instance_id": name, "instance_type": kind} for name, kind in zip("ab", types, strict=True)]
    assert PdDisaggConfig(str(tmp_path), gpu_instances=instances).freeze().mode == mode
    assert load(write(tmp_path, MODEL + "mode: auto\n" + INSTANCES % types)).mode == {"unified": "auto"}.get(mode, mode)
    assert load(write(tmp_path, MODEL)).mode == "auto"
    assert load(write(tmp_path, MODEL + "gpu_instances: []\n")).mode == "auto"
    assert PdDisaggConfig(str(tmp_path)).freeze().mode == "disaggregated"


@pytest.mark.parametrize(
    ("types", "why"),
    [
        (("prefill", "prefill"), "gpu_instances: mode disaggregated needs at least one decode instance; add one with"),
        (("unified", "decode"), "mode disaggregated needs at least one prefill instance; add one with"),
        (("semi_pd", "unified"), r"gpu_instances\[1\].instance_type: mode semi_pd has no unified instances, only"),
        (("semi_pd", "decode"), "prefill and decode instances need each other"),
    ],
)
def test_instances_of_no_mode_are_refused_with_what_to_add(tmp_path: Path, types: tuple[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(write(tmp_path, MODEL + INSTANCES % types))


def test_a_mode_that_contradicts_the_instances_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="follows from the types of the instances"):
        load(write(tmp_path, MODEL + "mode: unified\n" + INSTANCES % ("prefill", "decode")))


def test_a_linked_model_folder_is_served_under_the_name_of_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshot-0c54").mkdir()
    (tmp_path / "my-model").symlink_to("snapshot-0c54")
    monkeypatch.chdir(tmp_path)
    for path in ("my-model", "my-model/", "./my-model", str(tmp_path / "my-model"), "snapshot-0c54/../my-model"):
        config = PdDisaggConfig(path).freeze()
        assert config.served_name == "my-model"
        assert config.model.path == str(tmp_path / "snapshot-0c54"), "a moved link must not change a restart's weights"
    assert PdDisaggConfig("my-model", served_name="other").freeze().served_name == "other"
    assert PdDisaggConfig("snapshot-0c54").freeze().served_name == "snapshot-0c54"
    monkeypatch.chdir(tmp_path / "my-model")
    assert PdDisaggConfig(".").freeze().served_name == "snapshot-0c54"


def test_a_flat_configuration_needs_its_model_only_when_it_is_used(tmp_path: Path) -> None:
    flat = PdDisaggConfig()
    flat.chunk_size = 256
    with pytest.raises(ConfigError, match="model_path: give the path"):
        flat.freeze()
    flat.model_path = str(tmp_path)
    assert flat.freeze().chunked_prefill.chunk_size == 256


def test_numbers_with_an_exponent_are_numbers_as_in_yaml_1_2(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, MODEL + "rpc: {step_timeout_s: 1e3, drain_timeout_s: 25.e-1, start_timeout_s: 5E+1}\n")
    )
    assert (config.rpc.step_timeout_s, config.rpc.drain_timeout_s, config.rpc.start_timeout_s) == (1000, 2.5, 50)
    assert load(write(tmp_path, MODEL + "  served_name: '1e3'\n")).model.served_name == "1e3"


def test_overrides_replace_the_values_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL + "server: {port: 1}\nperformance:\n")
    config = load(path, {"server.port": 2, "performance.max_num_seqs": 3})
    assert (config.server.port, config.performance.max_num_seqs) == (2, 3)
    with pytest.raises(ConfigError, match=r"^server.port: must be in 0..65535, got 70000"):
        load(path, {"server.port": 70000})


@pytest.mark.parametrize(("text", "level"), [("warn", "WARNING"), (" Info ", "INFO"), ("critical", "ERROR")])
def test_the_environment_sets_the_log_level_of_python_users_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, level: str
) -> None:
    monkeypatch.setenv("LOG_LEVEL", text)
    assert PdDisaggConfig(str(tmp_path)).freeze().logging.level == level
    assert PdDisaggConfig(str(tmp_path), log_level="DEBUG").freeze().logging.level == "DEBUG"


def test_a_tokenizer_is_a_folder_because_only_models_are_fetched_by_name(tmp_path: Path) -> None:
    for name in ("smollm2", "org/name"):
        with pytest.raises(ConfigError, match=r"model\.tokenizer_path: must be a folder, and there is none at"):
            from_dict({"model": {"path": str(tmp_path), "tokenizer_path": name}})


def test_several_threads_make_the_first_configuration() -> None:
    """As programs with several systems do. Turns are short and garbage is collected often, so that a race is seen."""
    program = """
import gc, sys, threading
from hbserve.config import from_dict
found = []
threads = [threading.Thread(target=lambda: found.append(from_dict({"model": {"path": "."}}))) for _ in range(8)]
gc.set_threshold(5)
sys.setswitchinterval(1e-6)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 8
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
