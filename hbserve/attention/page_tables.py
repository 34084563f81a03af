"""Block tables without gaps, as attention kernels want them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PageTables:
    """The pages of a batch, on the host.

    Attributes:
        indptr: int32 ``[rows + 1]``, row i's pages are ``indices[indptr[i]:indptr[i + 1]]``.
        last_page_len: int32 ``[rows]``, tokens in the last page.
    """

    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    last_page_len: npt.NDArray[np.int32]

    @staticmethod
    def build(context_lens: npt.NDArray[np.int32], block_tables: npt.NDArray[np.int32], block_size: int) -> PageTables:
        """From context lengths ``[rows]`` and block tables ``[rows, width]``."""
        pages = -(-context_lens // block_size)
        indptr = np.zeros(len(pages) + 1, np.int32)
        np.cumsum(pages, out=indptr[1:])
        indices = block_tables[np.arange(block_tables.shape[1]) < pages[:, None]]
        return PageTables(indptr, indices, (context_lens - (pages - 1) * block_size).astype(np.int32))
