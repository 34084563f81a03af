"""Files of requests that cannot be sent are refused by file and line, before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbserve.cli.main import main

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("5", "a custom_id, a string"),
        (GOOD | {"custom_id": 5}, "a custom_id, a string"),
        (GOOD, "custom_id 'a' is there twice"),
        (json.dumps(GOOD | {"custom_id": "\ud800"}), "custom_id must not hold a lone surrogate"),
        (GOOD | {"custom_id": "b", "method": "GET"}, "method must be POST, got 'GET'"),
        (GOOD | {"custom_id": "b", "url": "/v1/embeddings"}, "url must be one of /v1/chat/completions"),
        (GOOD | {"custom_id": "b", "body": []}, "body must be an object"),
        (GOOD | {"custom_id": "b", "body": {"stream": True}}, "body.stream must be false"),
    ],
)
def test_a_wrong_line_is_named(
    line: str | dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "requests.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    file.write_text(f"{json.dumps(GOOD)}\n\n{text}\n")
    assert main(["batch", str(file), "--url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}:3: ")
    assert message in error
    assert list(tmp_path.iterdir()) == [file]


def test_wrong_files_and_addresses_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    output.write_text('{"something": "else"}\n')
    for arguments, message in (
        ([str(tmp_path / "none.jsonl")], "No such file"),
        ([str(file), "--url", "ftp://host"], "--url must be an address"),
        ([str(file), "--url", "http://host:80x"], "--url must be an address"),
        ([str(file), "--url", "http://host:99999"], "--url must be an address"),
        ([str(file), "--output", str(file)], "must be three files"),
        ([str(file), "--output", str(output)], f"{output}:1: no output of a batch"),
    ):
        assert main(["batch", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error_of_each_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    assert main(["batch", str(file), "--url", "http://127.0.0.1:9", "--timeout-s", "0.5"]) == 1
    [line] = (tmp_path / "requests.errors.jsonl").read_text().splitlines()
    assert json.loads(line)["error"]["code"] == "no_answer"
    assert "1 requests have no answer" in capsys.readouterr().err


def test_a_full_disk_is_one_line_of_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text("\ufeff" + json.dumps(GOOD) + "\n")  # some editors begin a file so
    arguments = ["batch", str(file), "--url", "http://127.0.0.1:9", "--timeout-s", "0.5", "--errors", "/dev/full"]
    assert main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: [Errno 28] No space left on device")
