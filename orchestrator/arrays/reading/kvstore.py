"""What lies below one directory, read through TensorStore's key-value stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorstore as ts

from orchestrator import environment
from orchestrator.arrays.format.tensorstore_specs import (
    FAILURES,
    context,
    described,
    fault,
    files_spec,
    inspect,
    stamp,
    store_spec,
)
from orchestrator.errors import Unavailable
from orchestrator.observe.events import Retried, emit
from orchestrator.rules.chunk_index import Location

_REPORT_S = 10.0  # an event this often while a store does not answer


class KvStore:
    """The directory at a URL. Nothing is opened before it is used. `begin_*` return a future for `result`; they do not
    wait for the value, but may wait for the store to be opened. Main thread, `object` any."""

    def __init__(self, directory: str) -> None:
        self.context = context()
        self._directory = directory
        self._is_inspected = False
        self._stores: dict[object, tuple[Any, object]] = {}  # by spec: opened, and with whose token

    def begin(self, key: str) -> Any:
        """A value of the array store by its key, which TensorStore looks up."""
        return self._opened(store_spec).read(key)

    def begin_place(self, place: Location) -> Any:
        """A part of a file."""
        path, offset, size = place
        return self._opened(files_spec).read(path, byte_range=slice(offset, offset + size))

    def object(self, path: str) -> bytes | None:
        """A file's bytes, None if there is none. Raises Suspect, Unavailable."""
        result = self.result(f"{self._directory}/{path}", self._opened(files_spec).read(path))
        return bytes(result.value) if result.state == "value" else None

    def keys(self) -> Iterable[str]:
        """Of the array store. Raises Suspect, Unavailable."""
        found = self.result("the tree", self._opened(store_spec).list())
        return (key.decode(errors="replace") for key in found)

    def inspect(self) -> None:
        """To be called before TensorStore opens anything below the directory. Raises Unavailable."""
        if not self._is_inspected:
            inspect(self._directory)
            self._is_inspected = True

    def result(self, label: str, future: Any, keys: Sequence[str] = ()) -> Any:
        """What a future of TensorStore's has. Raises Suspect (of the chunks `keys`) where that may come from what is
        stored, else Unavailable; both begin with `label`."""
        try:
            return self._awaited(future, label)
        except FAILURES as error:
            text = f"{label}: cannot be read from {self._directory}: {described(self._directory, error)}"
            raise fault(text, error, keys) from error

    def _opened(self, spec: Callable[[str], dict[str, Any]]) -> Any:
        """The directory as TensorStore opens it by `spec`; again once another token is due."""
        opened_as = stamp(self._directory)
        store, before = self._stores.get(spec, (None, None))
        if store is None or before is not opened_as:
            self.inspect()
            try:
                store = self._awaited(ts.KvStore.open(spec(self._directory), context=self.context), self._directory)
            except FAILURES as error:
                text = f"{self._directory}: cannot be opened: {described(self._directory, error)}"
                raise fault(text, error) from error
            self._stores[spec] = store, opened_as
        return store

    def _awaited(self, future: Any, label: str) -> Any:
        """The result, within the deadline of an operation on a store; an event now and then meanwhile."""
        deadline_s = environment.store_deadline_s()
        waited_s = 0.0
        while True:
            try:
                return future.result(timeout=min(_REPORT_S, deadline_s - waited_s))
            except TimeoutError:
                waited_s += _REPORT_S
            if waited_s >= deadline_s:
                future.cancel()
                text = f"{label}: {self._directory} did not answer within {deadline_s:g} s"
                raise Unavailable(f"{text} ({environment.STORE_DEADLINE})", waited=True) from None
            emit(Retried("store", 1, "read", f"{self._directory} {label}", f"no answer for {waited_s:g} s", 0.0))
