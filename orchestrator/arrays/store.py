"""How an attempt's OCDBT stores are opened: what writing and reading share."""

from __future__ import annotations

from typing import Any

import tensorstore as ts


def store_spec(base: str) -> dict[str, Any]:
    """The OCDBT store at URL `base`."""
    return {"driver": "ocdbt", "base": base.rstrip("/") + "/", "cache_pool": "cache_pool#ocdbt"}


def context() -> ts.Context:
    """Bounded: B-tree nodes cached, files in flight."""
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 64 << 20}, "file_io_concurrency": {"limit": 32}})
