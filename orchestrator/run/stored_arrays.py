"""Reading the arrays of a committed step, so that what cannot be read is never called damaged.

What the data plane finds wrong is a suspicion (`Suspect`). `StoredStep.judge` makes a verdict of it, by asking the
store again in another way: `Damaged`, `StepRetired`, or nothing; then the arrays are read again, and in the end it is
`Unavailable`. Functions belong to the thread that the step belongs to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from orchestrator import arrays
from orchestrator.arrays import ReadRequest, fingerprint
from orchestrator.errors import Damaged, StorageError, Suspect, Unavailable
from orchestrator.observe.events import Retried, emit
from orchestrator.rules import chunk_index, keys
from orchestrator.rules.records import Box, LeafSpec
from orchestrator.rules.restore_sources import STORE
from orchestrator.run.checked_reads import READS
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import local_path
from orchestrator.storage.sources import Sources

_PAUSE_S = 0.5  # before what could not be read is read again
_SLAB_BYTES = 64 << 20  # of an array that is read to be compared

OnBytes = Callable[[int], None]
Value = TypeVar("Value")


def load(
    step: StoredStep,
    requests: Sequence[ReadRequest],
    on_bytes: OnBytes | None = None,
    reader: Callable[..., list[Any]] = arrays.load,
) -> list[Any]:
    """As `arrays.load`, of this step."""
    places = {"places": found} if (found := _places(step)) else {}
    stored = chunk_index.stored(step.manifest)
    return _again(step, lambda: reader(step.state_url, requests, on_bytes, stored, **places))


def sources(step: StoredStep, read_bytes: int) -> dict[str, int]:
    """How many of the `read_bytes` that were read of its arrays came from where: "memory", "peers", "store"."""
    if isinstance(step.storage, Sources):
        return step.storage.read_bytes(read_bytes, step.id.state_prefix)
    return {STORE: read_bytes}


def _places(step: StoredStep) -> arrays.Places | None:
    """Where its arrays are, if that is not one place."""
    if not isinstance(step.storage, Sources):
        return None
    return arrays.Places(step.storage, step.id.state_prefix, lambda path: step.file(keys.STATE + path))


def slabs(
    step: StoredStep, leaves: Iterable[LeafSpec], slab_bytes: int, on_bytes: OnBytes | None = None
) -> Iterator[tuple[LeafSpec, Box, Any]]:
    """As `arrays.slabs`, of this step. What is read wrongly is judged, but not read again."""
    try:
        yield from arrays.slabs(step.state_url, leaves, slab_bytes, on_bytes, chunk_index.stored(step.manifest))
    except Suspect as suspect:
        step.judge_suspect(suspect)
        raise _not_damaged(suspect, 1) from suspect


def bad_chunks(
    step: StoredStep, sizes: Mapping[str, int | None], on_bytes: OnBytes = lambda read_bytes: None
) -> Mapping[str, str]:
    """Read these chunks, of these sizes where they are known. By key: what is wrong with each that is proven not to
    be what was saved."""
    stored = chunk_index.stored(step.manifest)
    suspects = _again(step, lambda: arrays.check(step.state_url, stored, on_bytes, sizes))
    if not suspects:
        return {}
    proven = {key: f"{text}; {why}" for key, text in suspects.items() if (why := step.chunk_problem(key, sizes[key]))}
    for key, text in suspects.items():
        if key not in proven and arrays.check(step.state_url, stored, sizes={key: sizes[key]}):
            raise _not_damaged(Suspect(text), 2)
    return proven


def wrong_fingerprints(step: StoredStep, names: Iterable[str]) -> list[str]:
    """Of these leaves, those whose stored elements do not have the fingerprint of the save, one line each."""
    known = step.manifest.fingerprints
    chosen = known.keys() & set(names)
    found = []
    for leaf in step.intent.tree.leaves:
        if leaf.name in chosen:
            pieces = ((box, data) for _, box, data in slabs(step, [leaf], _SLAB_BYTES))
            got = fingerprint.of_pieces(leaf, pieces)
            if got != known[leaf.name]:
                found.append(f"{leaf.label}: its stored elements have fingerprint {got}, the save {known[leaf.name]}")
    return found


def judge_fingerprints(step: StoredStep, names: Sequence[str], text: str) -> NoReturn:
    """These leaves have come up with other fingerprints (`text`), though every checksum was right: either something
    else was saved, or it was changed on its way to the devices. Raises Damaged or Unavailable."""
    wrong = wrong_fingerprints(step, names)
    if wrong:
        raise Damaged(f"{step.where}: {text}; {wrong[0]}")
    raise Unavailable(
        f"{step.where}: {text}; but what is stored has the fingerprints of the save: a device, the memory or the "
        "restore of this job changes data; the step is not damaged",
        waited=True,
    )


def _again(step: StoredStep, read: Callable[[], Value]) -> Value:
    """What `read` returns. What it suspects is judged, and what it could not read is tried again, READS times."""
    for tries in range(1, READS + 1):
        pause_s = _PAUSE_S
        try:
            return read()
        except Suspect as suspect:
            step.judge_suspect(suspect)
            # On a file system it was read from the very files that were measured; of an object store, who knows.
            if suspect.structure and tries == READS and local_path(step.state_url) is not None:
                step.check_live()
                raise Damaged(
                    f"{suspect}; read so {READS} times, and its files are the manifest's: no save writes this"
                ) from suspect
            failed: Exception = suspect
            pause_s = 0.0  # the store has just answered
        except StorageError as error:
            if tries == READS or (isinstance(error, Unavailable) and error.waited):
                step.check_live()
                raise
            failed = error
        emit(Retried("read", tries, "restore", step.where, str(failed)[:300], pause_s))
        time.sleep(pause_s)
    raise _not_damaged(failed, READS) from failed


def _not_damaged(error: Exception, times: int) -> Unavailable:
    count = "once" if times == 1 else f"{times} times"
    return Unavailable(
        f"{error}; read so {count}, but by the store's own account all is as the manifest says: the step is not "
        "damaged; look at the network, the caches and the memory of this host"
    )
