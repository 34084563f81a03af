"""The Triton kernels against plain torch, at shapes that no model here has; also suitable for compute-sanitizer."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

TOLERANCE = 2**-7
"""Relative tolerance: two roundings of bfloat16. Both sides sum in float32, but in different orders."""


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    spread = expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE * spread, rtol=TOLERANCE)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(16, 8, 128, 16), (8, 1, 64, 8), (6, 2, 96, 256)])
@pytest.mark.parametrize(
    ("num_rows", "num_padding", "longest"), [(1, 0, 2500), (3, 1, 2500), (7, 0, 2500), (33, 7, 9000), (300, 4, 2500)]
)
def test_paged_decode(
    heads: int, kv_heads: int, head_dim: int, page: int, num_rows: int, num_padding: int, longest: int
) -> None:
    from hbserve.attention.paged_decode import DecodeInputs, PagedDecode
    from hbserve.kv_cache.layout import KVLayout

    rng = np.random.default_rng(1)
    lens = np.ones(num_rows + num_padding, np.int32)
    lens[:num_rows] = rng.integers(1, 900, num_rows)
    lens[0] = longest  # many pieces
    pages = -(-lens // page)
    num_blocks = int(pages.sum()) + 1
    layout = KVLayout(num_layers=2, block_size=page, num_kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16)
    cache = random(num_blocks, 2, 2, page, kv_heads, head_dim)
    cache[-1] = torch.nan  # belongs to no sequence
    order = rng.permutation(num_blocks - 1).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    for row, length in enumerate(lens):  # the kernel must not read behind a sequence
        if length % page:
            cache[int(order[starts[row + 1] - 1]), :, :, int(length % page) :] = torch.nan
    decode = PagedDecode(layout, cache, heads, len(lens))

    def on_gpu(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        return torch.from_numpy(array).cuda()

    cut = decode.cut(lens)
    decode.begin(
        DecodeInputs(
            pieces=on_gpu(cut.pieces),
            first_piece=on_gpu(cut.first_piece),
            first_row=on_gpu(np.arange(len(lens) + 1, dtype=np.int32)),
            indptr=on_gpu(starts),
            indices=on_gpu(order),
            positions=on_gpu(lens.astype(np.int64) - 1),
            num_stored=on_gpu(lens.astype(np.int64) - 1),
            slot_mapping=on_gpu(np.zeros(len(lens), np.int64)),
            chunk_len=torch.tensor([cut.chunk_len], dtype=torch.int32, device="cuda"),
        )
    )
    q = random(len(lens), heads, head_dim)
    out = torch.empty_like(q)
    for _ in range(2):  # the first call must leave the counters at zero
        decode.attend(1, q, out)
    for row, length in enumerate(lens):
        blocks = on_gpu(order[starts[row] : starts[row + 1]]).long()
        keys, values = (
            cache[blocks, 1, part].reshape(-1, kv_heads, head_dim)[:length].transpose(0, 1).float() for part in (0, 1)
        )
        grouped = q[row].view(kv_heads, heads // kv_heads, head_dim).float()
        assert_close(out[row], F.scaled_dot_product_attention(grouped, keys, values).reshape(heads, head_dim))


@pytest.mark.parametrize("starts", [[900], [31], [64, 2500, 7], [*range(100, 130)]])
@pytest.mark.parametrize("num_tokens", [2, 5])
@pytest.mark.parametrize("num_more", [0, 300])
@pytest.mark.parametrize(("heads", "head_dim"), [(32, 128), (64, 64)])
@pytest.mark.parametrize("is_fp8", [False, True], ids=["bfloat16", "fp8"])
def test_paged_decode_of_several_tokens_of_a_sequence(
    starts: list[int], num_tokens: int, num_more: int, heads: int, head_dim: int, is_fp8: bool
) -> None:
    """Each token is a row of its own, which shares the sequence's pages and sees the tokens before it.

    Pieces may be cut for more tokens than there are (`hbserve.engine.rounds`).
    """
    from hbserve.attention.paged_decode import DecodeInputs, PagedDecode
    from hbserve.float8 import FP8
    from hbserve.kv_cache.layout import KVLayout

    kv_heads, page = 8, 16
    stored = np.repeat(np.array(starts, np.int64), num_tokens)
    places = np.tile(np.arange(num_tokens), len(starts))
    positions = stored + places
    lens = (positions + 1).astype(np.int32)
    num_pages = [-(-(start + num_tokens) // page) for start in starts]
    order = np.random.default_rng(2).permutation(sum(num_pages)).astype(np.int32)
    tables = [table for table in np.split(order, np.cumsum(num_pages)[:-1]) for _ in range(num_tokens)]
    pages = -(-lens // page)
    indices = np.concatenate([table[:count] for table, count in zip(tables, pages, strict=True)])
    layout = KVLayout(1, page, kv_heads, head_dim, FP8 if is_fp8 else torch.bfloat16)
    cache = random(len(order), 1, 2, page, kv_heads, head_dim).to(layout.dtype)
    scales = torch.rand(1, 2, kv_heads, device="cuda") + 0.5 if is_fp8 else None
    decode = PagedDecode(layout, cache, heads, len(lens), scales)
    first_row = np.append(np.flatnonzero(places % decode.max_run_rows == 0), len(lens)).astype(np.int32)
    cut = decode.cut(lens[first_row[1:] - 1] + np.int32(num_more), first_row)
    on_gpu = {
        "pieces": cut.pieces,
        "first_piece": cut.first_piece,
        "first_row": first_row,
        "indptr": np.concatenate([[0], np.cumsum(pages)]).astype(np.int32),
        "indices": indices,
        "positions": positions,
        "num_stored": stored,
        "slot_mapping": np.zeros(len(lens), np.int64),
        "chunk_len": np.array([cut.chunk_len], np.int32),
    }
    decode.begin(DecodeInputs(**{name: torch.from_numpy(array).cuda() for name, array in on_gpu.items()}))
    for table, start in zip(tables[::num_tokens], starts, strict=True):  # what was never written is no number
        cache.view(torch.uint8)[int(table[-1]), 0, :, (start + num_tokens - 1) % page + 1 :] = 0xFF
    q = random(len(lens), heads, head_dim)
    out = torch.empty_like(q)
    for _ in range(2):  # the first call must leave the counters at zero
        decode.attend(0, q, out)
    for row, (table, length) in enumerate(zip(tables, lens.tolist(), strict=True)):
        blocks = torch.from_numpy(table).cuda().long()
        keys, values = (
            cache.float()[blocks, 0, part].reshape(-1, kv_heads, head_dim)[:length].transpose(0, 1)
            * (1.0 if scales is None else scales[0, part, :, None, None])
            for part in (0, 1)
        )
        grouped = q[row].view(kv_heads, heads // kv_heads, head_dim).float()
        assert_close(out[row], F.scaled_dot_product_attention(grouped, keys, values).reshape(heads, head_dim))


@pytest.mark.parametrize(
    ("rows", "size", "dtype"),
    [
        (96, 100, torch.bfloat16),
        (1024, 2048, torch.bfloat16),
        (130, 12288, torch.bfloat16),
        (64, 5120, torch.float16),
        (96, 100, torch.float32),
        (40_002, 256, torch.bfloat16),
    ],
)
def test_one_row(rows: int, size: int, dtype: torch.dtype) -> None:
    """The last case gives each program several tiles of rows."""
    from hbserve.layers.linear import PlainLinear
    from hbserve.layers.norms import rms_norm
    from hbserve.layers.one_row import one_row

    x, bias, norm = (random(*shape).to(dtype) for shape in ((1, size), (rows,), (size,)))
    weight = random(rows, size, scale=0.02).to(dtype)
    plain, layer = PlainLinear(weight), PlainLinear(weight, bias)
    residual = random(1, rows).to(dtype)
    product = F.linear(x.float(), weight.float())
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    assert one_row(plain, x, out=out) is out
    assert_close(out, product)
    assert_close(one_row(layer, x), product + bias)
    assert_close(one_row(layer, x, has_bias=False), product)
    expected = residual + product
    assert one_row(plain, x, residual=residual) is residual
    assert_close(residual, expected)
    normed = F.linear(rms_norm(x, norm, 1e-6).float(), weight.float())
    assert_close(one_row(layer, x, norm=norm, eps=1e-6), normed + bias)
    gate, up = normed.chunk(2, dim=1)
    assert_close(one_row(plain, x, norm=norm, eps=1e-6, is_gated=True), F.silu(gate) * up)


@pytest.mark.parametrize(
    ("num_outputs", "size", "dtype"),
    [
        (96, 100, torch.bfloat16),
        (1024, 2048, torch.bfloat16),
        (130, 12288, torch.bfloat16),
        (64, 5120, torch.float16),
        (40_002, 256, torch.bfloat16),
    ],
)
def test_few_rows(num_outputs: int, size: int, dtype: torch.dtype) -> None:
    """A row's result does not depend on how many rows there are."""
    from hbserve.layers.few_rows import MAX_FEW_ROWS, few_rows
    from hbserve.layers.linear import PlainLinear
    from hbserve.layers.norms import rms_norm

    x, bias, norm = (random(*shape).to(dtype) for shape in ((MAX_FEW_ROWS, size), (num_outputs,), (size,)))
    weight = random(num_outputs, size, scale=0.02).to(dtype)
    plain, layer = PlainLinear(weight), PlainLinear(weight, bias)
    product = F.linear(x.float(), weight.float())
    normed = F.linear(rms_norm(x, norm, 1e-6).float(), weight.float())
    gate, up = normed.chunk(2, dim=1)
    first: list[torch.Tensor] = []
    for num_rows in (2, 3, MAX_FEW_ROWS):
        rows = x[:num_rows]
        out = torch.empty(num_rows, num_outputs, dtype=dtype, device="cuda")
        assert few_rows(plain, rows, out=out) is out
        assert_close(out, product[:num_rows])
        assert_close(few_rows(layer, rows), (product + bias)[:num_rows])
        assert_close(few_rows(layer, rows, has_bias=False), product[:num_rows])
        residual = random(num_rows, num_outputs).to(dtype)
        expected = residual + product[:num_rows]
        assert few_rows(plain, rows, residual=residual) is residual
        assert_close(residual, expected)
        found = [
            out,
            few_rows(layer, rows, norm=norm, eps=1e-6),
            few_rows(plain, rows, norm=norm, eps=1e-6, is_gated=True),
        ]
        assert_close(found[1], (normed + bias)[:num_rows])
        assert_close(found[2], (F.silu(gate) * up)[:num_rows])
        if num_rows == 2:
            first = found
        else:
            assert all(torch.equal(a, b[:2]) for a, b in zip(first, found, strict=True))


