"""Makes the tier that ``kv_cache.store`` names."""

from __future__ import annotations

from hbserve.errors import HBServeError, StartupError
from hbserve.import_path import load_class
from hbserve.kv_tiers.base import KVTier, KVTierContext


def make_store(context: KVTierContext) -> KVTier:
    """Make the store of a rank.

    Raises:
        ConfigError: if a user's class cannot be imported.
        StartupError: if the store cannot be made.
    """
    name = context.config.backend
    if name == "mooncake":
        from hbserve.kv_tiers.mooncake import MooncakeTier

        return MooncakeTier(context)
    kind = load_class(name, KVTier, "kv_cache.store.backend")  # type: ignore[type-abstract]
    try:
        return kind(context)  # type: ignore[call-arg]
    except HBServeError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise StartupError(f"kv_cache.store.backend {name}: {type(error).__name__}: {error}") from error
