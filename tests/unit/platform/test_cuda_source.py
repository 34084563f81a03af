"""Kernels in CUDA C++: compiled once, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbserve.cache_folder import CACHE_VARIABLE
from hbserve.platform import cuda_source


def test_a_kernel_is_compiled_once_and_again_if_its_file_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, compiled = tmp_path / "kernel.cu", []

    def compile_by_nvrtc(text: bytes, name: str, options: list[str]) -> bytes:
        compiled.append((text, tuple(options)))
        return b"machine code " + text

    monkeypatch.setattr(cuda_source, "_compile", compile_by_nvrtc)  # NVRTC is not here
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    source.write_bytes(b"one")
    for _ in range(2):
        assert cuda_source._compiled(source, {"SIZE": 4}, (9, 0)) == b"machine code one"
    assert compiled == [(b"one", ("--gpu-architecture=sm_90", "--define-macro=SIZE=4"))]
    cuda_source._compiled(source, {"SIZE": 5}, (9, 0))
    cuda_source._compiled(source, {"SIZE": 4}, (10, 0))
    source.write_bytes(b"two")
    assert cuda_source._compiled(source, {"SIZE": 4}, (9, 0)) == b"machine code two"
    assert len(compiled) == 4
    files = list((tmp_path / "cache" / "kernels").iterdir())
    assert len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert cuda_source._compiled(source, {"SIZE": 4}, (9, 0)) == b"machine code two"
    assert len(compiled) == 5


def test_a_kernel_is_compiled_where_no_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernel.cu"
    source.write_bytes(b"one")
    monkeypatch.setattr(cuda_source, "_compile", lambda text, name, options: b"machine code")
    (tmp_path / "cache").write_bytes(b"a file, no folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert cuda_source._compiled(source, {}, (9, 0)) == b"machine code"
