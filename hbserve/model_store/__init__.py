"""Models that are fetched or converted at their first use, and kept in a cache folder."""

from hbserve.model_store.fetch import fetch_model, name_of, with_model_folder

__all__ = ["fetch_model", "name_of", "with_model_folder"]
