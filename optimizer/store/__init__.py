"""The store: variants, what was measured of them, and how studies went, kept for all studies.

Facts are only added, never changed, in SQLite or PostgreSQL; artifacts lie in a folder, by
content. It knows no technique and no engine.
"""

from optimizer.store.facts import (
    Key,
    Look,
    StoredVariant,
    TrialLoggedOtherwise,
    machine_fingerprint,
)
from optimizer.store.location import DEFAULT_PATH, StoreInvalid, without_password
from optimizer.store.store import Store

__all__ = [
    "DEFAULT_PATH",
    "Key",
    "Look",
    "Store",
    "StoreInvalid",
    "StoredVariant",
    "TrialLoggedOtherwise",
    "machine_fingerprint",
    "without_password",
]