def test_few_rows_wait_for_what_they_read() -> None:
    """Kernels in a graph, which begin while the one before ends, compute what they compute one after the other."""
    from hbserve.layers.few_rows import few_rows
    from hbserve.layers.linear import PlainLinear

    hidden, inner, num_rows = 1024, 3072, 4
    ups = [PlainLinear(random(2 * inner, hidden, scale=hidden**-0.5)) for _ in range(8)]
    downs = [PlainLinear(random(hidden, inner, scale=inner**-0.5)) for _ in range(8)]
    norm, start = random(hidden), random(num_rows, hidden)
    total = start.clone()

    def compute(*, is_alone: bool) -> None:
        for up, down in zip(ups, downs, strict=True):
            x = few_rows(up, total, norm=norm, eps=1e-6, is_gated=True)
            if is_alone:
                torch.cuda.synchronize()
            few_rows(down, x, residual=total)
            if is_alone:
                torch.cuda.synchronize()

    compute(is_alone=True)
    expected = total.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute(is_alone=False)
    for _ in range(3):
        total.copy_(start)
        graph.replay()
        assert torch.equal(total, expected)


@pytest.mark.parametrize("num_tokens", [1, 5, 200])
def test_norms_and_gate(num_tokens: int) -> None:
    from hbserve.layers import fused
    from hbserve.layers.activations import silu_and_mul
    from hbserve.layers.norms import rms_norm

    x, residual, weight = random(num_tokens, 1000), random(num_tokens, 1000), random(1000)
    assert_close(fused.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    total = residual + x
    assert_close(fused.add_rms_norm_(x, residual, weight, 1e-6), rms_norm(total, weight, 1e-6))
    assert torch.equal(residual, total)
    gate_up = random(num_tokens, 2 * 1500)
    assert_close(fused.silu_and_mul(gate_up), silu_and_mul(gate_up))


@pytest.mark.parametrize(("num_rows", "size", "num_ranks"), [(1, 1000, 2), (7, 5120, 4), (300, 2048, 2)])
def test_sum_over_ranks_with_norm(num_rows: int, size: int, num_ranks: int) -> None:
    """Run all ranks on one GPU, one after the other; the flags that a rank waits for are set beforehand."""
    from hbserve.layers.norms import rms_norm
    from hbserve.layers.peer_norm import MAX_PROGRAMS, sum_add_rms_norm_

    parts, residual, weight = random(num_ranks, num_rows, size), random(num_rows, size), random(size)
    flags = torch.zeros(num_ranks, MAX_PROGRAMS, num_ranks, dtype=torch.int32, device="cuda")
    summands, signals = (torch.tensor([part.data_ptr() for part in tensor], device="cuda") for tensor in (parts, flags))
    used = min(num_rows, MAX_PROGRAMS)
    total = residual + parts.float().sum(0).to(parts.dtype)
    for rank in range(num_ranks):
        flags.zero_()
        flags[rank, :used] = 1  # as if the other ranks had started
        flags[rank, :used, rank] = 0
        added = residual.clone()
        assert_close(sum_add_rms_norm_(summands, signals, rank, added, weight, 1e-6), rms_norm(total, weight, 1e-6))
        assert torch.equal(added, total)
        expected_flags = torch.zeros_like(flags)
        expected_flags[:, :used, rank] = 1
        expected_flags[rank] = 0
        assert torch.equal(flags, expected_flags)


@pytest.mark.parametrize("num_tokens", [3, 40, 130])
@pytest.mark.parametrize(("rotated_dim", "is_interleaved"), [(None, False), (None, True), (48, False), (64, True)])
def test_norm_rotate_store(num_tokens: int, rotated_dim: int | None, is_interleaved: bool) -> None:
    from hbserve.layers import fused
    from hbserve.layers.norms import rms_norm
    from hbserve.layers.rotary import RotaryEmbedding
    from hbserve.rope_spec import RopeSpec

    heads, kv_heads, head_dim, page = 6, 2, 96, 16
    rope = RopeSpec(theta=10000.0, magnitude=1.25, rotated_dim=rotated_dim, is_interleaved=is_interleaved)
    rotary = RotaryEmbedding(rope, head_dim, torch.device("cuda"))
    qkv = random(num_tokens, (heads + 2 * kv_heads) * head_dim)
    cache = torch.zeros(20, 2, page, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    q_norm, k_norm = random(head_dim), random(head_dim)
    positions = torch.randint(5000, (num_tokens,), device="cuda")
    slots = torch.randperm(20 * page, device="cuda")[:num_tokens]
    slots[0] = -1  # a padded token
    q = torch.empty(num_tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    fused.norm_rotate_store(qkv, cache, (q_norm, k_norm), positions, slots, rotary, 1e-6, q)
    queries, keys, values = qkv.view(num_tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    angles = rotary.angles(positions)
    assert_close(q, rotary.rotate(rms_norm(queries, q_norm, 1e-6), *angles))
    stored = slots[1:]
    assert_close(cache[stored // page, 0, stored % page], rotary.rotate(rms_norm(keys, k_norm, 1e-6), *angles)[1:])
    assert torch.equal(cache[stored // page, 1, stored % page], values[1:])
    assert cache.count_nonzero(dim=(1, 3, 4)).count_nonzero() <= num_tokens - 1


@pytest.mark.parametrize("num_tokens", [3, 40, 130])
@pytest.mark.parametrize(("rotated_dim", "is_interleaved"), [(None, False), (None, True), (64, False), (64, True)])
def test_heads_are_mixed_for_a_cache_in_fp8(num_tokens: int, rotated_dim: int | None, is_interleaved: bool) -> None:
    from hbserve.float8 import FP8, widened
    from hbserve.layers import fused
    from hbserve.layers.rotary import RotaryEmbedding
    from hbserve.rope_spec import RopeSpec

    heads, kv_heads, head_dim, page = 6, 2, 128, 16
    rope = RopeSpec(theta=10000.0, rotated_dim=rotated_dim, is_interleaved=is_interleaved)
    rotary = RotaryEmbedding(rope, head_dim, torch.device("cuda"))
    qkv = random(num_tokens, (heads + 2 * kv_heads) * head_dim)
    cache = torch.zeros(20, 2, page, kv_heads, head_dim, dtype=FP8, device="cuda")
    scales = torch.tensor([[0.5, 0.02], [0.1, 0.3]], device="cuda")
    positions = torch.randint(5000, (num_tokens,), device="cuda")
    slots = torch.randperm(20 * page, device="cuda")[:num_tokens]
    q = torch.empty(num_tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    fused.norm_rotate_store(qkv, cache, None, positions, slots, rotary, 1e-6, q, scales)
    queries, keys, values = qkv.view(num_tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    angles = rotary.angles(positions)
    assert_close(q, rotary.mix(rotary.rotate(queries, *angles)))
    for index, wanted in enumerate((rotary.mix(rotary.rotate(keys, *angles)), values)):
        scale = scales[index, :, None]
        error = (widened(cache[slots // page, index, slots % page]) * scale - wanted.float()).abs()
        assert (error <= wanted.float().abs() / 12 + scale * 2**-9).all()


@pytest.mark.parametrize(("percentage", "end"), [(60, "first"), (40, "last"), (80, "first"), (20, "last")])
def test_products_in_a_share_of_the_multiprocessors(percentage: int, end: Literal["first", "last"]) -> None:
    """Compute products at shapes where cuBLAS left tiles unwritten in processes that MPS limits to a share."""
    from hbserve.platform.cuda_share import CudaShare

    share = CudaShare(torch.device("cuda", 0), percentage, end)
    total = torch.cuda.get_device_properties(0).multi_processor_count
    assert abs(share.num_multiprocessors - total * percentage / 100) <= 4
    with torch.cuda.stream(share.stream):
        for size, inner in [(512, 256), (1408, 256), (6144, 4096), (4096, 4096), (4096, 12288)]:
            for rows in (1, 16, 48, 64, 128, 200, 640, 1024, 4096):
                x, weight, probe = random(rows, inner), random(size, inner), torch.randn(size, device="cuda")
                product = torch.full((rows, size), float("nan"), device="cuda", dtype=torch.bfloat16)
                torch.mm(x, weight.t(), out=product)
                # Compare products with a random vector, so that the check itself uses no matrix kernel.
                seen = (product.float() * probe).sum(1)
                expected = (x.float() * (weight.float() * probe[:, None]).sum(0)).sum(1)
                assert ((seen - expected).abs() < 0.1 * expected.abs().mean()).all(), (size, inner, rows)


def test_rounds_on_the_device_are_those_on_the_host() -> None:
    """Random rows, guesses and samples: the graph's next inputs follow from the round before as `next_round` says."""
    from hbserve.engine.rounds.device_rounds import DeviceRounds, RoundInputs
    from hbserve.messages.worker import PlanRow, StepPlan, StepResult
    from hbserve.speculation.rounds import next_round

    page, vocab_size, num_padding = 16, 4, 3
    rng = np.random.default_rng(3)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, vocab_size, count)]

    for num_sequences, num_rounds in [(1, 8), (3, 3), (40, 4)]:
        rows, tables = [], []
        for slot in range(num_sequences):
            start, num_drafts = int(rng.integers(1, 200)), int(rng.integers(0, 16))
            ahead = tokens(int(rng.integers(0, 60))) if num_drafts else []
            row = PlanRow(slot, start, num_drafts + 1, tokens(num_drafts + 1), [], True, num_drafts=num_drafts)
            rows.append(msgspec.structs.replace(row, ahead=ahead))
            tables.append(rng.integers(0, 1000, (start + num_rounds * (num_drafts + 1)) // page + 1))
        plan = StepPlan(epoch=1, step_id=1, rows=rows, new_sequences=[], sends=[], rounds=num_rounds)

        def arrays(plan: StepPlan, tables: list[Any] = tables) -> list[list[int]]:
            places = [(row, row.start + index) for row in plan.rows for index in range(row.num_tokens)]
            slot_mapping = [int(tables[row.slot][at // page]) * page + at % page for row, at in places]
            token_ids = [token for row in plan.rows for token in row.token_ids or ()]
            return [token_ids, [at for _, at in places], [row.start for row, _ in places], slot_mapping]

        def on_gpu(values: list[int]) -> torch.Tensor:
            return torch.tensor([*values, *[0] * num_padding], dtype=torch.int64, device="cuda")

        pages = [tables[row.slot] for row in rows for _ in range(row.num_tokens)]
        ends = np.cumsum([row.num_tokens for row in rows])
        first_pages = np.cumsum([0, *map(len, pages)])[ends - 1].astype(np.int32)
        indices = torch.tensor(np.concatenate(pages), dtype=torch.int32, device="cuda")
        inputs = token_ids, positions, num_stored, slot_mapping = [on_gpu(values) for values in arrays(plan)]
        given = RoundInputs(token_ids, positions, num_stored, slot_mapping, indices, page)
        rounds = DeviceRounds(rows, given, first_pages, vocab_size)
        following: StepPlan | None = plan
        while following is not None:
            sampled = [
                guess if rng.random() < 0.8 else int(rng.integers(0, vocab_size))
                for row in following.rows
                for guess in [*(row.token_ids or ())[1:], 0]
            ]
            result = StepResult(epoch=1, step_id=1, token_ids=sampled, logprobs=None, busy_s=0.1)
            following = next_round(following, result, lambda slot: [])
            if following is not None:
                rounds.advance(on_gpu(sampled))
                assert [array.tolist() for array in inputs] == [
                    [*values, *[0] * num_padding] for values in arrays(following)
                ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [2, 64, 65, 129, 193])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (8, 1), (4, 4)])
def test_torch_attends_behind_a_prefix(num_queries: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    """Also where torch's kernel has a last tile of one query, with heads that share keys."""
    from hbserve.attention.sdpa import _attend_chunk
    from hbserve.model_families.declaration import Scales

    num_keys = num_queries + 32
    q = random(num_queries, num_heads, 128).to(dtype)
    keys, values = (random(num_keys, num_kv_heads, 128).to(dtype) for _ in range(2))
    mask = torch.arange(num_keys, device="cuda") <= torch.arange(32, num_keys, device="cuda")[:, None]
    found = _attend_chunk(q, keys, values, mask, Scales(), None)
    wide = (x.double().repeat_interleave(num_heads // num_kv_heads, 1).transpose(0, 1) for x in (keys, values))
    wide_keys, wide_values = wide
    scores = q.double().transpose(0, 1) @ wide_keys.transpose(1, 2) / 128**0.5
    expected = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ wide_values).transpose(0, 1)
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert (found.double() - expected).abs().max() < bound
