"""Flags of the commands that take a system: each sets its key, and errors name the flag."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from hbserve import PdDisaggConfig
from hbserve.cli.options import SystemParser, effective_config
from hbserve.config import Config, from_dict, load
from hbserve.config.effective import EffectiveConfig
from hbserve.config.flat import KEYS
from hbserve.config.foreign_names import FOREIGN_NAMES
from hbserve.config.keys import all_keys
from hbserve.errors import ConfigError
from tests.support.paths import ROOT

FILE = """
model: {path: model, tensor_parallel_size: 1}
server: {port: 1}
gpu_instances:
  - {instance_id: a, instance_type: prefill, tensor_parallel_size: 4}
  - {instance_id: b, instance_type: decode}
"""
SECTIONS = {
    "semi_pd.slo": ("--semi_pd.slo", "{ttft_target_ms: 1, tpot_target_ms: 1}"),
    "kv_cache.disk": ("--kv_cache.disk", "{path: files, bytes: 1}"),
    "kv_cache.store": ("--kv_cache.store", "{bytes: 1, master: 'host:1'}"),
}
"""Sections that are not there by default, and what makes them."""
SLO = SECTIONS["semi_pd.slo"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and a file of a system."""
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "system.yaml").write_text(FILE)
    (tmp_path / "key").write_text("")
    monkeypatch.chdir(tmp_path)
    for variable in ("LOG_LEVEL", "SEMI_PD_PREFILL_SM_PERCENTILE", "SEMI_PD_DECODE_SM_PERCENTILE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def effective(*words: str) -> EffectiveConfig:
    return effective_config(SystemParser("hbserve serve", "").parse(words))


def with_file(*options: str) -> Config:
    return effective("--config", "system.yaml", *options).config


# --- every key -------------------------------------------------------------------------------------

VALUES = {
    "model.path": "other",
    "model.tokenizer_path": "other",
    "model.tensor_parallel_size": "2",
    "gpu_instances": "[{instance_id: mine, instance_type: unified, gpu_id: 3}]",
    "kv_cache.disk": "{path: files, bytes: 1000000}",
    "kv_cache.disk.path": "others",
    "kv_cache.store": "{bytes: 1000000, master: 'other:1'}",
    "kv_cache.store.backend": "my.module:Tier",
    "kv_cache.store.master": "other:1",
    "kv_transfer.backend": "mooncake",
    "performance.block_size": "32",
    "performance.memory_fraction": "0.5",
    "performance.scheduler": "my.module:Policy",
    "semi_pd.ladder": "{prefill: [60, 100], decode: [40]}",
    "semi_pd.slo": "{ttft_target_ms: 5, tpot_target_ms: 6}",
    "semi_pd.ladder.prefill": "[70, 100]",
    "semi_pd.ladder.decode": "[70]",
    "semi_pd.ladder.unified": "[70]",
    "rpc.key_file": "key",
    "server.cors_origins": "['https://page.example']",
    "speculation.max_draft_tokens": "5",
    "speculation.model": "other",
    "telemetry.otlp_endpoint": "http://127.0.0.1:4318/v1/traces",
}
"""Values of keys for which `value_for` has none; all others have a word or a number."""

NEEDS = {
    "kv_transfer.mooncake_protocol": ("--kv_transfer.backend", "mooncake"),
    "kv_transfer.mooncake_device": ("--kv_transfer.backend", "mooncake"),
    "launcher": ("--rpc.port", "50050"),
    "semi_pd.mixed": ("--semi_pd.ladder.unified", "[100]"),
    "scheduler.targets_are_soft": ("--scheduler.ttft_ms", "300"),
    "speculation.model": ("--speculation.method", "draft_model"),
}
"""Flags that a key needs beside its own."""


def value_for(key: str, default: Any) -> str:
    """A value of the key that is not its default."""
    kind = str(all_keys()[key])
    if key in VALUES:
        return VALUES[key]
    if "Literal" in kind:
        words = kind.partition("[")[2].replace("'", "").rstrip("]").replace("typing.Literal[", "").split(", ")
        return next(word for word in words if word != str(default))
    if "bool" in kind:
        return "false" if default is True else "true"
    if "float" in kind:
        return "7.5"
    return "77" if "int" in kind else "word"


@functools.cache
def default_of(key: str) -> Any:
    value: Any = Config(model=None)  # type: ignore[arg-type]
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def test_each_key_has_a_flag_that_sets_it() -> None:
    for key in all_keys():
        others = SECTIONS.get(key.rpartition(".")[0]) or NEEDS.get(key) or ()
        model = () if key == "model.path" else ("model",)
        text = value_for(key, default_of(key))
        given = effective(*model, *others, f"--{key}", text)
        value: Any = given.config
        for name in key.split("."):
            value = getattr(value, name)
        assert value != default_of(key), key
        value = json.loads(msgspec.json.encode(value))
        expected = yaml.safe_load(text)
        if key in ("model.path", "model.tokenizer_path", "speculation.model", "rpc.key_file"):
            expected = str(Path(text).absolute())
        if key == "gpu_instances":
            [value], [expected] = value, expected
        if isinstance(expected, dict):  # a section, with more keys than are given
            assert value | expected == value, key
        else:
            assert value == expected, key
            [line] = [line for line in given.as_yaml().splitlines() if line.endswith(f"  # flag --{key}")]
            assert line.split(": ")[0].strip() == key.rpartition(".")[2]


def test_null_takes_a_value_away() -> None:
    Path("system.yaml").write_text("model: {path: model, max_model_len: 5}\nsemi_pd: {mixed: true}\n")
    assert with_file("--model.max_model_len", "null").model.max_model_len is None


@pytest.mark.parametrize("name", ["--tp-size", "--tensor-parallel-size", "--model.tensor_parallel_size"])
def test_the_number_of_ranks_is_that_of_every_instance(name: str) -> None:
    assert [instance.num_ranks for instance in with_file().gpu_instances] == [4, 1]
    assert [instance.num_ranks for instance in with_file(name, "2").gpu_instances] == [2, 2]


@pytest.mark.parametrize(
    ("size", "gpus", "moved"),
    [
        (2, [0, 1], [0, 2]),
        (4, [1, 0, 2], [4, 0, 8]),
        (2, [2, 3], [2, 4]),
        (2, [0, 0, 1], [0, 0, 2]),  # two share a GPU, and share both of them now
        (2, [0, "1 on b", 1], [0, 1, 2]),
        (1, [0, 2], [0, 2]),
        (2, ["none", 1], [0, 2]),
    ],
)
def test_another_number_of_ranks_moves_the_gpus_of_instances_apart(
    size: int, gpus: list[Any], moved: list[int]
) -> None:
    instances: list[dict[str, Any]] = []
    for number, gpu in enumerate(gpus):
        gpu_id, _, host = str(gpu).partition(" on ")
        instance: dict[str, Any] = {"instance_id": f"i{number}", "instance_type": "unified", "tensor_parallel_size": 8}
        instance |= {"host": host, "port": 1, "bind": "localhost"} if host else {}
        instances.append(instance if gpu == "none" else instance | {"gpu_id": int(gpu_id)})
    Path("system.yaml").write_text(yaml.safe_dump({"model": {"path": "model"}, "gpu_instances": instances}))
    given = effective("--config", "system.yaml", "--tp-size", str(size))
    assert [instance.gpu_id for instance in given.config.gpu_instances] == moved
    for placed, gpu in zip(given.config.gpu_instances, gpus, strict=True):
        is_moved = gpu not in ("none", placed.gpu_id, f"{placed.gpu_id} on b")
        assert ("  # flag --tp-size" in _line(given.as_yaml(), placed.instance_id, "gpu_id")) is is_moved


def _line(text: str, instance_id: str, name: str) -> str:
    """Return the line of an instance's key in a printed configuration."""
    return next(
        line for line in text.partition(f"- instance_id: {instance_id} ")[2].splitlines() if f" {name}: " in line
    )


@pytest.mark.parametrize("gpu_id", ["true", "-1", "x", "1.5", "[0]"])
def test_a_gpu_that_is_none_is_refused_with_another_number_of_ranks_too(gpu_id: str) -> None:
    Path("system.yaml").write_text(FILE.replace("type: decode", f"type: decode, gpu_id: {gpu_id}"))
    with pytest.raises(ConfigError, match="gpu_id"):
        with_file("--tp-size", "2")


def test_short_names_replace_their_values() -> None:
    options = "--num-tokenizer 3 --max-running-requests 7 --memory-ratio 0.5 --port 0 --host ::1 --log-level debug"
    config = with_file(*options.split())
    assert (config.server.num_tokenizers, config.performance.max_num_seqs) == (3, 7)
    assert (config.performance.memory_fraction, config.server.port, config.server.host) == (0.5, 0, "::1")
    assert config.logging.level == "DEBUG"
    assert with_file().server.port == 1
    assert with_file("--port", "2", "--server.port", "2").server.port == 2
    assert with_file("--port", "2", "--port", "3").server.port == 3, "as everywhere, the last one counts"


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--tp-size 3", "--tp-size must be 1, 2, 4 or 8, got 3"),
        ("--num-tokenizer -1", "--num-tokenizer must be at least 0, got -1"),
        ("--max-running-requests 0", "--max-running-requests must be positive, got 0"),
        ("--memory-ratio 1.5", "--memory-ratio must be in (0, 1], got 1.5"),
        ("--port 70000", "--port must be in 0..65535, got 70000"),
        ("--server.port 70000", "--server.port must be in 0..65535, got 70000"),
        ("--mode turbo", "--mode: unknown value 'turbo'; valid are: auto, disaggregated, semi_pd, unified"),
        ("--semi_pd.ladder.decode [100,101]", "--semi_pd.ladder.decode: semi_pd.ladder.decode[1]: must be in 1..100"),
        ("--semi_pd.slo {'ttft_target_ms':5}", "--semi_pd.slo: add the key tpot_target_ms, which has no default"),
        (
            "--config nowhere",
            "cannot read the configuration nowhere: No such file or directory; shipped are: pd_disagg",
        ),
        ("--model.path other", "MODEL and --model.path are the same"),
        ("--ttft-ms 1 --scheduler.ttft_ms 1", "--ttft-ms and --scheduler.ttft_ms are the same"),
        (
            "--mode semi_pd --ttft-ms 1 --tpot-ms 2 --semi_pd.slo.ttft_target_ms 3",
            "--ttft-ms and --semi_pd.slo.ttft_target_ms set semi_pd.slo.ttft_target_ms to different values; give one",
        ),
        (
            "--no-targets --scheduler.targets_by_default true",
            "--no-targets and --scheduler.targets_by_default set scheduler.targets_by_default to different values",
        ),
        ("--ttft-ms -1", "--ttft-ms must be positive and at most 10^9, got -1.0"),
        ("--no-targets --tpot-ms 5", "--no-targets: a target is given"),
        ("--gpus 0,1,2 --tp-size 2", "--gpus: an instance has 2 GPUs (model.tensor_parallel_size); 0,1,2 do not"),
        ("--gpus 0,2 --tp-size 2", "--gpus: the GPUs of an instance follow each other, 0,2 do not"),
        ("--gpus 0 --mode disaggregated", "--gpus: mode disaggregated needs GPUs for prefill and for decode"),
        ("--gpus 0 --config system.yaml", "--gpus: the list gpu_instances is given"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_the_name_of_the_flag(words: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        effective("model", *words.split(" "))
    assert str(caught.value).startswith(why)


def test_a_command_without_a_model_or_with_a_wrong_one_says_so() -> None:
    with pytest.raises(ConfigError, match="give MODEL"):
        effective()
    with pytest.raises(ConfigError, match="MODEL: there is no folder 'nowhere'"):
        effective("nowhere")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--prot 8", "unknown flag --prot; did you mean '--port'?"),
        ("--server.prot=8", "unknown flag --server.prot; did you mean '--server.port'?"),
        ("--max-num-seqs 8", "unknown flag --max-num-seqs; write --performance.max_num_seqs\n"),
        ("--kv-cache.store.bytes 8", "unknown flag --kv-cache.store.bytes; write --kv_cache.store.bytes\n"),
        ("other", "one MODEL is enough: 'other' is one too many"),
        ("--server.port eight", "argument --port/--server.port: must be a whole number, got 'eight'"),
        ("--kv_transfer.timeout_s soon", "argument --kv_transfer.timeout_s: must be a number, got 'soon'"),
        ("--kv_transfer.verify yes", "argument --kv_transfer.verify: must be true or false, got 'yes'"),
        ("--semi_pd.ladder.decode [", "argument --semi_pd.ladder.decode: '[' is not valid YAML"),
        ("--gpus one", "argument --gpus: must be numbers of GPUs such as 0,1, got 'one'"),
        ("--gpus 1,1", "argument --gpus: names a GPU twice: 1,1"),
        ("--port 1 --server.port 2", "--port and --server.port are the same key with different values; give one"),
        (
            "--tensor-parallel-size 2 --tp-size 4",
            "--tensor-parallel-size and --tp-size are the same key with different",
        ),
    ],
)
def test_what_is_no_flag_or_no_value_of_its_type_ends_the_program(
    words: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        effective("model", *words.split(" "))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"hbserve serve: error: {why}")


def test_names_of_other_programs_are_told_by_ours_and_the_unit(capsys: pytest.CaptureFixture[str]) -> None:
    parser = SystemParser("hbserve serve", "")
    short_names = set(re.findall(r"--[\w-]+", parser.format_usage()))
    our_names = {key.rpartition(".")[2] for key in all_keys()}
    for name, foreign in FOREIGN_NAMES.items():
        flag, whose = f"--{name.replace('_', '-')}", f"that is {foreign.whose}'s name"
        assert foreign.key is None or foreign.key in all_keys()
        assert name not in our_names
        if flag not in short_names:
            with pytest.raises(SystemExit):
                parser.parse(["model", flag, "1"])
            errors = capsys.readouterr().err
            assert f"unknown flag {flag}; {whose}" in errors
            assert foreign.note in errors
            assert foreign.key is None or f"--{foreign.key} (" in errors
        with pytest.raises(ConfigError) as caught:
            from_dict({"model": {"path": "model"}, "performance": {name: 1}})
        assert f"performance.{name}: unknown key; {whose}" in str(caught.value)
        assert foreign.key is None or f"name for {foreign.key} (" in str(caught.value)
        if name not in KEYS:
            with pytest.raises(TypeError) as argument:
                PdDisaggConfig.from_arguments("model", **{name: 1})
            assert f"unknown argument {name!r}; {whose}" in str(argument.value)
            in_python = [flat for flat, key in KEYS.items() if key == foreign.key]
            assert all(f"name for {flat} (" in str(argument.value) for flat in in_python)


def test_a_name_of_ours_in_the_wrong_section_is_told_the_right_one() -> None:
    for section, name, hint in (
        ({"max_num_seqs": 1}, "max_num_seqs", "write performance.max_num_seqs"),
        ({"scheduler": {"chunk_size": 1}}, "scheduler.chunk_size", "write chunked_prefill.chunk_size"),
        ({"tensor-parallel-size": 2}, "tensor-parallel-size", "write model.tensor_parallel_size"),
        ({"logging": {"port": 2}}, "logging.port", "write kv_transfer.port or rpc.port or server.port"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_dict({"model": {"path": "model"}} | section)
        assert str(caught.value) == f"{name}: unknown key; {hint}"
    with pytest.raises(ConfigError, match=r"model: is a section; write it as \{path: 'model'\}"):
        from_dict({"model": "model"})


# --- shortcuts -------------------------------------------------------------------------------------


def test_targets_order_the_prompts_and_move_the_split() -> None:
    config = effective("model", "--ttft-ms", "400", "--tpot-ms", "40").config
    assert (config.scheduler.ttft_ms, config.scheduler.tpot_ms, config.scheduler.policy) == (400, 40, "slo_aware")
    assert config.semi_pd.slo is None
    config = effective("model", "--ttft-ms", "400", "--tpot-ms", "40", "--mode", "semi_pd").config
    assert config.semi_pd.slo is not None
    assert (config.semi_pd.slo.ttft_target_ms, config.semi_pd.slo.tpot_target_ms) == (400, 40)
    config = effective("model", "--ttft-ms", "400", "--mode", "semi_pd", "--scheduler.policy", "fcfs").config
    assert (config.scheduler.ttft_ms, config.scheduler.policy, config.semi_pd.slo) == (400, "fcfs", None)
    assert config.scheduler.targets_by_default
    assert not effective("model", "--no-targets").config.scheduler.targets_by_default
    config = effective("model", *SLO, "--ttft-ms", "400", "--mode", "semi_pd").config
    assert config.semi_pd.slo is not None
    assert (config.semi_pd.slo.ttft_target_ms, config.semi_pd.slo.tpot_target_ms) == (400, 1)


@pytest.mark.parametrize(
    ("words", "instances"),
    [
        ("--gpus 3", ["unified-0 unified 3"]),
        ("--gpus 0,1", ["unified-0 unified 0", "unified-1 unified 1"]),
        ("--gpus 2,3 --tp-size 2", ["unified-0 unified 2"]),
        ("--gpus 1,2 --mode semi_pd", ["semi-0 semi_pd 1", "semi-1 semi_pd 2"]),
        (
            "--gpus 4,0,1 --mode disaggregated",
            ["prefill-0 prefill 4", "decode-0 decode 0", "decode-1 decode 1"],
        ),
    ],
)
def test_gpus_make_the_instances(words: str, instances: list[str]) -> None:
    config = effective("model", *words.split()).config
    assert config.mode == (words.split()[-1] if "--mode" in words else "auto")
    assert [f"{i.instance_id} {i.instance_type} {i.gpu_id}" for i in config.gpu_instances] == instances


# --- where values come from ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "model",
        "model --mode disaggregated",
        "model --mode disaggregated --gpus 0,1,2 --kv_transfer.backend shm",
        "model --mode semi_pd --ttft-ms 400 --tpot-ms 40 --semi_pd.ladder.prefill [60,100]",
        "model --server.cors_origins ['*'] --model.served_name null --performance.memory_fraction 0.123456789",
        "link --rpc.port 50050 --rpc.key_file key --rpc.host 0.0.0.0 --launcher ray",
        *(f"other --config {path.stem}" for path in sorted((ROOT / "configs").glob("*.yaml"))),
    ],
)
def test_the_printed_configuration_is_the_same_system(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("link").symlink_to("model")
    monkeypatch.setenv("LOG_LEVEL", "warn")
    given = effective(*words.split())
    Path("printed.yaml").write_text(given.as_yaml())
    monkeypatch.delenv("LOG_LEVEL")
    assert load("printed.yaml") == given.config
    assert effective("--config", "printed.yaml").config == given.config


def test_each_value_is_printed_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "warn")
    monkeypatch.setenv("SEMI_PD_DECODE_SM_PERCENTILE", "70")
    text = effective("other", "--config", "system.yaml", "--port", "2", "--ttft-ms", "400").as_yaml()
    for line in (
        f"  path: {Path('other').absolute()}  # flag MODEL",
        "  tensor_parallel_size: 1  # file system.yaml:2",
        "mode: disaggregated  # default",
        "- instance_id: a  # file system.yaml:5",
        "  tensor_parallel_size: 4  # file system.yaml:5",
        "  port: 2  # flag --port",
        "  ttft_ms: 400.0  # flag --ttft-ms",
        "  level: WARNING  # environment LOG_LEVEL",
        "  prefill_percentage: 80  # default",
        "  decode_percentage: 70  # environment SEMI_PD_DECODE_SM_PERCENTILE",
    ):
        assert f"\n{line}\n" in text, line
