"""A process that loads model folders one after the other, each as the processes of a system do.

A line on standard input names a folder; a line on standard output tells what became of it:

    {"folder": PATH, "whole": false}  ->  {"outcomes": {STEP: "ok" or the refusal}, "memory_mb": LARGEST SO FAR}

With ``whole`` a system is started with `hbserve.LLM`, and asked. An error that is no refusal ends this process.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos import processes
from hbserve import LLM, SamplingParams
from hbserve.config import from_dict
from hbserve.engine.model_runner import ModelRunner
from hbserve.errors import HBServeError
from hbserve.model_files import read_sampling_defaults
from hbserve.platform import make_platform
from hbserve.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support.plan_driver import Driver

_SPARE_MEMORY_BYTES = 4 << 30
"""What a folder may make the process allocate, mapped files included."""
_SMALL: dict[str, Any] = {"num_blocks": 16, "max_num_seqs": 2}


def compute(folder: Path) -> None:
    """Do what a worker does with a folder, up to four tokens."""
    config = from_dict({"model": {"path": str(folder), "device": "cpu"}, "performance": _SMALL})
    platform = make_platform("cpu", gpu_id=0, num_threads=1, num_instances=1)
    platform.activate()
    with torch.inference_mode():
        runner = ModelRunner(config, config.gpu_instances[0], platform)
        driver = Driver(runner)
        prompt, num_new = [1, 2, 3, 4, 5], 4
        if runner.max_model_len >= len(prompt) + num_new:
            [tokens] = driver.run(driver.add(prompt, num_new))
            assert all(0 <= token < runner.spec.vocab_size for token in tokens), tokens


def use_text(folder: Path) -> None:
    """Do what a text process does with a folder."""
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("the cat") if tokenizer.has_text else [1]
    tokenizer.decode(ids)
    detokenizer = IncrementalDetokenizer(tokenizer)
    for token_id in ids:
        detokenizer.push(token_id)
    detokenizer.finish()
    if tokenizer.has_chat_template:
        tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    read_sampling_defaults(folder)


def serve(folder: Path) -> None:
    """Start a system, and ask it for four tokens."""
    with LLM(str(folder), mode="unified", device="cpu", log_level="ERROR", **_SMALL) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)


def outcome(step: Any, folder: Path) -> str:
    """Run a step; return ``ok``, or the text of its refusal."""
    try:
        step(folder)
        return "ok"
    except HBServeError as error:
        return str(error)


def main() -> None:
    """Load folders until standard input ends."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _SPARE_MEMORY_BYTES,) * 2)
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        steps = [serve] if order["whole"] else [compute, use_text]
        outcomes = {step.__name__: outcome(step, Path(order["folder"])) for step in steps}
        left = [process.title for process in processes.descendants() if process.kind != "helper"]
        memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"outcomes": outcomes, "memory_mb": memory_mb, "left": left}), flush=True)


if __name__ == "__main__":
    main()
