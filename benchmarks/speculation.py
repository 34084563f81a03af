"""``python -m benchmarks speculation``: what drafts bring at a forced acceptance, by batch size.

Each request is generated once without drafts. Then it comes again with its own output as `SamplingParams.prediction`,
in which every token is wrong with a given probability. So the engine drafts, verifies and accepts as always; only how
often it is right is forced. Requests sample at temperature 100: the noise decides nearly every token, and it depends
on seed and position alone. So a last bit of the logits changes at most one token, and the next guesses are right again.

With ``--draft-model`` a second system drafts with that model, or with a random EAGLE-3 head of the model's own sizes.
It computes every guess, and `benchmarks.forced_drafts` replaces the guess by one that is right with that probability.

With ``--method`` the engine has that method. It is measured, too, on outputs that repeat nothing (``own``): its
drafters then find hardly any guess, and what is left is their cost. `benchmarks.forced_drafts` turns them off for all
other runs.

    rate     output tokens per second, of all requests together, from the first request to the last token
    tpot     mean of the requests' times per output token; unlike the rate it does not depend on the last request alone
    step     time of the device for a step, and tokens of a sequence in one step; both without the steps of prompts
    equal    share of tokens that are the same as without drafts

A host may be 20 % slower for seconds. So ``--repeats`` measures without and with drafts in turns, and the summary gives
the median of the gains within each turn. A batch that ends together gets smaller at its end, by more with drafts than
without. With ``--waves`` a request comes as soon as another one ends, so the batch stays full.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from hbserve import LLM, SamplingParams
from hbserve.bench.arguments import add_engine_arguments, check_new_file, engine_arguments, find_model, positive
from hbserve.model_files import read_config
from hbserve.system.prompt_batch import as_batch, generate_all

_TEMPERATURE = 100.0
_Plain = tuple[list[list[int]], list[SamplingParams], list[list[int]], dict[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; see `run`."""
    parser.add_argument("--model", default="qwen3-8b", help="folder or shape of a model")
    parser.add_argument("--draft-model", help="folder or shape of a draft model; or eagle3, for a head")
    parser.add_argument("--method", help="measure this speculation method, too, where nothing repeats")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 32, 256], help="requests at a time")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.89, 0.7, 0.0], help="right guesses, 0 to 1")
    parser.add_argument("--prompt-tokens", type=positive, default=128)
    parser.add_argument("--output-tokens", type=positive, default=256)
    parser.add_argument("--waves", type=positive, default=1, help="requests for each place of a batch, one by one")
    parser.add_argument("--repeats", type=positive, default=1, help="turns of a measurement without drafts, and with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print each line as soon as it is known, and return all."""
    check_new_file("--json", arguments.json)
    model = find_model(arguments.model)
    engine = engine_arguments(arguments, model)
    lines: list[dict[str, Any]] = []
    plain: dict[int, _Plain] = {}
    with tempfile.TemporaryDirectory() as folder:
        forced = Path(folder) / "forced.json"
        os.environ["HBSERVE_FORCED_DRAFTS"] = str(forced)
        sys.path.insert(0, str(Path(__file__).parent / "forced_drafts"))  # child processes get it as their PYTHONPATH
        device = _run_text(arguments, str(model), engine, forced, plain, lines)
        if arguments.draft_model is not None:
            print(f"with the draft model {arguments.draft_model}", flush=True)
            _run_draft_model(arguments, str(model), engine, forced, plain, lines)
    if arguments.repeats > 1:
        _print_summary(lines)
    result = {"model": model.name, "device": device, "engine": engine, "waves": arguments.waves, "lines": lines}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _run_text(
    arguments: argparse.Namespace,
    model: str,
    engine: dict[str, Any],
    forced: Path,
    plain: dict[int, _Plain],
    lines: list[dict[str, Any]],
) -> str:
    """Measure drafts from text; returns the device's name.

    Args:
        forced: the file for `benchmarks.forced_drafts`.
        plain: by batch, prompts, sampling, outputs, and what was measured without drafts: filled here.
    """
    forced.write_text(json.dumps({"drafters": ["prediction"]}))
    method = {} if arguments.method is None else {"speculation_method": arguments.method}
    _print_heads()
    with LLM(model, **engine, **method) as llm:
        rng = random.Random(arguments.seed)
        _warm_up(llm)
        for batch in arguments.batch:
            prompts, sampling = _requests(rng, llm, batch * arguments.waves, arguments)
            vocab_size = llm._llm.engine.vocab_size
            for _ in range(arguments.repeats):
                expected, base = _generate(llm, prompts, sampling, batch)
                plain[batch] = prompts, sampling, expected, base
                _show(lines, {"batch": batch, "acceptance": None} | base, base, 1.0)
                for acceptance in arguments.acceptance:
                    predicted = [
                        msgspec.structs.replace(one, prediction=_guesses(rng, output, acceptance, vocab_size))
                        for one, output in zip(sampling, expected, strict=True)
                    ]
                    outputs, found = _generate(llm, prompts, predicted, batch)
                    _show(lines, {"batch": batch, "acceptance": acceptance} | found, base, _equal(outputs, expected))
                if arguments.method is not None:
                    forced.write_text(json.dumps({"drafters": None}))
                    others = [msgspec.structs.replace(one, seed=rng.getrandbits(32)) for one in sampling]
                    _, found = _generate(llm, prompts, others, batch)
                    _show(lines, {"batch": batch, "acceptance": "own"} | found, base, 1.0)
                    forced.write_text(json.dumps({"drafters": ["prediction"]}))
        return str(next(iter(llm.get_system_stats()["gpu_instances"].values()))["device"])


def _run_draft_model(
    arguments: argparse.Namespace,
    model: str,
    engine: dict[str, Any],
    forced: Path,
    plain: dict[int, _Plain],
    lines: list[dict[str, Any]],
) -> None:
    """Measure a system with a draft model that is right as often as wanted, in turns with runs without it.

    Args:
        forced: the file for `benchmarks.forced_drafts`.
        plain: by batch, prompts, sampling, outputs, and what was measured without drafts.
    """
    forced.write_text(json.dumps({"acceptance": 0.0, "prompt_tokens": 0, "outputs": {}}))
    is_head = arguments.draft_model == "eagle3"
    draft_model = str(_head_of(model, forced.parent) if is_head else find_model(arguments.draft_model))
    engine = engine | {"speculation_method": "eagle3" if is_head else "draft_model"}
    with LLM(model, **engine, speculation_model=draft_model) as llm:
        _warm_up(llm)
        for batch, (prompts, sampling, expected, _) in plain.items():
            outputs = {one.seed: output for one, output in zip(sampling, expected, strict=True)}
            known = {"prompt_tokens": arguments.prompt_tokens, "outputs": outputs}
            forced.write_text(json.dumps(known | {"acceptance": 1.0}))
            short = [msgspec.structs.replace(one, max_tokens=32) for one in sampling]
            _generate(llm, prompts, short, batch)  # both models have then read the prompts
            for _ in range(arguments.repeats):
                forced.write_text(json.dumps(known | {"drafters": []}))
                found_outputs, base = _generate(llm, prompts, sampling, batch)
                line = {"batch": batch, "acceptance": None, "draft_model": arguments.draft_model} | base
                _show(lines, line, base, _equal(found_outputs, expected))
                for acceptance in arguments.acceptance:
                    forced.write_text(json.dumps(known | {"acceptance": acceptance, "drafters": None}))
                    found_outputs, found = _generate(llm, prompts, sampling, batch)
                    line = {"batch": batch, "acceptance": acceptance, "draft_model": arguments.draft_model} | found
                    _show(lines, line, base, _equal(found_outputs, expected))


def _head_of(model: str, folder: Path) -> Path:
    """Write the shape of an EAGLE-3 head for a model, with at most the 32,000 tokens of most published ones."""
    document = read_config(Path(model))
    own = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    sizes = {key: document[key] for key in own if key in document}
    sizes |= {"num_hidden_layers": 1, "draft_vocab_size": min(32000, document["vocab_size"])}
    head = {"architectures": ["LlamaForCausalLMEagle3"], **sizes}
    (folder / "config.json").write_text(json.dumps(head))
    return folder


def _print_heads() -> None:
    heads = ("batch", "accept", "tokens/s", "gain", "tpot, ms", "gain", "step, ms", "tokens/step", "accepted", "equal")
    print("{:>6} {:>7} {:>10} {:>6} {:>9} {:>6} {:>9} {:>12} {:>9} {:>8}".format(*heads), flush=True)


def _warm_up(llm: LLM) -> None:
    _generate(llm, [[1] * 16], [SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)], 1)


