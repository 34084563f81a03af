"""Weight schemes of linear layers: which parameters a matrix has in the arena, and the layer that computes with them.

| parameters of a matrix ``m`` | scheme |
|---|---|
| ``m`` | `PlainLinear` |
| ``m`` (FP8), ``m_scale``, and ``m_input_scale`` where inputs have static scales | `Fp8Linear` |

Another scheme is another row here, a module beside `hbserve.models.fp8_weights` and a subclass of `Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hbserve.layers.fp8 import Fp8Linear
from hbserve.layers.linear import Linear, PlainLinear
from hbserve.models.checkpoint_part import CheckpointPart, Parameter
from hbserve.models.fp8_weights import fp8_parameters
from hbserve.weight_format import Fp8Format


def matrix_parameters(
    weight_format: Fp8Format | None, name: str, parts: tuple[CheckpointPart, ...]
) -> Iterator[Parameter]:
    """Yield the parameters of a stacked matrix.

    Args:
        parts: the unquantised weights that it would be stacked from.

    Raises:
        ModelError: only some of them are quantised, or their shares cut through blocks.
    """
    if weight_format is None:
        yield name, parts
    else:
        yield from fp8_parameters(weight_format, name, parts)


def make_linear(
    tensors: dict[str, Tensor], name: str, dtype: torch.dtype, weight_format: Fp8Format | None = None
) -> Linear:
    """Make the layer of a matrix, and take its parameters out of ``tensors``.

    Args:
        dtype: of inputs and outputs.
        weight_format: of the model's matrices, as it is given to `matrix_parameters`.
    """
    weight, bias = tensors.pop(name), tensors.pop(f"{name}_bias", None)
    scale = tensors.pop(f"{name}_scale", None)
    if scale is None:
        return PlainLinear(weight, bias)
    max_input = None if weight_format is None else weight_format.max_input
    return Fp8Linear(weight, scale, bias, tensors.pop(f"{name}_input_scale", None), dtype, max_input)
