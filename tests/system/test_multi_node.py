"""System on three hosts, which are network namespaces with own addresses; one wire is slow and loses frames."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from hbserve.config import load
from hbserve.errors import ConfigError
from hbserve.rpc.cluster_key import ClusterKey
from tests.support.engines import needs_mooncake
from tests.support.lossy_wire import LossyWire
from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "run_multi_node.sh"
NETWORK = "10.213.7"
DEADLINE_S = 150.0

YAML = """
mode: disaggregated
model: {{path: {model}, device: cpu, dtype: float32}}
kv_transfer: {{backend: {backend}, verify: true, timeout_s: 20}}
rpc: {{host: "{hosts[0]}", port: 7100, key_file: cluster.key}}
server: {{port: 8123}}
logging: {{level: WARNING}}
performance: {{num_blocks: 256}}
chunked_prefill: {{chunk_size: 64}}
gpu_instances:
  - {{instance_id: prefill-0, instance_type: prefill, host: {hosts[1]}, port: 7001, num_threads: 1}}
  - {{instance_id: decode-0, instance_type: decode, host: {hosts[2]}, port: 7001, num_threads: 1}}
"""
ASK = """
import json, sys, time, urllib.request
deadline = time.monotonic() + 120
while True:
    try:
        urllib.request.urlopen("http://127.0.0.1:8123/health", timeout=5)
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.1)
def stats():
    return json.load(urllib.request.urlopen("http://127.0.0.1:8123/stats", timeout=10))
while not stats()["kv_transfer"]["links"].get("prefill-1->decode-0", {}).get("open"):
    assert time.monotonic() < deadline, stats()
    time.sleep(0.1)
