"""Attention of a few rows with the transform of their heads, against plain torch, at shapes that no model here has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hbserve.attention.base import HeadTransform, PageTables
from hbserve.attention.decode_pieces import join_rows
from hbserve.kv_cache.layout import KVLayout
from hbserve.layers.norms import rms_norm
from hbserve.layers.rotary import RotaryEmbedding
from hbserve.rope_spec import RopeSpec

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

TOLERANCE = 2**-7
"""Relative tolerance: two roundings of bfloat16. Both sides sum in float32, but in different orders."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    spread = expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE * spread, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("sequences", "num_padding", "num_more"),
    [
        ([(640, 4)], 0, 0),
        ([(0, 4)], 0, 0),
        ([(130, 2), (0, 1), (63, 3)], 2, 0),
        ([(9000, 8)], 0, 0),
        ([(200, 3), (61, 5)], 0, 300),
        ([(37 * i, 1) for i in range(8)], 0, 0),
    ],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page", "rotated_dim", "is_interleaved", "has_norm"),
    [
        (32, 8, 128, 16, None, False, True),
        (6, 2, 96, 8, 48, False, True),
        (8, 1, 64, 256, 32, True, False),
        (40, 2, 256, 16, None, False, False),
    ],
)
def test_attention_of_a_few_rows(
    sequences: list[tuple[int, int]],
    num_padding: int,
    num_more: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    rotated_dim: int | None,
    is_interleaved: bool,
    has_norm: bool,
) -> None:
    """Sequences have so many stored tokens and so many new ones; pieces may be cut for ``num_more`` tokens more."""
    from hbserve.attention.base import DecodeInputs
    from hbserve.attention.paged_decode import PagedDecode

    torch.manual_seed(0)
    starts, counts = (np.array(values, np.int64) for values in zip(*sequences, strict=True))
    stored = np.repeat(starts, counts)
    places = np.concatenate([np.arange(count) for count in counts])
    positions, num_rows = stored + places, len(stored)
    size = num_rows + num_padding
    num_pages = -(-(starts + counts + num_more) // page)
    order = np.random.default_rng(0).permutation(int(num_pages.sum()) + 1).astype(np.int32)
    tables = np.zeros((size, int(num_pages.max())), np.int32)
    for row, sequence in enumerate(np.repeat(np.arange(len(starts)), counts)):
        begin = int(num_pages[:sequence].sum())
        tables[row, : num_pages[sequence]] = order[begin : begin + num_pages[sequence]]
    lens = np.pad((positions + 1 + num_more).astype(np.int32), (0, num_padding), constant_values=1)
    pages = PageTables.build(lens, tables, page)
    slots = tables[np.arange(num_rows), positions // page].astype(np.int64) * page + positions % page

    cache = random(len(order), 2, 2, page, kv_heads, head_dim)
    decode = PagedDecode(KVLayout(2, page, kv_heads, head_dim, torch.bfloat16), cache, heads, size)
    first_row = join_rows(places, size, decode.max_run_rows)
    cut = decode.cut(lens[first_row[1:] - 1], first_row)
    padded = {"positions": (positions, 0), "num_stored": (stored, 0), "slot_mapping": (slots, -1)}
    arrays = {name: np.pad(values, (0, num_padding), constant_values=pad) for name, (values, pad) in padded.items()}
    arrays |= {"pieces": cut.pieces, "first_piece": cut.first_piece, "first_row": first_row}
    arrays |= {"indptr": pages.indptr, "indices": pages.indices, "chunk_len": np.array([cut.chunk_len], np.int32)}
    tensors = {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}
    decode.begin(DecodeInputs(**tensors))
    assert decode.transforms_heads

    rope = RopeSpec(theta=10000.0, magnitude=1.25, rotated_dim=rotated_dim, is_interleaved=is_interleaved)
    rotary = RotaryEmbedding(rope, head_dim, torch.device("cuda"))
    norms = (random(head_dim), random(head_dim)) if has_norm else None
    turn = rotary.inverse_frequencies, rotary.magnitude, rotary.rotated_dim, rotary.is_interleaved
    qkv = random(size, (heads + 2 * kv_heads) * head_dim)
    flat = cache.view(torch.uint8).flatten(3).view(len(order), 2, 2, page, -1)
    for row in range(num_rows):  # what was never written is no number
        for position in range(int(stored[row]), int(num_pages.max()) * page):
            if position // page < num_pages[np.repeat(np.arange(len(starts)), counts)[row]]:
                flat[int(tables[row, position // page]), :, :, position % page] = 0xFF
    before = cache.clone()
    out = torch.empty(size, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):  # the first call must leave the counters at zero
        out.fill_(torch.nan)
        decode.attend_transformed(1, qkv, HeadTransform(norms, 1e-6, *turn), out)

    q, k, v = qkv.view(size, -1, head_dim).tensor_split([heads, heads + kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], 1e-6), rms_norm(k, norms[1], 1e-6)
    q, k = (rotary.rotate(x, *rotary.angles(tensors["positions"])) for x in (q, k))
    for row, position in enumerate(positions.tolist()):
        block, offset = int(tables[row, position // page]), position % page
        assert_close(cache[block, 1, :, offset], torch.stack([k[row], v[row]]))
        before[block, 1, :, offset] = cache[block, 1, :, offset]
        table = torch.from_numpy(tables[row]).cuda().long()
        keys, values = (cache.float()[table, 1, part].flatten(0, 1)[: position + 1].transpose(0, 1) for part in (0, 1))
        expected = F.scaled_dot_product_attention(q[row].view(kv_heads, -1, head_dim).float(), keys, values)
        assert_close(out[row], expected.reshape(heads, head_dim))
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))  # nothing else was written
