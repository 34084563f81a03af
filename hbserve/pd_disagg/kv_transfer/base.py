"""Where users find the base class of transfer backends; it lives in `hbserve.kv_transfer`."""

from hbserve.kv_transfer.base import KVTransferBase, KVTransferContext

__all__ = ["KVTransferBase", "KVTransferContext"]