answers = []
for pairs, word in (("dog parrot, eagle maple, chalk oasis, flute ring", "eagle"),
                    ("dog parrot, eagle maple, chalk oasis, flute ring", "chalk")):
    question = f"Remember: {pairs}. What is {word}?"
    body = {"model": "m", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    body["model"] = json.load(urllib.request.urlopen("http://127.0.0.1:8123/v1/models"))["data"][0]["id"]
    request = urllib.request.Request("http://127.0.0.1:8123/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    answers.append(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
print(json.dumps({"answers": answers, "links": stats()["kv_transfer"]["links"]}))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


@dataclass
class Hosts:
    """Three namespaces on one bridge; a `LossyWire` leads to the second."""

    names: list[str]
    addresses: list[str]
    wire: LossyWire


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = str(os.getpid() % 100000)
    bridge, names = f"hbb{tag}", [f"hbserve{tag}-{index}" for index in range(3)]
    addresses = [f"{NETWORK}.{index + 1}" for index in range(3)]
    try:  # not netem, which many kernels of containers and small machines lack
        wire = LossyWire(f"hbl{tag}", delay_s=2e-3, loss=0.02)
    except OSError as error:
        pytest.skip(f"no TAP devices can be made here: {error}")
    try:
        made = run("ip", "link", "add", bridge, "type", "bridge")
        if made.returncode:
            pytest.skip(f"no bridge can be made here: {made.stderr.strip()}")
        run("ip", "link", "set", bridge, "up")
        for index, name in enumerate(names):
            made = run("ip", "netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
            ours, theirs = wire.devices if index == 1 else (f"hbv{index}{tag}", f"hbw{index}{tag}")
            veth = f"ip link add {ours} type veth peer name {theirs} netns {name}"
            for command in (
                f"ip link set {theirs} netns {name}" if index == 1 else veth,
                f"ip link set {ours} master {bridge} up",
                f"ip -n {name} addr add {addresses[index]}/24 dev {theirs}",
                f"ip -n {name} link set {theirs} up",
                f"ip -n {name} link set lo up",
            ):
                done = run(*command.split())
                assert done.returncode == 0, f"{command}: {done.stderr}"
        yield Hosts(names, addresses, wire)
    finally:
        wire.close()
        for name in names:
            run("ip", "netns", "del", name)
        run("ip", "link", "del", bridge)


def system(folder: Path, hosts: list[str], backend: str) -> Path:
    """Write the YAML file of a system, and its key."""
    ClusterKey.generate().save(folder / "cluster.key")
    path = folder / "system.yaml"
    path.write_text(YAML.format(model=ROOT / "examples" / "models" / "hbserve-demo", hosts=hosts, backend=backend))
    return path


@needs_mooncake
def test_three_hosts_from_one_file(tmp_path: Path, hosts: Hosts) -> None:
    config = system(tmp_path, hosts.addresses, "mooncake")
    remote_shell = tmp_path / "remote-shell"
    cases = " ".join(f"{a}) n={n};;" for a, n in zip(hosts.addresses, hosts.names, strict=True))
    remote_shell.write_text(f'#!/bin/sh\ncase "$1" in {cases} *) exit 1;; esac\nexec ip netns exec $n bash -c "$2"\n')
    remote_shell.chmod(0o755)
    inside = ["ip", "netns", "exec", hosts.names[0]]
    environment = os.environ | {"PYTHON": sys.executable}
    service = subprocess.Popen(
        [*inside, str(SCRIPT), "--config", str(config), "--ssh", str(remote_shell)], env=environment
    )
    scheduler, key = f"tcp://{hosts.addresses[0]}:7100", str(tmp_path / "cluster.key")
    join = [sys.executable, "-m", "hbserve.join", scheduler, "--role", "prefill", "--instance-id", "prefill-1"]
    join += ["--patience-s", str(DEADLINE_S)]
    joiner = subprocess.Popen(
        ["ip", "netns", "exec", hosts.names[2], *join, "--num-threads", "1", "--key-file", key], env=environment
    )
    try:
        asked = subprocess.run([*inside, sys.executable, "-c", ASK], capture_output=True, text=True, timeout=DEADLINE_S)
        assert asked.returncode == 0, asked.stderr
        found = json.loads(asked.stdout)
        assert "maple" in found["answers"][0]
        assert "oasis" in found["answers"][1]
        link = found["links"]["prefill-0->decode-0"]
        assert link["bytes"] > 0
        assert not link["failures"]
        assert hosts.wire.num_dropped > 0
        joiner.send_signal(signal.SIGTERM)
        assert joiner.wait(30) == 0
    finally:
        joiner.kill()
        joiner.wait()
        service.send_signal(signal.SIGTERM)
        service.wait(30)
    deadline = time.monotonic() + 20
    while any(run("ip", "netns", "pids", name).stdout.strip() for name in hosts.names):
        assert time.monotonic() < deadline, "a process is left on a host"
        time.sleep(0.05)


def test_the_plan_can_be_printed_and_names_each_hosts_command(tmp_path: Path) -> None:
    config = system(tmp_path, ["127.0.0.1", "192.0.2.1", "127.0.0.1"], "nccl")
    environment = os.environ | {"PYTHON": sys.executable}
    printed = subprocess.run(
        [str(SCRIPT), "--config", str(config), "--print"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert lines[0].startswith("192.0.2.1: ")
    assert "--instance-id prefill-0" in lines[0]
    assert lines[1].startswith("127.0.0.1: ")
    assert lines[2].startswith("here: ")
    assert "start_cpu_scheduler.py" in lines[2]


@pytest.mark.parametrize("where", ["host: 192.0.2.1", "host: localhost, bind: 0.0.0.0"])
def test_nothing_listens_beyond_this_host_without_a_key(tmp_path: Path, where: str) -> None:
    text = (
        f"mode: unified\nmodel: {{path: {ROOT / 'examples' / 'models' / 'hbserve-demo'}}}\ngpu_instances:\n"
        f"  - {{instance_id: a, instance_type: unified, {where}, port: 7001}}\n"
    )
    path = tmp_path / "system.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"system.yaml:4: .*can be reached from other hosts.*cluster_key"):
        load(path)
    ClusterKey.generate().save(tmp_path / "key")
    path.write_text(text + "rpc: {key_file: key}\n")
    assert load(path).rpc.key_file == str(tmp_path / "key")


def test_a_key_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for code, said in ((0, "copy it to every host"), (1, "exists")):
        made = run(sys.executable, "-m", "hbserve.rpc.cluster_key", str(path))
        assert (made.returncode, said in made.stdout + made.stderr) == (code, True)
    key = ClusterKey.load(path)
    assert key.secret.decode() not in repr(key)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="other users may read"):
        ClusterKey.load(path)
    path.chmod(0o600)
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match="is no key"):
        ClusterKey.load(path)


def test_a_listener_accepts_only_holders_of_the_key() -> None:
    key, other = ClusterKey.generate(), ClusterKey.generate()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as listener:
        doorkeeper = key.for_binding(listener, "tcp:")
        assert doorkeeper is not None
        port = listener.bind_to_random_port("tcp://127.0.0.1")
        for client_key, server_key, heard in (
            (None, None, 0),
            (other, None, 0),
            (other, key.public, 0),
            (key, None, 1),
        ):
            with zmq.Context() as elsewhere, elsewhere.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                if client_key is not None:
                    client_key.for_connecting(socket, "tcp:")
                if server_key is not None:
                    socket.curve_serverkey = server_key
                socket.connect(f"tcp://127.0.0.1:{port}")
                socket.send(b"an order")
                assert bool(listener.poll(5000 if heard else 300)) == bool(heard)
        doorkeeper.close()
