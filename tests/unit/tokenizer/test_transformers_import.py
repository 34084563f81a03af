"""The names that transformers exports: kept in the cache folder, and the same as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers.utils.import_utils import define_import_structure

from hbserve.cache_folder import CACHE_VARIABLE
from hbserve.cache_folder.transformers_import import Names, kept_names

MODELS = Path(transformers.__file__).parent / "models"


def test_kept_names_are_those_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    expected = define_import_structure(str(MODELS / "__init__.py"))
    num_reads = 0

    def read(path: str | Path, prefix: str | None = None) -> Names:
        nonlocal num_reads
        num_reads += 1
        names: Names = expected if prefix is None else define_import_structure(path, prefix)
        return names

    assert kept_names(read, "1", MODELS) == expected
    assert kept_names(read, "1", str(MODELS / "__init__.py")) == expected
    assert kept_names(read, "1", MODELS, "models") == {
        libraries: {f"models.{name}": of for name, of in modules.items()} for libraries, modules in expected.items()
    }
    assert num_reads == 1
    assert kept_names(read, "2", MODELS) == expected, "another version"
    assert num_reads == 2
    for text in ("", "[[", '{"a": 1}', "[1]"):
        for file in (tmp_path / "cache").glob("transformers-*.json"):
            file.write_text(text)
        num_reads = 0
        assert kept_names(read, "1", MODELS) == expected
        assert num_reads == 1, "a broken file is made again"
    assert kept_names(read, "1", MODELS / "auto", "x") == define_import_structure(MODELS / "auto", "x")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    names: Names = {frozenset({"torch"}): {"a.b": {"C"}}}
    assert kept_names(lambda path: names, "1", MODELS) == names
