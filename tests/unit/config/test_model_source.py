"""The name of a model is found, or an error that says where was looked."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbserve import PdDisaggConfig
from hbserve.errors import ConfigError
from hbserve.model_source import resolve_model


def test_a_folder_is_found_from_here_or_beside_and_links_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "beside" / "there").mkdir(parents=True)
    (tmp_path / "link").symlink_to("here")
    here = str(tmp_path / "here")
    assert resolve_model("here") == resolve_model("link") == resolve_model(here) == here
    assert resolve_model("there", [tmp_path / "beside"]) == str(tmp_path / "beside" / "there")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "give the path"),
        ("nowhere", "there is no folder 'nowhere' (looked at "),
        ("no/such.gguf", "there is no file 'no/such.gguf' (looked at "),
        ("~no-such-user/model", "home"),
        ("org/two--dashes", "and no repository of the Hugging Face hub can have that name"),
        ("org/a name", "and no repository"),
        ("org/name.git", "and no repository"),
        ("org/name@", "and no repository"),
        (f"org/{'n' * 93}", "and no repository"),
        ("a\0b", "there is no folder 'a\\x00b'"),
    ],
)
def test_a_name_without_a_folder_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name)
    assert message in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        PdDisaggConfig(name).freeze()
    assert message in str(caught.value)
    assert str(caught.value).startswith("model_path: ")
