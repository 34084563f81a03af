"""The files in deploy/ fit to the code: commands, configuration, ports, probes and times."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hbserve.cli.options import effective_config
from hbserve.cli.serve import make_parser
from hbserve.config import Config, from_dict
from hbserve.server.guard import OPEN
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """The resources of kubernetes.yaml, by kind and name."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


def pod_of(resource: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of a resource, and its only container."""
    pod = resource["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


@pytest.fixture
def config(manifest: dict[str, Any], tmp_path: Path) -> Config:
    """The configuration in the manifest, with a model and a key that are here."""
    document = yaml.safe_load(manifest["ConfigMap/hbserve"]["data"]["system.yaml"])
    (tmp_path / "key").touch()
    document["model"]["path"] = str(tmp_path)
    document["rpc"]["key_file"] = str(tmp_path / "key")
    (tmp_path / "system.yaml").write_text(yaml.safe_dump(document))
    return from_dict(document)


def test_each_pod_runs_a_part_of_the_system_with_its_ports(
    manifest: dict[str, Any], config: Config, tmp_path: Path
) -> None:
    started = {}
    for name in ("Deployment/hbserve-server", "StatefulSet/hbserve-prefill", "StatefulSet/hbserve-decode"):
        _, container = pod_of(manifest[name])
        command, *words = container["args"]
        assert command == "serve"
        words = [word.replace("/etc/hbserve", str(tmp_path)) for word in words]
        given = make_parser("hbserve serve").parse(words)
        assert effective_config(given).config == config
        started[given.instance_id] = {port["containerPort"] for port in container["ports"]}
    assert config.kv_transfer.port is not None
    expected = {
        instance.instance_id: {instance.port, config.kv_transfer.port + instance.kv_rank}  # type: ignore[operator]
        for instance in config.gpu_instances
    }
    assert started == {None: {config.server.port}} | expected
    for instance in config.gpu_instances:
        pod, service = instance.host.split(".")
        resource = manifest[f"StatefulSet/{pod.removesuffix('-0')}"]
        assert resource["spec"]["serviceName"] == service
        assert f"Service/{service}" in manifest
    labels = manifest["StatefulSet/hbserve-decode"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Service/hbserve-instances"]["spec"]["selector"].items() <= labels.items()


def test_probes_ask_for_open_paths_and_the_times_suffice(manifest: dict[str, Any], config: Config) -> None:
    pod, server = pod_of(manifest["Deployment/hbserve-server"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"]["path"] in OPEN
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > config.rpc.start_timeout_s
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > pause + config.server.drain_timeout_s
    for name in ("prefill", "decode"):
        pod, _ = pod_of(manifest[f"StatefulSet/hbserve-{name}"])
        assert pod["terminationGracePeriodSeconds"] > config.rpc.drain_timeout_s


def test_the_unit_is_valid(tmp_path: Path) -> None:
    unit = (DEPLOY / "hbserve.service").read_text()
    [start] = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    program, command, *words = start.split()
    assert (program, command) == ("/opt/hbserve/bin/hbserve", "serve")
    assert make_parser("hbserve serve").parse(words).config == "/etc/hbserve/system.yaml"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for path in ("opt/hbserve/bin/hbserve", "bin/kill"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("#!/bin/sh\n")
        (tmp_path / path).chmod(0o755)
    place = tmp_path / "etc/systemd/system/hbserve.service"
    place.parent.mkdir(parents=True)
    place.write_text(unit)
    verify = ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", str(place)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-analyze is too old for --root")
    complaints = re.findall(r"^.*hbserve\.service(?::\d+:|: Command).*$", done.stderr, re.MULTILINE)
    assert not complaints  # that the units of the operating system are not under the root is none


def test_the_image_has_what_the_wheel_is_made_of() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for word in line.split()}
    allowed = set(re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert set(re.findall(r"--target (\w+)", text)) <= set(re.findall(r" AS (\w+)$", text, re.MULTILINE))
