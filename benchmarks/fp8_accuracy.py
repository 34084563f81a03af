"""What FP8 costs in accuracy: perplexity of a model on the repository's own pages, and errors by layer, on a CPU.

The text is README.md and docs/*.md, cut into windows. Products and sums are in float32: nothing but FP8 differs.
A change of perplexity is given with its standard error over tokens. Divergence is that of the next token's
distribution (Kullback and Leibler), in percent of a nat.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hbserve.attention import AttentionBatch
from hbserve.attention.sdpa import SdpaBackend
from hbserve.float8 import FP8
from hbserve.kv_cache.layout import KVLayout
from hbserve.model_spec import ModelSpec
from hbserve.model_store import fetch_model
from hbserve.models.decoder import Decoder
from hbserve.models.loader import load_weights
from hbserve.models.weights import WeightTable
from hbserve.platform import make_platform
from hbserve.tokenizer import Tokenizer

_ROOT = Path(__file__).resolve().parent.parent
_BLOCK_SIZE = 16
_KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "weights": {"quantization": "fp8"},
    "KV": {"kv_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_dtype": "fp8"},
}


class _Model:
    """A model whose matrices, KV, or both are in FP8."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._platform = make_platform("cpu", gpu_id=0, num_threads=None, num_instances=1)
        self._spec = ModelSpec.load(folder, **options)
        table = WeightTable.build(self._spec, torch.float32)
        arena = self._platform.allocate_arena(table.num_bytes)
        load_weights(folder, self._spec, table, arena)
        self._weights = table.views(arena)
        self._decoder = Decoder(self._spec, self._weights)

    def layers(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Yield the residual stream ``[tokens, hidden]`` after each layer, then the log-probabilities."""
        attention, positions = self._attention(len(token_ids)), torch.arange(len(token_ids))
        decoder = self._decoder
        stream, q, attended = decoder.embed(token_ids), *(decoder.heads_buffer(len(token_ids)) for _ in range(2))
        for index in range(self._spec.num_layers):
            decoder.before_attention(index, stream, positions, attention, q)
            attention.attend(index, q, attended)
            decoder.after_attention(index, stream, attended, attention)
            yield stream.total if stream.pending is None else stream.total + stream.pending
        yield decoder.logits(decoder.finish(stream)).log_softmax(-1)

    def _attention(self, num_tokens: int) -> SdpaBackend:
        """Make attention that has begun a step with all tokens of one sequence."""
        spec, num_blocks = self._spec, -(-num_tokens // _BLOCK_SIZE)
        dtype = torch.float32 if spec.kv_format is None else FP8
        layout = KVLayout(spec.num_layers, _BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype)
        arena = self._platform.allocate_arena(num_blocks * layout.block_bytes)
        scales = self._weights.get("kv_scales")
        attention = SdpaBackend(spec, layout, layout.view(arena, num_blocks), self._platform, kv_scales=scales)
        attention.begin(
            AttentionBatch(
                num_decode_rows=0,
                query_starts=np.array([0, num_tokens], np.int32),
                context_lens=np.array([num_tokens], np.int32),
                block_tables=np.arange(num_blocks, dtype=np.int32)[None],
                slot_mapping=torch.arange(num_tokens),
            )
        )
        return attention


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this experiment."""
    parser.add_argument("--model", default="smollm2", help="a model folder, or smollm2 (default)")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of the text (default: 20000)")
    parser.add_argument("--window", type=int, default=1000, help="tokens that see each other (default: 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """Measure, and print two tables."""
    folder = fetch_model("smollm2") if arguments.model == "smollm2" else Path(arguments.model)
    text = "\n\n".join(path.read_text() for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))))
    token_ids = torch.tensor(Tokenizer(folder).encode(text)[: arguments.tokens])
    windows = torch.split(token_ids, arguments.window)
    models = {kind: _Model(folder, options) for kind, options in _KINDS.items()}
    losses: dict[str, list[Tensor]] = {kind: [] for kind in _KINDS}
    divergences: dict[str, list[Tensor]] = {kind: [] for kind in _KINDS}
    errors: dict[str, list[float]] = {}
    for number, window in enumerate(windows):
        began = time.perf_counter()
        exact = list(models["none"].layers(window))
        for kind, model in models.items():
            found = exact if kind == "none" else list(model.layers(window))
            losses[kind].append(-found[-1][:-1].gather(1, window[1:, None])[:, 0])
            divergences[kind].append(F.kl_div(found[-1], exact[-1], reduction="none", log_target=True).sum(1))
            if number == 0:
                errors[kind] = [_relative(x, y) for x, y in zip(found[:-1], exact[:-1], strict=True)]
        so_far = " ".join(f"{kind} {math.exp(torch.cat(parts).mean().item()):.4f}" for kind, parts in losses.items())
        print(f"window {number + 1} of {len(windows)}: {time.perf_counter() - began:.0f} s; {so_far}", flush=True)
    results: dict[str, Any] = {"tokens": len(token_ids), "window": arguments.window, "layer_errors": errors}
    plain = torch.cat(losses["none"])
    print(f"\n{'FP8':10} {'perplexity':>10} {'change':>16} {'RMS of log-probabilities':>25} {'divergence':>10}")
    for kind in _KINDS:
        change = torch.cat(losses[kind]) - plain
        results[kind] = {
            "perplexity": math.exp((plain + change).mean().item()),
            "change": math.exp(change.mean().item()) - 1,
            "change_standard_error": (change.std() / math.sqrt(len(change))).item(),
            "log_probability_rms": change.square().mean().sqrt().item(),
            "divergence": torch.cat(divergences[kind]).mean().item(),
        }
        perplexity, relative, deviation, rms, divergence = results[kind].values()
        print(f"{kind:10} {perplexity:10.3f} {relative:8.2%} ± {deviation:.2%} {rms:25.4f} {divergence:10.2%}")
    print(f"\n{'after layer':>11} " + " ".join(f"{kind:>8}" for kind in list(_KINDS)[1:]))
    for layer in range(len(errors["none"])):
        print(f"{layer:11} " + " ".join(f"{errors[kind][layer]:8.2%}" for kind in list(_KINDS)[1:]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _relative(x: Tensor, exact: Tensor) -> float:
    """Return the median over tokens of the error's length, relative to the length of the exact vector."""
    return float(((x - exact).norm(dim=1) / exact.norm(dim=1)).median())