def _requests(
    rng: random.Random, llm: LLM, number: int, arguments: argparse.Namespace
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Make requests; their prompts are then in the cache."""
    vocab_size = llm._llm.engine.vocab_size
    prompts = [rng.choices(range(vocab_size), k=arguments.prompt_tokens) for _ in range(number)]
    sampling = [
        SamplingParams(temperature=_TEMPERATURE, seed=seed, max_tokens=arguments.output_tokens, ignore_eos=True)
        for seed in range(number)
    ]
    _generate(llm, prompts, [msgspec.structs.replace(one, max_tokens=1) for one in sampling], number)
    return prompts, sampling


def _guesses(rng: random.Random, output: list[int], acceptance: float, vocab_size: int) -> list[int]:
    """Return an output in which each token is right with that probability."""
    return [token if rng.random() < acceptance else (token + 1) % vocab_size for token in output]


def _generate(
    llm: LLM, prompts: list[list[int]], sampling: list[SamplingParams], batch: int
) -> tuple[list[list[int]], dict[str, float]]:
    """Generate, at most ``batch`` requests at a time; returns the outputs, and what was measured."""
    before = _counts(llm)
    started = time.perf_counter()
    outputs = llm._run(generate_all(llm._llm.engine, as_batch(prompts), sampling, batch))
    seconds = time.perf_counter() - started
    used = {name: value - before[name] for name, value in _counts(llm).items()}
    num_tokens = sum(len(output["token_ids"]) for output in outputs)
    return [output["token_ids"] for output in outputs], {
        "tokens_per_s": num_tokens / seconds,
        "tpot_ms": 1000 * used["tpot_s"] / len(prompts),
        "step_ms": 1000 * used["busy_s"] / used["steps"],
        "tokens_per_step": num_tokens / batch / used["steps"],
        "drafted": used["drafted"],
        "accepted": used["accepted"],
    }


def _counts(llm: LLM) -> dict[str, float]:
    stats = llm.get_system_stats()
    work = list(stats["gpu_instances"].values())
    drafters = stats["cpu_scheduler"]["speculation"].values()
    return {
        "steps": sum(one["steps"] for one in work),
        "busy_s": sum(one["busy_s"] for one in work),
        "tpot_s": stats["metrics"]["histograms"]["time_per_output_token_seconds"]["sum"],
        "drafted": sum(drafts["drafted_tokens"] for drafts in drafters),
        "accepted": sum(drafts["accepted_tokens"] for drafts in drafters),
    }


def _equal(outputs: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [pair for ours, theirs in zip(outputs, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


def _print_summary(lines: list[dict[str, Any]]) -> None:
    """Print the median of the gains, with the least and the greatest one; without drafts: how far its speeds differ."""
    print("\n batch  accept  gain, median (least, greatest)   tpot, gain", flush=True)
    kinds: dict[tuple[int, float | str | None, str], list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault((line["batch"], line["acceptance"], line.get("draft_model", "")), []).append(line)
    for (batch, acceptance, draft_model), found in kinds.items():
        gains, tpot_gains = [line["gain"] for line in found], [line["tpot_gain"] for line in found]
        if acceptance is None:
            rates = [line["tokens_per_s"] for line in found]
            gains = tpot_gains = [rate / statistics.median(rates) for rate in rates]
        name = _name(acceptance)
        gain = f"{statistics.median(gains):.3f} ({min(gains):.3f}, {max(gains):.3f})"
        print(f"{batch:6} {name:>7}  {gain:31} {statistics.median(tpot_gains):.3f}  {draft_model}", flush=True)


def _show(lines: list[dict[str, Any]], line: dict[str, Any], base: dict[str, float], equal: float) -> None:
    line["gain"], line["equal"] = line["tokens_per_s"] / base["tokens_per_s"], equal
    line["tpot_gain"] = base["tpot_ms"] / line["tpot_ms"]
    lines.append(line)
    accepted = line["accepted"] / line["drafted"] if line["drafted"] else 0.0
    acceptance = _name(line["acceptance"])
    print(
        f"{line['batch']:6} {acceptance:>7} {line['tokens_per_s']:10.1f} {line['gain']:6.2f} {line['tpot_ms']:9.2f} "
        f"{line['tpot_gain']:6.2f} {line['step_ms']:9.2f} "
        f"{line['tokens_per_step']:12.2f} {accepted:9.2f} {equal:8.4f}",
        flush=True,
    )


def _name(acceptance: float | str | None) -> str:
    return f"{acceptance:.2f}" if isinstance(acceptance, float) else acceptance or "none"
