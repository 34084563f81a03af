"""Options of the start scripts: each replaces a value of the file, and errors name the option."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hbserve.config import Config
from hbserve.config.options import add_options, load_with_options, refuse_server_options
from hbserve.errors import ConfigError

FILE = """
model: {path: model, tensor_parallel_size: 1}
server: {port: 1}
gpu_instances:
  - {instance_id: a, instance_type: prefill, tensor_parallel_size: 4}
  - {instance_id: b, instance_type: decode}
"""


def load(folder: Path, *options: str) -> Config:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "system.yaml").write_text(FILE)
    return load_with_options(parse(folder, *options))


def parse(folder: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(["--config", str(folder / "system.yaml"), *options])


@pytest.mark.parametrize("name", ["--tp-size", "--tensor-parallel-size"])
def test_the_number_of_ranks_is_that_of_every_instance(tmp_path: Path, name: str) -> None:
    assert [instance.num_ranks for instance in load(tmp_path).gpu_instances] == [4, 1]
    assert [instance.num_ranks for instance in load(tmp_path, name, "2").gpu_instances] == [2, 2]


def test_every_option_replaces_its_value(tmp_path: Path) -> None:
    options = "--num-tokenizer 3 --max-running-requests 7 --memory-ratio 0.5 --port 0 --host ::1 --log-level debug"
    config = load(tmp_path, *options.split())
    assert (config.server.num_tokenizers, config.performance.max_num_seqs) == (3, 7)
    assert (config.performance.memory_fraction, config.server.port, config.server.host) == (0.5, 0, "::1")
    assert config.logging.level == "DEBUG"
    assert load(tmp_path).server.port == 1


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--tp-size", "3", "--tp-size must be 1, 2, 4 or 8, got 3"),
        ("--num-tokenizer", "-1", "--num-tokenizer must be at least 0, got -1"),
        ("--max-running-requests", "0", "--max-running-requests must be positive, got 0"),
        ("--memory-ratio", "1.5", r"--memory-ratio must be in \(0, 1\], got 1.5"),
        ("--port", "70000", "--port must be in 0..65535, got 70000"),
    ],
)
def test_a_value_beyond_its_limit_is_refused_by_the_name_of_the_option(
    tmp_path: Path, option: str, value: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{why}$"):
        load(tmp_path, option, value)


def test_options_of_the_http_server_are_refused_for_an_instance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_server_options(argparse.ArgumentParser(), parse(tmp_path, "--tp-size", "2"))
    for option in ("--port", "--num-tokenizer"):
        with pytest.raises(SystemExit):
            refuse_server_options(argparse.ArgumentParser(), parse(tmp_path, option, "2"))
        assert f"{option} is for the HTTP server" in capsys.readouterr().err
