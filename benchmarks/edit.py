"""``python -m benchmarks edit``: what drafts from text bring where a real model repeats a text with a change.

One stream. Each task is done without drafts and with those of ``--method``, in turns within one engine, because a
host's speed changes between two. Every turn has a `cache_salt` of its own, so no run finds the output of another one.

    tokens/s  output tokens by the time from the first one to the last
    steps     steps of the device, those of the prompt included
    equal     whether the tokens are those without drafts
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from hbserve import LLM, SamplingParams
from hbserve.bench.arguments import check_new_file, positive
from hbserve.system.prompt_batch import as_batch, generate_all

_TEXT = (
    "The harbour of Lindholm lies in the north of the island. Every morning at six the ferry leaves for the mainland "
    "with fish, mail and a few passengers. In winter the crossing takes two hours, in summer one hour and ten minutes. "
    "The captain, Maria Olsen, has sailed this route for thirty years. She knows each rock by name, and she says that "
    "the sea has never frightened her. Tourists come in July and August to see the lighthouse and to eat smoked "
    "herring at the pier. When the last ferry has left, the village is quiet again, and only the gulls are heard above "
    "the roofs."
)
_TASKS = (
    "Repeat the following text word for word, but replace the name Maria Olsen by Peter Berg.",
    "Copy this text exactly. Change only the name of the harbour: write Sandvik for Lindholm.",
    "Write the following text again without any change except that the ferry leaves at seven.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", default="smollm2", help="folder or name of a chat model")
    parser.add_argument("--method", default="suffix", help="speculation method")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--output-tokens", type=positive, default=140, help="about as many as the text has")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print each line as soon as it is known, and return all."""
    check_new_file("--json", arguments.json)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        forced = Path(folder) / "forced.json"
        os.environ["HBSERVE_FORCED_DRAFTS"] = str(forced)
        sys.path.insert(0, str(Path(__file__).parent / "forced_drafts"))  # child processes get it as their PYTHONPATH
        forced.write_text(json.dumps({"drafters": []}))
        engine = {"device": arguments.device, "dtype": arguments.dtype, "max_model_len": 2048}
        with LLM(arguments.model, mode="unified", num_blocks=400, speculation_method=arguments.method, **engine) as llm:
            print(" task  tokens/s without, with   gain  steps without, with  equal", flush=True)
            _generate(llm, _TASKS[0], 8, "warm up")
            for turn in range(arguments.repeats):
                for task, text in enumerate(_TASKS):
                    found = []
                    for drafts in (False, True):
                        forced.write_text(json.dumps({"drafters": None if drafts else []}))
                        found.append(_generate(llm, text, arguments.output_tokens, f"{turn} {task} {drafts}"))
                    lines.append(_line(task, *found))
            device = next(iter(llm.get_system_stats()["gpu_instances"].values()))["device"]
    median = statistics.median(line["gain"] for line in lines)
    print(f"median gain {median:.2f}, steps {statistics.median(line['fewer_steps'] for line in lines):.2f} times fewer")
    result = {"model": Path(arguments.model).name, "method": arguments.method, "device": device, "lines": lines}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _generate(llm: LLM, task: str, num_tokens: int, salt: str) -> dict[str, Any]:
    """Do a task; returns its tokens and what was measured."""
    prompt = list(llm._llm.engine.tokenizer.encode_chat([{"role": "user", "content": f"{task}\n\n{_TEXT}"}]))
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, cache_salt=salt)
    before = _counts(llm)
    [output] = llm._run(generate_all(llm._llm.engine, as_batch([prompt]), [sampling], 1))
    used = {name: value - before[name] for name, value in _counts(llm).items()}
    return {"token_ids": output["token_ids"], "tokens_per_s": 1 / used["tpot_s"], "steps": used["steps"]}


def _counts(llm: LLM) -> dict[str, float]:
    stats = llm.get_system_stats()
    steps = sum(one["steps"] for one in stats["gpu_instances"].values())
    return {"steps": steps, "tpot_s": stats["metrics"]["histograms"]["time_per_output_token_seconds"]["sum"]}


def _line(task: int, plain: dict[str, Any], drafting: dict[str, Any]) -> dict[str, Any]:
    """Print a task with and without drafts, and return what was measured."""
    gain, fewer = drafting["tokens_per_s"] / plain["tokens_per_s"], plain["steps"] / drafting["steps"]
    equal = plain["token_ids"] == drafting["token_ids"]
    print(
        f"{task:5} {plain['tokens_per_s']:18.1f} {drafting['tokens_per_s']:7.1f} {gain:6.2f} "
        f"{plain['steps']:14} {drafting['steps']:6}  {equal}",
        flush=True,
    )
    numbers = {"tokens_per_s": [one["tokens_per_s"] for one in (plain, drafting)]}
    return {"task": task, "gain": gain, "fewer_steps": fewer, "equal": equal} | numbers
