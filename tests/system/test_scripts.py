"""Start scripts as an operator uses them: real processes, YAML files, signals, exit codes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import yaml

from hbserve.tokenizer import Tokenizer
from tests.support import tiny_tokenizers
from tests.support.engines import greedy_reference
from tests.support.model_zoo import save_model
from tests.support.paths import ROOT
from tests.support.ports import free_ports

SCRIPTS = ROOT / "scripts"
DEADLINE_S = 90.0
NUM_TOKENS = 16
USER: list[Any] = [{"role": "user", "content": "hi"}]

T = TypeVar("T")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model with a tokenizer, and its folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizers.byte_level(folder)
    return folder, save_model(folder, "qwen3", vocab_size=352)


def poll(what: Callable[[], T | None], why_not: Callable[[], str]) -> T:
    """The first true value of ``what()``."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := what()):
        assert time.monotonic() < deadline, why_not()
        time.sleep(0.05)
    return found


class Program:
    """Running script, or subcommand of ``hbserve``; its output goes to files, so that the test need not read pipes."""

    def __init__(self, folder: Path, script: str, *arguments: str) -> None:
        program = [str(SCRIPTS / script)] if script.endswith(".py") else ["-m", "hbserve", script]
        name = f"{len(list(folder.iterdir()))}-{script}"
        self._output, self._errors = folder / f"{name}.out", folder / f"{name}.err"
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdout=output,
                stderr=errors,
                env=os.environ | {"TMPDIR": str(folder.parent)},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def url(self) -> str:
        """Wait until the script reports that it is ready; returns the URL of its HTTP server."""

        def announced() -> str | None:
            assert self.process.poll() is None, self.errors
            _, found, rest = self.output.partition("HBServe is ready: ")
            return rest.split()[0] if found and rest.endswith("\n") else None

        return poll(announced, lambda: f"not ready: {self.errors}")

    def wait(self) -> int:
        """Wait for the end of the script; returns its exit code."""
        return self.process.wait(DEADLINE_S)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal; the script and all processes under it must end without an error."""
        pids = [self.process.pid, *descendants(self.process.pid)]
        os.kill(self.process.pid, number)
        assert self.wait() == 0, self.errors
        assert "Traceback" not in self.errors
        assert not [pid for pid in pids if is_running(pid)]


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes under one, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # the process has just ended
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [pid]
    for ancestor in found:
        found += children.get(ancestor, [])
    return found[1:]


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Site:
    """Temporary directory for the scripts' files, with a folder for their inputs."""

    def __init__(self, folder: Path) -> None:
        self._temporary = folder
        self.files = folder / "files"
        self.files.mkdir()
        self._programs: list[Program] = []

    def write(self, document: Any) -> str:
        """Write a configuration; returns its path."""
        path = self.files / "system.yaml"
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
        return str(path)

    def start(self, script: str, *arguments: str) -> Program:
        program = Program(self.files, script, *arguments)
        self._programs.append(program)
        return program

    def fail(self, script: str, *arguments: str) -> str:
        """Start a script that must fail without a traceback; returns its standard error."""
        program = self.start(script, *arguments)
        assert program.wait() == 1
        assert "Traceback" not in program.errors
        assert program.output == ""
        return program.errors

    def leftovers(self) -> list[Path]:
        """Return the files that the scripts have left in their temporary directory."""
        return [path for path in self._temporary.iterdir() if path != self.files]

    def clean_up(self) -> None:
        for program in self._programs:
            if program.process.poll() is None:
                for pid in [program.process.pid, *descendants(program.process.pid)]:
                    os.kill(pid, signal.SIGKILL)
                program.process.wait()


@pytest.fixture
def site(short_path: Path) -> Iterator[Site]:
    place = Site(short_path)
    yield place
    place.clean_up()


