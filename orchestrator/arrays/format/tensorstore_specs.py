"""How an attempt's OCDBT stores are opened: what writing and reading share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import tensorstore as ts

from orchestrator import environment
from orchestrator.errors import OrchestratorError, Suspect, Unavailable
from orchestrator.observe.events import Retried, emit
from orchestrator.rules.records import ExternalArray
from orchestrator.storage import local_path
from orchestrator.storage.directory import alias, find, storage_error

FAILURES = (ValueError, OSError, NotImplementedError)  # as which TensorStore's statuses arrive


def files_spec(base: str) -> dict[str, Any]:
    """The files below URL `base`, as keys. Never as a URL: TensorStore decodes `%41` in one, and cuts it at `?`, `#`
    and `|`, all of which may stand in a directory's name. A backslash it takes for a slash even in a path."""
    where = base.rstrip("/") + "/"
    path = local_path(where)
    if path is not None:
        return {"driver": "file", "path": path if "\\" not in path else alias(path)}
    from orchestrator.arrays.format import buckets

    return buckets.files_spec(where)


def stamp(base: str) -> object:
    """What is below URL `base` is to be opened again when this changes. Raises Unavailable."""
    if local_path(base) is not None:
        return None
    from orchestrator.arrays.format import buckets

    return buckets.stamp()


def described(base: str, error: Exception) -> str:
    """TensorStore's error of a read below URL `base`, as one line for people."""
    if local_path(base) is not None:
        return str(error)
    from orchestrator.arrays.format import buckets

    return buckets.described(error)


def store_spec(base: str) -> dict[str, Any]:
    """The OCDBT store at URL `base`."""
    return {"driver": "ocdbt", "base": files_spec(base), "cache_pool": "cache_pool#ocdbt"}


def external_spec(directory: str, external: ExternalArray) -> dict[str, Any]:
    """An array that Orbax has written; `directory`: URL of its item."""
    if external.ocdbt:
        store = {**store_spec(directory), "path": external.name + "/"}
    else:
        store = files_spec(f"{directory.rstrip('/')}/{external.name}")
    return {"driver": external.driver, "kvstore": store}


def inspect(base: str) -> None:
    """What TensorStore is to read below URL `base` are plain files, all of it. Raises Unavailable, naming what is not:
    TensorStore would follow links out of the run, and wait for ever at a pipe."""
    path = local_path(base)
    if path is not None:
        root, key = find(path)
        try:
            root.inspect(key)
        except (FileNotFoundError, NotADirectoryError):
            return  # whoever opens it reports that
        except OSError as error:
            raise storage_error("read", root.shown(key), error) from error


_RETRY = {"max_retries": 9, "initial_delay": "100ms", "max_delay": "8s"}


# TensorStore's statuses that may come from what is stored. The store is asked again in another way then: neither these
# nor any other status (credentials, certificates, a proxy's opinion) are proof of damage.
_SUSPICIOUS = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
_TRIED_LONG = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")  # TensorStore's own retries are over


def fault(text: str, error: Exception, keys: Sequence[str] = ()) -> OrchestratorError:
    """What a read that TensorStore has failed means."""
    if str(error).startswith(_SUSPICIOUS):
        return Suspect(text, chunks=keys)
    return Unavailable(text, waited=str(error).startswith(_TRIED_LONG))


@functools.cache
def shared_context() -> ts.Context:
    """One `context` for all files that this process writes to object stores: its limits hold for them together."""
    return context()


def context() -> ts.Context:
    """Bounded: B-tree nodes cached, files and requests in flight, and tries of a request to an object store.

    Those give up after about half a minute without an answer, so that a store that is down fails the save.
    """
    payer = environment.gcs_user_project()
    return ts.Context(
        {
            **({"gcs_user_project": {"project_id": payer}} if payer else {}),
            "cache_pool#ocdbt": {"total_bytes_limit": 64 << 20},
            "file_io_concurrency": {"limit": 32},
            "gcs_request_concurrency": {"limit": 32},
            "gcs_request_retries": _RETRY,
            "http_request_concurrency": {"limit": 32},
            "http_request_retries": _RETRY,
        }
    )


_RETRIES = "/tensorstore/kvstore/gcs/retries"
_reporting = threading.Lock()
_reported = 0


def report_retries(directory: str) -> None:
    """Emit an event if TensorStore has repeated requests since the last report. How many is all that it reports."""
    global _reported
    if not directory.startswith("gs://"):
        return
    found = ts.experimental_collect_matching_metrics(_RETRIES)
    total = sum(int(value["value"]) for metric in found for value in metric["values"])
    with _reporting:
        fresh, _reported = total - _reported, total
    if fresh > 0:
        emit(Retried("store", fresh, "arrays", directory, "counted by TensorStore"))
