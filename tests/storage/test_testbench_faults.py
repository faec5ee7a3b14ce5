"""Our requests under the faults of Google's storage-testbench, which clients of Cloud Storage are tested with: each
instruction is met by an operation, and the right thing comes of it. `make test-gcs-servers` runs these."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.storage import Created
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_http import Client, Reply
from tests.support.gcs import SERVER, new_root, server

if not os.environ.get(SERVER) or server().ask("GET", "/retry_tests")[0] != 200:
    pytest.skip(f"{SERVER} is not Google's storage-testbench; see `make test-gcs-servers`", allow_module_level=True)

BODY = os.urandom(1 << 20)


class Marked(Client):
    """Every request belongs to the retry test `told`, if there is one."""

    told = ""

    def send(self, *arguments: Any, headers: Mapping[str, str] | None = None, **more: Any) -> Reply:
        marked = {"x-retry-test-id": self.told} if self.told else {}
        return super().send(*arguments, headers={**(headers or {}), **marked}, **more)


def ask(method: str, path: str, value: object = None) -> dict[str, Any]:
    body = None if value is None else json.dumps(value).encode()
    status, _, reply = server().ask(method, path, body, Content_Type="application/json")
    assert status == 200, reply
    return dict(json.loads(reply))


OPERATIONS: dict[str, tuple[str, Callable[[GcsStorage], object], Callable[[object], bool]]] = {
    "create": ("insert", lambda store: store.create("new", BODY), lambda got: got == Created()),
    "get": ("get", lambda store: store.get("there"), lambda got: got == BODY),
    "measure": ("get", lambda store: store.measure("there"), lambda got: getattr(got, "bytes", 0) == len(BODY)),
    "list": ("list", lambda store: [one.key for one in store.list("")], lambda got: got == ["there"]),
    "delete": ("delete", lambda store: store.delete("there"), lambda got: got is True),
}
PASSING = [
    *(["return-408"], ["return-429"], ["return-500"], ["return-502"], ["return-503"], ["return-504"]),
    *(["return-reset-connection"], ["return-503", "return-429", "return-reset-connection", "return-504"]),
]
OF_BYTES = [
    ("get", ["return-broken-stream"]),
    ("get", ["return-broken-stream-after-256K"]),
    ("get", ["stall-for-1s-after-128K"]),
    ("create", ["return-503-after-256K"]),
    ("create", ["return-504-after-512K", "return-503"]),
]
FINAL = [["return-400"], ["return-401"], ["return-403"]]


@pytest.fixture
def store() -> GcsStorage:
    root = new_root()
    made = GcsStorage(root, Marked(deadline_s=20, first_wait_s=0.01))
    assert made.create("there", BODY) == Created()
    return made


def met(store: GcsStorage, operation: str, instructions: list[str]) -> Callable[[], object]:
    """The operation, all of whose requests belong to a retry test of these instructions."""
    method, call, _ = OPERATIONS[operation]
    made = ask("POST", "/retry_test", {"instructions": {f"storage.objects.{method}": instructions}})
    assert isinstance(store._client, Marked)
    store._client.told = made["id"]
    return partial(call, store)


@pytest.mark.parametrize(
    ("operation", "instructions"),
    [*((operation, instructions) for operation in OPERATIONS for instructions in PASSING), *OF_BYTES],
    ids=str,
)
def test_what_passes_is_tried_again_and_comes_right(store: GcsStorage, operation: str, instructions: list[str]) -> None:
    call = met(store, operation, instructions)
    before = store._client.retries.total()
    assert OPERATIONS[operation][2](call())
    assert ask("GET", f"/retry_test/{store._client.told}")["completed"]  # type: ignore[attr-defined]
    retried = store._client.retries.total() - before
    assert retried == (0 if instructions[0].startswith("stall") else len(instructions))


@pytest.mark.parametrize(
    ("operation", "instructions"), [(operation, one) for operation in OPERATIONS for one in FINAL], ids=str
)
def test_what_is_final_is_an_error_at_once(store: GcsStorage, operation: str, instructions: list[str]) -> None:
    call = met(store, operation, instructions)
    with pytest.raises(StorageError, match=f"HTTP {instructions[0].removeprefix('return-')}"):
        call()
    assert store._client.retries.total() <= (instructions == ["return-401"])  # a credential may be renewed once