def configuration(folder: Path, mode: str, ports: Sequence[int | None] | None = None) -> dict[str, Any]:
    """Make a small system on the CPU; with ports its parts can be started separately."""
    names = ["prefill-0", "decode-0"] if mode == "disaggregated" else ["unified-0"]
    instances: list[dict[str, Any]] = [
        {"instance_id": name, "instance_type": name.split("-")[0], "num_threads": 1} for name in names
    ]
    for instance, port in zip(instances, ports or (), strict=False):
        instance["port"] = port
    return {
        "mode": mode,
        "model": {"path": str(folder), "served_name": "tiny", "device": "cpu", "dtype": "float32"},
        "gpu_instances": instances,
        "performance": {"num_blocks": 64},
        "logging": {"level": "WARNING"},
    }


def ask_and_check(url: str, model: tuple[Path, Any]) -> None:
    """Check that a completion and a streamed chat give the tokens that transformers gives."""
    folder, reference = model
    tokenizer = Tokenizer(folder)

    def expected(prompt: list[int]) -> str:
        return tokenizer.decode(greedy_reference(reference, prompt, NUM_TOKENS))

    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": NUM_TOKENS}
    options["extra_body"] = {"ignore_eos": True}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=DEADLINE_S, max_retries=0) as api:
        answer = api.completions.create(prompt="the cat sat on", **options)
        assert answer.choices[0].text == expected(tokenizer.encode("the cat sat on"))
        chunks = api.chat.completions.create(messages=USER, stream=True, **options)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == expected(tokenizer.encode_chat(USER))


