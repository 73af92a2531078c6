"""Cache: what took long to make, found again by what it was made from, and checked before it is used."""

from amoeba_export.cache.store import Cache, CacheUsage, canonical_key

__all__ = ["Cache", "CacheUsage", "canonical_key"]
