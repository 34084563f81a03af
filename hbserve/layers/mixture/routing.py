"""Triton kernels that choose experts and group the tokens by expert; nothing waits for the host.

A pair is a token and one of its experts: pair ``token * num_chosen + i``. `group_pairs` sorts pairs by expert and cuts
each expert's pairs into tiles of ``tile_rows`` rows, so that a tile reads the weights of one expert only::

    expert       2             5             7
    pairs        a b c d e     f             g h i j k l m n
    tiles of 4  [a b c d][e   ][f          ][g h i j][k l m n]

The last tile of an expert may have empty rows. The order of an expert's pairs depends on the order of atomic additions.
That changes no result: rows of a tile are computed independently of each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.model_families.declaration import Experts
from hbserve.platform.cuda_driver import overlaps

_BLOCK_PAIRS = 512


class Choice(NamedTuple):
    """The experts of some tokens.

    Attributes:
        experts: int32 ``[tokens, chosen]``, counted from this rank's first; -1: another rank's, or a padded token.
        weights: ``[tokens, chosen]``, in the dtype of the router's outputs.
        places: int32 ``[tokens, chosen]``, the place of a pair among those of its expert.
    """

    experts: Tensor
    weights: Tensor
    places: Tensor


class Groups(NamedTuple):
    """Pairs by expert.

    Attributes:
        pairs: int32, the pairs in the order of the tiles' rows; empty rows are undefined.
        tile_experts: int32 ``[tiles]``.
        ends: int32 ``[experts]``, the row after the last pair of an expert.
        num_tiles: int32 ``[1]``; later entries of ``tile_experts`` are undefined.
    """

    pairs: Tensor
    tile_experts: Tensor
    ends: Tensor
    num_tiles: Tensor


class Choosing(NamedTuple):
    """How a token's experts are chosen, as constants of a kernel: the last arguments of `choose_of_token`."""

    num_experts: int
    num_chosen: int
    chosen_lanes: int
    num_groups: int
    num_chosen_groups: int
    group_lanes: int
    member_lanes: int
    is_sigmoid: bool
    has_bias: bool
    is_renormalised: bool

    @staticmethod
    def of(experts: Experts, bias: Tensor | None) -> Choosing:
        """Describe a router with or without ``bias``."""
        count, groups = experts.num_experts, experts.num_groups
        lanes = [triton.next_power_of_2(size) for size in (experts.num_chosen, groups, count // groups)]
        return Choosing(
            count, experts.num_chosen, lanes[0], groups, experts.num_chosen_groups, lanes[1], lanes[2],
            experts.scoring == "sigmoid", bias is not None, experts.is_renormalised,
        )  # fmt: skip


@triton.jit
def _ordered(values):  # type: ignore[no-untyped-def]
    """Map float32 to int32 in the same order, NaN above all: a warp finds the greatest int32 in one instruction."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def choose_of_token(  # type: ignore[no-untyped-def]
    logits, bias, scale, num_experts: tl.constexpr, num_chosen: tl.constexpr, chosen_lanes: tl.constexpr,
    num_groups: tl.constexpr, num_chosen_groups: tl.constexpr, group_lanes: tl.constexpr, member_lanes: tl.constexpr,
    is_sigmoid: tl.constexpr, has_bias: tl.constexpr, is_renormalised: tl.constexpr,
):  # fmt: skip
    """Compute `hbserve.layers.mixture.plain.choose_experts` of one token.

    Returns:
        int32 experts and float32 weights, ``[chosen_lanes]``; the first ``num_chosen`` are valid.
    """
    lowest: tl.constexpr = -(2**31)
    size: tl.constexpr = num_experts // num_groups
    group, member = tl.arange(0, group_lanes)[:, None], tl.arange(0, member_lanes)[None, :]
    expert = group * size + member
    mask = (group < num_groups) & (member < size)
    # not from the first-level cache: a program may read this before its gdc_wait()
    values = tl.load(logits + expert, mask=mask, other=-float("inf"), cache_modifier=".cg").to(tl.float32)
    highest = tl.max(values)
    total = tl.sum(tl.exp(values - highest))  # of a softmax
    ranked = values  # scores have the same order
    if has_bias or num_groups > 1:
        ranked = 1.0 / (1.0 + tl.exp(-values)) if is_sigmoid else tl.exp(values - highest) / total
        if has_bias:
            ranked += tl.load(bias + expert, mask=mask, other=0.0)
        ranked = tl.where(mask, ranked, -float("inf"))
    keys = tl.where(mask, _ordered(ranked), lowest)
    if num_groups > 1:
        best = tl.max(ranked, axis=1)
        place = tl.min(tl.where(ranked == best[:, None], member, member_lanes), axis=1)
        second = tl.max(tl.where(member == place[:, None], -float("inf"), ranked), axis=1)
        groups = tl.arange(0, group_lanes)
        group_keys = tl.where(groups < num_groups, _ordered(best + second), lowest)
        is_open = groups < 0
        for _ in tl.static_range(num_chosen_groups):
            chosen = tl.min(tl.where(group_keys == tl.max(group_keys), groups, group_lanes))
            is_open |= groups == chosen
            group_keys = tl.where(groups == chosen, lowest, group_keys)
        keys = tl.where(is_open[:, None], keys, lowest)
    lanes = tl.arange(0, chosen_lanes)
    experts = tl.zeros([chosen_lanes], tl.int32)
    for lane in tl.static_range(num_chosen):
        chosen = tl.min(tl.where(keys == tl.max(keys), expert, num_experts - 1))
        experts = tl.where(lanes == lane, chosen, experts)
        keys = tl.where(expert == chosen, lowest, keys)
    in_row = lanes < num_chosen
    values = tl.load(logits + experts, mask=in_row, other=-float("inf"), cache_modifier=".cg").to(tl.float32)
    weights = 1.0 / (1.0 + tl.exp(-values)) if is_sigmoid else tl.exp(values - highest) / total
    if is_renormalised:
        weights = weights / (tl.sum(weights) + 1e-20)
    return experts, weights * scale


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits, bias, slots, chosen, weights, places, counts, totals, first_expert, num_local, scale,
    num_experts: tl.constexpr, num_chosen: tl.constexpr, chosen_lanes: tl.constexpr, num_groups: tl.constexpr,
    num_chosen_groups: tl.constexpr, group_lanes: tl.constexpr, member_lanes: tl.constexpr, is_sigmoid: tl.constexpr,
    has_bias: tl.constexpr, is_renormalised: tl.constexpr, has_slots: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    is_real = True
    if has_slots:
        is_real = tl.load(slots + token) >= 0
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    experts, shares = choose_of_token(
        logits + token * num_experts, bias, scale, num_experts, num_chosen, chosen_lanes, num_groups,
        num_chosen_groups, group_lanes, member_lanes, is_sigmoid, has_bias, is_renormalised,
    )  # fmt: skip
    lanes = tl.arange(0, chosen_lanes)
    pairs = token * num_chosen + lanes
    in_row = lanes < num_chosen
    local = experts - first_expert
    is_local = in_row & is_real & (local >= 0) & (local < num_local)
    tl.store(chosen + pairs, tl.where(is_local, local, -1), mask=in_row)
    tl.store(weights + pairs, shares.to(weights.dtype.element_ty), mask=in_row)
    tl.atomic_add(totals + experts, 1, mask=in_row & is_real)
    tl.store(places + pairs, tl.atomic_add(counts + local, 1, mask=is_local), mask=is_local)


def choose(
    logits: Tensor,
    bias: Tensor | None,
    experts: Experts,
    local: tuple[int, int],
    slots: Tensor | None,
    totals: Tensor,
    counts: Tensor,
) -> Choice:
    """Compute `hbserve.layers.mixture.plain.choose_experts` of ``logits [tokens, experts]``.

    Args:
        local: first and number of this rank's experts.
        slots: int64 ``[tokens]``, negative for a padded token, which gets no expert; None: no token is padded.
        totals: int64 ``[experts]``; the pairs of each expert of any rank are added.
        counts: int32 ``[local experts]``, zero before; the pairs of each local expert are added.
    """
    num_tokens, num_experts = logits.shape
    shape, device = (num_tokens, experts.num_chosen), logits.device
    chosen, places = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    weights = torch.empty(shape, dtype=logits.dtype, device=device)
    overlap = overlaps(device)
    _choose_kernel[(num_tokens,)](
        logits, logits if bias is None else bias, logits if slots is None else slots, chosen, weights, places,
        counts, totals, *local, experts.scale, *Choosing.of(experts, bias), slots is not None, overlap,
        num_warps=max(1, min(4, triton.next_power_of_2(num_experts) // 256)), launch_pdl=overlap,
    )  # fmt: skip
    return Choice(chosen, weights, places)


@triton.jit
def _cut_kernel(  # type: ignore[no-untyped-def]
    counts, starts, ends, tile_experts, num_tiles, num_experts,
    block: tl.constexpr, tile_rows: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, block)
    mask = experts < num_experts
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    pairs = tl.load(counts + experts, mask=mask, other=0)
    tiles = (pairs + tile_rows - 1) // tile_rows
    first = tl.cumsum(tiles, axis=0) - tiles
    tl.store(starts + experts, first * tile_rows, mask=mask)
    tl.store(ends + experts, first * tile_rows + pairs, mask=mask)
    tl.store(num_tiles, tl.sum(tiles, axis=0))
    tl.store(counts + experts, tl.zeros([block], tl.int32), mask=mask)  # as the next layer needs them
    for tile in range(0, tl.max(tiles, axis=0)):
        tl.store(tile_experts + first + tile, experts, mask=tile < tiles)


@triton.jit
def _sort_kernel(  # type: ignore[no-untyped-def]
    chosen, places, starts, sorted_pairs, num_pairs, block: tl.constexpr, overlap: tl.constexpr
):
    pairs = tl.program_id(0) * block + tl.arange(0, block)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(chosen + pairs, mask=pairs < num_pairs, other=-1)
    is_local = expert >= 0
    place = tl.load(places + pairs, mask=is_local, other=0) + tl.load(starts + expert, mask=is_local, other=0)
    tl.store(sorted_pairs + place, pairs, mask=is_local)


def group_pairs(choice: Choice, counts: Tensor, groups: Groups, starts: Tensor, tile_rows: int) -> None:
    """Fill ``groups``; ``counts`` are what `choose` has counted, and are zero afterwards.

    Args:
        groups, starts: memory of `max_tiles` tiles and ``tile_rows`` times as many rows, and of all local experts.
    """
    overlap = overlaps(counts.device)
    block = triton.next_power_of_2(len(counts))
    _cut_kernel[(1,)](
        counts, starts, groups.ends, groups.tile_experts, groups.num_tiles, len(counts), block, tile_rows, overlap,
        num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    num_pairs = choice.experts.numel()
    _sort_kernel[(triton.cdiv(num_pairs, _BLOCK_PAIRS),)](
        choice.experts, choice.places, starts, groups.pairs, num_pairs, _BLOCK_PAIRS, overlap, launch_pdl=overlap
    )


def max_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """Return the number of tiles that suffices however ``num_pairs`` are spread over ``num_experts``."""
    return min(num_pairs, num_experts + num_pairs // tile_rows)