@contextmanager
def unanswered_request(url: str) -> Iterator[None]:
    """Send a completion request and disconnect without reading the answer."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "the dog sat on"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield


@pytest.mark.parametrize(
    ("mode", "number"), [("disaggregated", signal.SIGTERM), ("auto", signal.SIGINT)], ids=["disagg", "auto"]
)
def test_whole_system(site: Site, model: tuple[Path, Any], mode: str, number: signal.Signals) -> None:
    system = site.start("start_pd_disagg.py", "--config", site.write(configuration(model[0], mode)), "--port", "0")
    ask_and_check(system.url(), model)
    plan = httpx.get(f"{system.url()}/v1/plan", timeout=DEADLINE_S).json()
    by = ("unified", "auto") if mode == "auto" else (mode, "configuration")
    assert (plan["mode"], plan["chosen_by"]) == by
    assert all(name.startswith(role) for name, role in plan["instances"].items())
    assert len(descendants(system.process.pid)) == (5 if mode == "disaggregated" else 4)
    assert site.leftovers(), "the private sockets are not where this test looks for them"
    system.end(number)
    assert site.leftovers() == []


def test_the_loss_of_the_scheduler_ends_the_whole_with_an_exit_code(site: Site, model: tuple[Path, Any]) -> None:
    """A supervisor, such as systemd, can then start it again: answering 503 for ever would help no client."""
    config = site.write(configuration(model[0], "unified") | {"rpc": {"max_restarts": 1}})
    system = site.start("start_pd_disagg.py", "--config", config, "--port", "0")
    url = system.url()

    def schedulers() -> list[int]:
        titles = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(system.process.pid)}
        return [pid for pid, title in titles.items() if title.exists() and "hbserve-scheduler" in title.read_text()]

    [first] = schedulers()
    os.kill(first, signal.SIGTERM)  # not by the server, so the server goes on
    poll(lambda: first not in schedulers() and schedulers(), lambda: system.errors)
    ask_and_check(url, model)
    assert "scheduler_restarted: the scheduler: it ended with exit code 0" in system.errors
    pids = descendants(system.process.pid)
    [second] = schedulers()
    os.kill(second, signal.SIGKILL)
    assert system.wait() == 1
    assert "the server ends: the scheduler was killed by SIGKILL, too often to start it again" in system.errors
    assert not any(map(is_running, pids))
    assert site.leftovers() == []


def test_a_hangup_reads_keys_anew_and_the_loss_of_all_instances_is_an_exit_code(
    site: Site, model: tuple[Path, Any]
) -> None:
    """One system for both; it also raises its limit of file descriptors."""
    keys, cert, key = (site.files / name for name in ("keys", "cert.pem", "key.pem"))
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]

    def rotate(number: int) -> str:
        """Write a new key and a new certificate; returns the certificate."""
        keys.write_text(f"sk-number-{number}\n")
        keys.chmod(0o600)
        subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
        return cert.read_text()

    def served() -> tuple[str, list[int]]:
        """Return the certificate in use, and the statuses of requests with the first and the second key."""
        address = (url.host, url.port or 0)
        with httpx.Client(base_url=url, verify=False, timeout=DEADLINE_S) as http:
            keyed = [{"Authorization": f"Bearer sk-number-{number}"} for number in (1, 2)]
            statuses = [http.get("/v1/models", headers=headers).status_code for headers in keyed]
        return ssl.get_server_certificate(address), statuses

    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    first = rotate(1)
    document = configuration(model[0], "unified")
    files = {"api_keys_file": str(keys), "tls_cert_file": str(cert), "tls_key_file": str(key)}
    document["rpc"] = {"max_restarts": 0}
    config = site.write(document | {"server": files})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        system = site.start("serve", "--config", config, "--port", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    url = httpx.URL(system.url())
    assert resource.prlimit(system.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    assert served() == (first, [200, 401])
    second = rotate(2)
    site.write(document | {"server": files, "logging": {"level": "DEBUG"}})
    os.kill(system.process.pid, signal.SIGHUP)
    poll(lambda: "read keys, certificates and log level anew" in system.errors, lambda: system.errors)
    assert served() == (second, [401, 200])
    with httpx.Client(base_url=url, verify=False, timeout=DEADLINE_S) as http:
        headers = {"Authorization": "Bearer sk-number-2"}
        assert http.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 200
    poll(lambda: " D scheduler: request " in system.errors, lambda: system.errors)  # children follow the level
    cert.write_text("no certificate")
    keys.write_text("sk-number-1\n")
    os.kill(system.process.pid, signal.SIGHUP)
    poll(lambda: "reload_failed: the API server: SIGHUP changes nothing" in system.errors, lambda: system.errors)
    assert served() == (second, [401, 200])
    pids = descendants(system.process.pid)
    for pid in pids:  # as when a terminal closes
        os.kill(pid, signal.SIGHUP)
    assert served() == (second, [401, 200])
    [instance] = [pid for pid in pids if "hbserve-unified-0" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(instance, signal.SIGKILL)  # the only one, and it may not be started again
    assert system.wait() == 1
    assert "given_up: " in system.errors
    assert not any(map(is_running, pids))


def test_a_signal_during_the_start_ends_the_system(site: Site, model: tuple[Path, Any]) -> None:
    config = site.write(configuration(model[0], "disaggregated"))
    system = site.start("start_pd_disagg.py", "--config", config, "--port", "0", "--host", "0.0.0.0")
    poll(lambda: len(descendants(system.process.pid)) >= 2, lambda: system.errors)
    system.end()
    assert system.output == ""
    assert "other hosts can reach 0.0.0.0, and no API key is set (server.api_keys_file)" in system.errors
    assert site.leftovers() == []


def test_parts_in_any_order(site: Site, model: tuple[Path, Any]) -> None:
    """``hbserve top`` watches the server over its restart."""
    [port] = free_ports(1)
    document = configuration(model[0], "disaggregated", free_ports(2))
    document["kv_transfer"] = {"timeout_s": 10 * DEADLINE_S}
    config = site.write(document)
    scheduler = site.start("start_cpu_scheduler.py", "--config", config, "--port", str(port))
    poll(lambda: descendants(scheduler.process.pid), lambda: scheduler.errors)
    decode, prefill = (
        site.start("start_pd_disagg.py", "--config", config, "--instance-id", name)
        for name in ("decode-0", "prefill-0")
    )
    ask_and_check(scheduler.url(), model)
    decode.process.send_signal(signal.SIGHUP)  # which does not end it
    top = site.start("top", "--url", scheduler.url(), "--interval-s", "0.1")
    poll(lambda: "prefill-0 (prefill, ready)" in top.output, lambda: top.errors)
    scheduler.end(signal.SIGINT)
    poll(lambda: "waiting for it" in top.output, lambda: top.errors)
    # Now the instances are up before the scheduler.
    scheduler = site.start("start_cpu_scheduler.py", "--config", config, "--port", str(port))
    url = scheduler.url()
    ask_and_check(url, model)
    poll(lambda: "ready" in top.output.rpartition("waiting for it")[2], lambda: top.errors)
    top.end(signal.SIGINT)
    # The decode instance must not wait for the KV of a prefill instance that does not send it.
    os.kill(prefill.process.pid, signal.SIGSTOP)
    with unanswered_request(url):
        poll(lambda: httpx.get(f"{url}/stats").json()["kv_transfer"]["open_transfers"], lambda: scheduler.errors)
        decode.end()
    os.kill(prefill.process.pid, signal.SIGCONT)
    prefill.end()
    scheduler.end()
    assert site.leftovers() == []


def test_a_scheduler_alone_names_the_missing_instances(site: Site, model: tuple[Path, Any]) -> None:
    ports = free_ports(2)
    document = configuration(model[0], "disaggregated", ports)
    document["rpc"] = {"start_timeout_s": 4.0}
    errors = site.fail("start_cpu_scheduler.py", "--config", site.write(document))
    for name, port in zip(("prefill-0", "decode-0"), ports, strict=True):
        assert f"{name} at tcp://127.0.0.1:{port}" in errors
    assert site.leftovers() == []


def test_errors_of_a_configuration_name_the_line(site: Site, model: tuple[Path, Any]) -> None:
    text = f"model:\n  path: {model[0]}\nperformance:\n  num_block: 64\n"
    path = site.write(text)
    errors = site.fail("start_pd_disagg.py", "--config", path)
    assert errors == f"error: {path}:4: performance.num_block: unknown key; did you mean 'num_blocks'?\n"
    assert site.fail("start_cpu_scheduler.py", "--config", path) == errors
    path = site.write(configuration(model[0], "disaggregated", free_ports(2)))
    errors = site.fail("start_pd_disagg.py", "--config", path, "--instance-id", "prefil-0")
    assert "no instance 'prefil-0'; did you mean 'prefill-0'?" in errors
    errors = site.fail("start_pd_disagg.py", "--config", str(site.files / "missing.yaml"))
    assert "missing.yaml" in errors
    path = site.write(configuration(model[0], "disaggregated"))
    errors = site.fail("start_pd_disagg.py", "--config", path, "--instance-id", "prefill-0")
    assert "gpu_instances: prefill-0: port" in errors
    errors = site.fail("start_pd_disagg.py", "--config", path, "--port", "70000")
    assert errors == "error: --port must be in 0..65535, got 70000\n"


def test_a_port_in_use_is_named(site: Site, model: tuple[Path, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = site.write(configuration(model[0], "disaggregated", [port, *free_ports(1)]))
        errors = site.fail("start_pd_disagg.py", "--config", config, "--instance-id", "prefill-0")
        assert f"127.0.0.1:{port}: Address already in use" in errors
        errors = site.fail("start_cpu_scheduler.py", "--config", config, "--port", str(port))
        assert f"address 127.0.0.1:{port} is already taken by server.port" in errors
        config = site.write(configuration(model[0], "disaggregated", free_ports(2)))
        errors = site.fail("start_cpu_scheduler.py", "--config", config, "--port", str(port))
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in errors
    assert site.leftovers() == []
