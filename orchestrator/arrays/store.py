"""How an attempt's OCDBT stores are opened: what writing and reading share."""

from __future__ import annotations

from typing import Any

import tensorstore as ts

from orchestrator.records import Foreign


def store_spec(base: str) -> dict[str, Any]:
    """The OCDBT store at URL `base`."""
    return {"driver": "ocdbt", "base": base.rstrip("/") + "/", "cache_pool": "cache_pool#ocdbt"}


def foreign_spec(directory: str, foreign: Foreign) -> dict[str, Any]:
    """An array that Orbax has written; `directory`: URL of its item."""
    if foreign.ocdbt:
        store = {**store_spec(directory), "path": foreign.name + "/"}
    else:
        path = directory.removeprefix("file://").rstrip("/")
        store = {"driver": "file", "path": f"{path}/{foreign.name}/"}
    return {"driver": foreign.driver, "kvstore": store}


def context() -> ts.Context:
    """Bounded: B-tree nodes cached, files and requests in flight, and tries of a request to an object store.

    Those give up after about half a minute without an answer, so that a store that is down fails the save.
    """
    return ts.Context(
        {
            "cache_pool#ocdbt": {"total_bytes_limit": 64 << 20},
            "file_io_concurrency": {"limit": 32},
            "gcs_request_concurrency": {"limit": 32},
            "gcs_request_retries": {"max_retries": 9, "initial_delay": "100ms", "max_delay": "8s"},
        }
    )
