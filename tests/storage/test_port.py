"""What stands beside the methods of the storage port."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.rules import codec
from orchestrator.storage import local_path, open_storage, port

GETS = ("memory", "posix", "gcs", "read_only", "peer")


@pytest.mark.parametrize(
    ("root", "path"),
    [
        ("file:///data/run", "/data/run"),
        ("file:///data/a://b", "/data/a://b"),
        ("file:///data/100%25", "/data/100%25"),  # never decoded: what stands there is the directory's name
        ("/data/run", "/data/run"),
        ("run", "run"),
        ("gs://bucket/run", None),
        ("memory://", None),
    ],
)
def test_a_root_is_local_or_in_an_object_store(root: str, path: str | None) -> None:
    assert local_path(root) == path


def test_what_a_store_on_a_file_system_calls_itself_is_local(tmp_path: Path) -> None:
    assert local_path(open_storage(tmp_path).url) == str(tmp_path)


def test_the_port_has_six_methods() -> None:
    """Three to read and three to write: a seventh is a sign that it does a caller's work."""
    methods = {name for kind in (port.Reads, port.Storage) for name in vars(kind) if not name.startswith("_")}
    assert methods == {"get", "list", "measure", "create", "delete", "make_durable"}


@pytest.mark.parametrize("adapter", GETS)
def test_no_store_reads_more_at_once_than_a_record_may_have(adapter: str) -> None:
    module = __import__(f"orchestrator.storage.{adapter}", fromlist=["x"])
    assert module.RECORD_BYTES_MAX is codec.RECORD_BYTES_MAX
