"""A short slice of `python -m benchmarks chaos`; the kills are left to tests/system and to `make chaos`."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos.campaign import Campaign, ChaosError
from benchmarks.chaos.http_cases import make_case
from hbserve.errors import ConfigError


def run(command: str) -> dict[str, dict[str, object]]:
    parser = argparse.ArgumentParser()
    chaos.add_arguments(parser)
    return chaos.run(parser.parse_args(command.split()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("configs", 200), ("folders", 50), ("requests", 200)])
def test_what_strangers_send_is_served_or_refused(kind: str, count: int, tmp_path: Path) -> None:
    found = run(f"{kind} --seed 5 --count {count} --json {tmp_path / 'out'}")[kind]
    assert found["cases"] == count
    assert (tmp_path / "out").is_file()


def test_a_case_is_the_same_whenever_it_is_run() -> None:
    whole = Campaign("requests", 7, 0, 20, None)
    alone = Campaign("requests", 7, 13, 1, None)
    assert list(alone.cases()) == [13]
    assert make_case(whole.chance(13)) == make_case(alone.chance(13))
    assert make_case(whole.chance(13)) != make_case(whole.chance(14))
    assert make_case(random.Random(1)).data


def test_a_finding_has_a_command_that_runs_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.chaos.configs.check", lambda path: ("valid", "this one is wrong"))
    with pytest.raises(ChaosError, match="1 failures"):
        run("configs --seed 3 --first 8 --count 1")
    assert "again: python -m benchmarks chaos configs --seed 3 --first 8 --count 1\n" in capsys.readouterr().out


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kinds"):
        run("earthquakes")
