"""A linear layer, whatever its weights are kept in: the seam between the forward pass and weight schemes.

A scheme is a subclass of `Linear` with its parameters, and computes in plain torch. A GPU's kernels for it are a
`LinearKernels`, which `hbserve.layers.fused_ops.FusedOps` looks up by the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(ABC):
    """A layer ``x @ weight.T + bias``.

    Attributes:
        num_outputs, num_weights: rows and elements of the weight.
        bias: ``[outputs]`` or None.
        dtype: dtype of inputs and outputs.
    """

    num_outputs: int
    num_weights: int
    bias: Tensor | None
    dtype: torch.dtype

    @abstractmethod
    def __call__(self, x: Tensor, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        """Compute ``[rows, outputs]`` of ``x [rows, inputs]``.

        Args:
            out: contiguous memory for the result; only without bias.
            has_bias: whether the bias is added, if there is one.
        """


class PlainLinear(Linear):
    """A layer whose weight ``[outputs, inputs]`` is in the dtype of its inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.num_outputs, self.num_weights, self.dtype = weight.shape[0], weight.numel(), weight.dtype

    def __call__(self, x: Tensor, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        bias = self.bias if has_bias else None
        if out is None:
            return F.linear(x, self.weight, bias)
        assert bias is None, "a product into given memory has no bias"
        return torch.mm(x, self.weight.t(), out=out)


class Rows(Protocol):
    """Inputs ``[rows, inputs]`` of a layer: a tensor, or rows in the form of the layer's scheme."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Return a view of some rows."""


class LinearKernels(Protocol):
    """Kernels of a GPU for one scheme. ``layer`` is of its class; ``rows`` are plain or as that layer reads them."""

    def one_row(
        self,
        layer: Any,
        x: Tensor,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        is_gated: bool = False,
        out: Tensor | None = None,
        has_bias: bool = True,
    ) -> Tensor:
        """Compute the layer on a single row; see `hbserve.layers.one_row.one_row`."""

    def rows_kernel(self, layer: Any, num_rows: int) -> Callable[..., Tensor] | None:
        """Return the kernel that computes so few rows with a norm before, and a gate or sum after; None: too many.

        Its arguments are those of `one_row`.
        """

    def many_rows(self, layer: Any, rows: Rows, out: Tensor | None = None, *, has_bias: bool = True) -> Tensor:
        """Compute the layer; see `Linear.__call__`."""

    def norm(self, layer: Any, pending: Tensor | None, total: Tensor, weight: Tensor, eps: float) -> Rows:
        """Add ``pending`` to ``total`` in place, if given, and return the RMS norm of ``total``."""

    def gate(self, layer: Any, gate_up: Tensor, out: Rows | None) -> Rows:
        """Return ``silu(gate) * up`` of ``[rows, gate | up]``, in ``out`` if given."""

    def memory(self, layer: Any, num_rows: int, num_inputs: int) -> Rows:
        """Allocate rows."""
