"""The kernel of a lone row in clusters, run by an emulator of a cluster's blocks, against plain torch."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hbserve.attention
import tests.support
from hbserve.layers.norms import rms_norm
from hbserve.layers.rotary import RotaryEmbedding
from hbserve.rope_spec import RopeSpec

_SOURCE = Path(hbserve.attention.__file__).parent / "row_cluster.cu"
_EMULATOR = Path(tests.support.__file__).parent / "cluster_emulator.hpp"
_MAIN = """
extern "C" int run(const Bits *qkv, Bits *cache, const Bits *query_norm, const Bits *key_norm, const float *frequencies,
                   const long long *position, const long long *slot, const int *pages, Bits *out,
                   long long stride_block, long long stride_kv, long long stride_token, int num_pages, float scale,
                   float magnitude, float eps) {
    kernel = [=] {
        row_cluster(qkv, cache, query_norm, key_norm, frequencies, position, slot, pages, out, stride_block, stride_kv,
                    stride_token, num_pages, scale, magnitude, eps);
    };
    for (int head = 0; head < KV_HEADS; head++)
        if (!run_cluster(head, shared_bytes)) return 1;
    return 0;
}
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def _build(folder: Path, macros: dict[str, int]) -> ctypes.CDLL:
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    body = _SOURCE.read_text().partition("// End of the primitives.")[2]
    source.write_text(f'#include "{_EMULATOR}"\n{body}\n{_MAIN}')
    options = [f"-D{name}={value}" for name, value in macros.items()]
    command = [
        "g++",
        "-O2",
        "-fno-strict-aliasing",
        "-std=c++17",
        "-w",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(source),
        *options,
    ]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page", "rotated_dim", "is_interleaved", "has_norm", "dtype"),
    [
        (8, 2, 128, 16, None, False, True, torch.bfloat16),
        (3, 1, 96, 8, 48, False, True, torch.bfloat16),
        (8, 1, 64, 256, 32, True, False, torch.float16),
        (5, 1, 256, 16, None, False, False, torch.bfloat16),
        (2, 2, 80, 32, None, False, True, torch.bfloat16),
    ],
)
def test_a_row_attends_as_plain_torch(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    rotated_dim: int | None,
    is_interleaved: bool,
    has_norm: bool,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    rope = RopeSpec(theta=10000.0, magnitude=1.25, rotated_dim=rotated_dim, is_interleaved=is_interleaved)
    rotary = RotaryEmbedding(rope, head_dim, torch.device("cpu"))
    norms = (random(head_dim), random(head_dim)) if has_norm else None
    library = _build(
        tmp_path,
        {
            "GROUP": heads // kv_heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "ROTATED_DIM": rotary.rotated_dim,
            "IS_INTERLEAVED": int(is_interleaved),
            "HAS_NORM": int(has_norm),
            "PAGE": page,
            "IS_BFLOAT16": int(dtype == torch.bfloat16),
            "WARPS": 4,
            "CLUSTER": 8,
        },
    )
    for length in (1, 65, 1100):  # 1100 tokens: some warps have three tiles
        num_pages, last = -(-length // page), length - 1
        cache = random(num_pages + 2, 2, 2, page, kv_heads, head_dim)
        pages = torch.randperm(num_pages + 2)[:num_pages].to(torch.int32)
        block, offset = int(pages[-1]), last % page
        cache.view(torch.uint8)[block, :, :, offset:] = 0xFF  # what was never written is no number
        qkv = random(1, (heads + 2 * kv_heads) * head_dim)
        out = torch.full((heads, head_dim), torch.nan, dtype=dtype)
        position, layer, before = torch.tensor([last]), cache[:, 1], cache.clone()

        for slot in (-1, block * page + offset):
            q_norm, k_norm = norms or (qkv, qkv)
            tensors = (qkv, layer, q_norm, k_norm, rotary.inverse_frequencies, position, torch.tensor([slot]), pages)
            assert not library.run(
                *[ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, out)],
                *[ctypes.c_longlong(stride) for stride in layer.stride()[:3]],
                len(pages),
                *[ctypes.c_float(x) for x in (head_dim**-0.5 * math.log2(math.e), rotary.magnitude, 1e-6)],
            ), "a thread waits for ever"
            if slot < 0:  # a padded row is not stored
                assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))

        q, k, v = qkv.view(1, -1, head_dim).tensor_split([heads, heads + kv_heads], dim=1)
        if norms is not None:
            q, k = rms_norm(q, norms[0], 1e-6), rms_norm(k, norms[1], 1e-6)
        q, k = (rotary.rotate(x, *rotary.angles(position)) for x in (q, k))
        stored = cache[block, 1, :, offset]
        torch.testing.assert_close(stored, torch.stack([k[0], v[0]]), atol=0.02, rtol=2**-7)
        before[block, 1, :, offset] = stored
        assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))  # nothing else was written
        keys, values = (cache.float()[pages.long(), 1, part].flatten(0, 1)[:length].transpose(0, 1) for part in (0, 1))
        expected = F.scaled_dot_product_attention(q[0].view(kv_heads, -1, head_dim).float(), keys, values)
        spread = expected.abs().max().item()
        torch.testing.assert_close(out.float(), expected.reshape(heads, head_dim), atol=2**-7 * spread, rtol=2**-7)
