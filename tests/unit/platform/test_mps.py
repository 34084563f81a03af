"""Finding, starting and ending MPS, with a script in place of NVIDIA's program; rounding of percentages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hbserve import PdDisaggConfig
from hbserve.errors import StartupError
from hbserve.platform.cuda_share import is_whole, size_of_first
from hbserve.platform.mps import MpsDaemon
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"
CONTROL = """#!/bin/sh
state="$CUDA_MPS_PIPE_DIRECTORY/state"
if [ "$1" = -d ]; then
    [ -z "$BROKEN" ] || { echo "no permission"; exit 1; }
    echo start >> "$RECORD"; touch "$state"; exit 0
fi
read line
[ -f "$state" ] || exit 1
if [ "$line" = quit ]; then rm "$state"; echo quit >> "$RECORD"; fi
exit 0
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the control program records its commands; daemons have their folders beside it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("nvidia-cuda-mps-control", CONTROL), ("nvidia-smi", "#!/bin/sh\necho NVIDIA H200\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "usual"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "record"


def test_a_daemon_of_ours_has_a_private_folder_and_leaves_nothing(record: Path) -> None:
    daemon = MpsDaemon()
    daemon.start()
    assert daemon.is_ours
    folder = Path(daemon.environment["CUDA_MPS_PIPE_DIRECTORY"])
    assert folder.parent.parent == record.parent
    assert (folder / "state").exists()
    daemon.restart()
    assert (folder / "state").exists()
    daemon.stop()
    assert record.read_text().split() == ["start", "quit", "start", "quit"]
    assert not folder.parent.exists()


def test_a_daemon_of_the_users_is_used_as_it_is(record: Path) -> None:
    usual = record.parent / "usual"
    usual.mkdir()
    (usual / "state").touch()
    daemon = MpsDaemon()
    daemon.start()
    assert not daemon.is_ours
    assert daemon.environment == {"CUDA_MPS_PIPE_DIRECTORY": str(usual)}
    daemon.restart()
    daemon.stop()
    assert not record.exists()


def test_where_it_cannot_run_it_says_why_and_what_to_use_instead(
    record: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(StartupError, match=r"its daemon does not run: 'no permission\\n'; use mode unified"):
        MpsDaemon().start()
    (record.parent / "bin" / "nvidia-cuda-mps-control").unlink()
    manager = ProcessRotationManager(PdDisaggConfig.from_arguments(str(DEMO), mode="semi_pd"))
    assert not manager.start()
    assert "there is no program nvidia-cuda-mps-control; use mode unified" in caplog.text


def test_a_percentage_is_rounded_to_what_an_h200_can_set_apart() -> None:
    assert [size_of_first(132, percentage) for percentage in (1, 50, 60, 98)] == [8, 64, 80, 128]
    assert [is_whole(132, percentage, "first") for percentage in (98, 99, 100)] == [False, True, True]
    assert [is_whole(132, percentage, "last") for percentage in (96, 97, 100)] == [False, True, True]
