"""Where users find the base class of transfer backends; transfers live in `hbserve.kv_transfer`."""
