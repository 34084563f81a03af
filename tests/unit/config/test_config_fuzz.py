"""Any file is a valid configuration or an error that names the file. `benchmarks.chaos` has generated ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos.yaml_generator import sections_of
from hbserve.config import Config, from_dict, load
from hbserve.config.sections import Config as Sections
from hbserve.errors import ConfigError


def is_clean(path: Path, text: str | bytes) -> bool:
    """Load a file; whether it is valid. Anything but a short `ConfigError` that names the file fails the test."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        return isinstance(load(path), Config)
    except ConfigError as error:
        what = str(error)
    except Exception as error:
        raise AssertionError(f"{error!r} for {text[:2000]!r}") from error
    assert str(path) in what, text
    assert len(what) < 4000, text
    return False


def test_the_generator_knows_every_section() -> None:
    assert set(sections_of()) >= {name for name in Sections.__struct_fields__ if name not in ("mode", "launcher")}


LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(40))
MERGES = "\n".join(f"m{i}: &m{i} {{{f'<<: [*m{i - 1}, *m{i - 1}]' if i else 'model: 1'}}}" for i in range(40))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        MERGES,
        "model: &m {path: *m}",
        "model: &m\n  <<: *m\n  path: model",
        "a: &a [*b]\nb: &b [*a]",
        "gpu_instances: &g [*g]",
        "model: {path: model}\nperformance: {num_blocks: !!int abc}",
        "model: {path: model}\nperformance: {memory_fraction: !!float abc}",
        "model: {path: model}\nkv_transfer: {verify: !!bool perhaps}",
        "model: {path: !!timestamp now}",
        "model: {path: 2001-99-99}",
        "model: {path: 2001-01-01}",
        "model: {path: !!null x, seed: !!binary '*'}",
        "model: {path: model, seed: !!set {1, 2}}",
        "model: {path: model, seed: !!omap [a, b]}",
        "model: {path: model, seed: !!python/object/apply:os.getcwd []}",
        "!!int model: {path: model}",
        "model: {path: model, seed: %s}" % (5000 * "9"),
        "model: {path: model, seed: 0x%s}" % (5000 * "f"),
        "model: {path: model, seed: -0b%s}" % (50000 * "1"),
        "model: {path: model}\nrpc: {step_timeout_s: %s}" % (400 * "9"),
        "model: {path: model, seed: 1e400}",
        "0x%s: 1" % (5000 * "f"),
        "[a, b]: 1",
        "{a: b}: 1",
        "? [model]\n: 1",
        "null: 1",
        ".nan: 1",
        "1: 1",
        "model: {path: ''}",
        "model: {path: ~}",
        "model: {path: '~nobody-has-this-name/x'}",
        "model: {path: model}\nrpc: {key_file: '~nobody-has-this-name/x'}",
        'model: {path: "a\\0b"}',
        'model: {path: "\\ud83d"}',
        "model: {path: %s}" % (100_000 * "x"),
        "%s: 1" % (100_000 * "x"),
        "model: {path: model}\nmode: %s" % (100_000 * "x"),
        "model: {path: model}\ngpu_instances: [{instance_id: %s, instance_type: unified}]" % (100_000 * "x"),
        "model: {path: model}\nkv_transfer: {backend: %s}" % (100_000 * "x"),
        "model: {path: model}\nkv_transfer: {backend: a.b:C%s, mooncake_protocol: tcp}" % (100_000 * "x"),
        "model: {path: model}\nrpc: {host: %s, port: 5}" % (100_000 * "x"),
        "model: {path: model}\nrpc: {host: %s, port: 5}\nserver: {host: %s, port: 5}" % (2 * (100_000 * "x",)),
        100_000 * "[",
        100_000 * "{a: ",
        2000 * "- ",
        "a:\n" * 3 + "\t- b",
        "%YAML 9.9\n---\nmodel: 1",
        "model: {path: model}\n---\nmodel: {path: model}",
        "",
        "# nothing\n",
        "null",
        "just text",
        "x: " + 2_000_000 * "y",
        b"\xff\xfe\x00",
        b"\x80abc",
        b"model: {path: model}\x00",
        b"\x1b[2J: 1",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "model").mkdir()
    assert not is_clean(tmp_path / "system.yaml", text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_other_editors_and_shared_parts_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "model").mkdir()
    shared = "gpu_instances:\n  - &one {instance_id: a, instance_type: prefill}\n  - {<<: *one, instance_id: b}\n"
    text = "model: {path: model}\n" + shared + "  - {<<: *one, instance_id: c, instance_type: decode}\n"
    assert is_clean(tmp_path / "system.yaml", text.encode(encoding))


@pytest.mark.parametrize("path", ["a\0b.yaml", "~nobody-has-this-name/x.yaml", ".", "/dev/zero", "missing.yaml"])
def test_a_path_that_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        load(path)


def test_plain_data_that_share_or_hold_themselves_are_refused() -> None:
    laughs: list[object] = ["x"]
    for _ in range(60):
        laughs = [laughs, laughs]
    loop: list[object] = []
    loop.append(loop)
    for value in (laughs, loop, 1 << 100_000, 10**5000, object(), {1: 2}, float("nan"), b"x"):
        for document in ({"model": value}, {"model": {"path": value}}, {"gpu_instances": value, "model": {}}):
            with pytest.raises(ConfigError) as caught:
                from_dict(document)
            assert len(str(caught.value)) < 4000
