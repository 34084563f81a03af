"""Counter-based random numbers: noise that depends on seed, position and token, not on worker, batch or time.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with MurmurHash3's 32-bit
finaliser (Appleby) as the mixing function.
"""

from __future__ import annotations

import torch

from hbserve.platform.cuda_driver import has_triton

_MASK = 0xFFFFFFFF
# MurmurHash3's multipliers minus 2^32: the product with a 32-bit number stays inside int64, and its low 32 bits are
# the same.
_MULTIPLIER_1 = 0x85EBCA6B - (1 << 32)
_MULTIPLIER_2 = 0xC2B2AE35 - (1 << 32)
_SALTS = (0x9E3779B9, 0x7F4A7C15)
_MAX_BELOW_ONE = 1 - 2.0**-24


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return standard Gumbel noise, a function of seed, position and token id alone; finite.

    Args:
        seeds: int64 ``[rows]``.
        positions: int64 ``[rows]``, of the token that is sampled.

    Returns:
        float32 ``[rows, vocab_size]``. The upper tail, which decides the draw, is resolved to 2^-32.
    """
    if has_triton(seeds.device):
        from hbserve.engine.fast_sampler import fast_noise

        return fast_noise(seeds, positions, vocab_size)
    first, second = (_key(seeds, positions, salt)[:, None] for salt in _SALTS)
    token_ids = torch.arange(vocab_size, device=seeds.device)
    bits = _mix(_mix(token_ids ^ first) ^ second)
    # -log(1 - u) is exponential, and precise where u is small: there the noise is large
    uniform = bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=_MAX_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _key(seeds: torch.Tensor, positions: torch.Tensor, salt: int) -> torch.Tensor:
    """Return 32 bits of seed and position; two salts give 64."""
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    bits = _mix(low ^ salt)
    bits = _mix((bits + high) & _MASK)
    return _mix((bits + positions) & _MASK)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Apply MurmurHash3's finaliser to int64 numbers below 2^32: an input bit flips an output bit half the time."""
    bits = bits ^ (bits >> 16)
    bits.mul_(_MULTIPLIER_1).bitwise_and_(_MASK)
    bits ^= bits >> 13
    bits.mul_(_MULTIPLIER_2).bitwise_and_(_MASK)
    bits ^= bits >> 16
    return bits
