"""Embeddings by id on disk: written once, mapped by many, looked up in a microsecond."""

from lapilli.store.compaction import compact
from lapilli.store.manifest import Stamp
from lapilli.store.reader import Store, StoreInfo
from lapilli.store.snapshot import text_hash
from lapilli.store.writer import StoreWriter

__all__ = ["Stamp", "Store", "StoreInfo", "StoreWriter", "compact", "text_hash"]
