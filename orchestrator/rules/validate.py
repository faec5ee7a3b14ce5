"""What may be in a stored record, field by field, with bounds. Pure; does not know where a record was found.

A checksum proves that a record is unchanged, not that its writer was honest. Users of a record rely on these checks:
numbers fit in 64 bits, sizes are no larger than the stored bytes allow, names are unique and plain, and records that
describe one another agree. `codec` calls `check` for whatever is decoded, and again before anything is
written. Bounds are far above what a job can have; docs/reference/on-disk-format.md lists them.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from orchestrator.rules import holders, keys, zarr_chunks
from orchestrator.rules.arguments import STEP_MAX
from orchestrator.rules.attempt_id import parse_name
from orchestrator.rules.dtypes import ITEM_BYTES, STORED_AS
from orchestrator.rules.kept import kept
from orchestrator.rules.leaf_sums import sums
from orchestrator.rules.placement import Placement
from orchestrator.rules.records import (
    Box,
    ExternalArray,
    Extra,
    Failure,
    FileEntry,
    GroupReceipt,
    Head,
    Intent,
    JournalEvent,
    LeafSpec,
    LiveStep,
    Manifest,
    Receipt,
    Record,
    RetiredAttempt,
)

INT64_MAX = 2**63 - 1
RANK_MAX = 64  # numpy's
PROCESSES_MAX = 1_000_000
DEPTH_MAX = 512  # of a path in a tree, and of JSON in JSON
NAME_BYTES_MAX = 1 << 13
TEXT_CHARS_MAX = SHARDING_CHARS_MAX = 1 << 12
REASON_CHARS_MAX = 1 << 20
INT_DIGITS_MAX = 4300  # Python's default limit
TIME_MAX_S = 250_000_000_000  # the year 9892: what dates can be made of
SECONDS_MAX = 1e12
ZSTD_RATIO_MAX = 1 << 16  # decoded over stored bytes, rounded up: a block of 128 KiB takes at least 4 bytes
NOT_FINITE = frozenset(("NaN", "Infinity", "-Infinity"))  # a metric that JSON has no number for
TRUSTS = frozenset(("committed", "verified", "restored", "quarantined"))
_DRIVERS = frozenset(("zarr", "zarr3"))
_CONTAINERS = frozenset(("dict", "list", "tuple"))
_HEX = "0123456789abcdef"  # of a text of nothing else, `strip` leaves nothing
_INT = re.compile(r"-?[0-9]+", re.ASCII)
_KEY_DTYPE = re.compile(r"key<[^<>]+>")


class Invalid(ValueError):
    """A record holds what our writers never write."""


def check(record: Record) -> None:
    """Raises Invalid naming the field of a record that may not be used, UnsafeKey for one with a key that leaves its
    attempt."""
    _RULES[type(record)](record)


def fits(intent: Intent, manifest: Manifest) -> None:
    """Whether the arrays of a committed attempt can be what its files hold, before memory is taken for them. Raises
    Invalid naming the leaf."""
    _same("process_count", intent.process_count, manifest.process_count)
    stored_bytes = sum(entry.bytes for entry in manifest.files if entry.path.startswith(keys.STATE))
    names = {entry.path for entry in manifest.files}
    found = sums(intent.tree.leaves)
    for leaf, size in found.not_cut:
        if size > ZSTD_RATIO_MAX * stored_bytes:
            raise Invalid(f"{leaf.label}: {size} bytes, out of {stored_bytes} that the manifest lists below state/")
        if leaf.external:
            _has_files(leaf, leaf.external, names)
    if found.ours is not None and keys.STATE + keys.STORE not in names:
        raise Invalid(f"{found.ours.label}: is in an array store, and the manifest lists none")
    count, values = found.chunks, found.values
    if found.raw_bytes > stored_bytes:
        raise Invalid(f"arrays of {found.raw_bytes} bytes, of {stored_bytes} that the manifest lists below state/")
    most = INT64_MAX if found.not_cut else count + values  # else their number is not known
    if manifest.chunks and not count <= len(manifest.chunks) <= most:
        raise Invalid(f"arrays of {count} chunks, and {values} numbers; the manifest has {len(manifest.chunks)} chunks")


def name_problem(leaf: LeafSpec) -> str:
    """'' if a leaf's name can be a key in an array store, else what is wrong."""
    if len(leaf.path) > DEPTH_MAX:
        return f"{_brief(leaf.path[:3])}...: a path of {len(leaf.path)} names, expected at most {DEPTH_MAX}"
    try:
        size = len(leaf.name.encode())
    except UnicodeEncodeError as error:
        return f"{leaf.name!r:.200}: {error.reason}; rename it"
    return "" if size <= NAME_BYTES_MAX else f"{_brief(leaf.name)}: {size} bytes, expected at most {NAME_BYTES_MAX}"


def name_clash(leaves: Sequence[LeafSpec]) -> str:
    """'' if each leaf has a place of its own in the array store and in the tree, else what is wrong. Orbax joins a path
    with dots and TensorStore appends `/zarr.json`: names must stay apart under both."""
    seen: dict[str, LeafSpec] = {}
    for leaf in leaves:
        other = seen.setdefault(leaf.name, leaf)
        if other is not leaf:
            return f"{leaf.label} and {other.label} would both be stored as {leaf.name!r}; rename one"
    for name, leaf in seen.items():
        while "/" in name:
            name = name.rpartition("/")[0]
            if above := seen.get(name):
                return f"{leaf.label} would be stored inside {above.label}; rename one"
    paths, inner = {leaf.path for leaf in leaves}, set[tuple[str, ...]]()
    for path in paths:
        while path and (path := path[:-1]) not in inner:
            inner.add(path)
    both = next(iter(paths & inner), None)
    return "" if both is None else f"{'/'.join(both) or '(root)'} is a leaf, and has leaves below it; rename one"


# One rule for each kind of record.


def _head(head: Head) -> None:
    _text("writer", head.writer)
    _whole("version", head.version, 0, keys.VERSION_MAX)
    _whole("epoch", head.epoch, 0, INT64_MAX)
    _time("time", head.time)
    _event(head.event)
    for live in (*head.live, *head.aside):
        _live(live)
    for gone in head.retired:
        _step_and_attempt(gone)
    _unique("live", "step", [live.step for live in head.live])
    retired = {gone.id for gone in head.retired}
    both = next((live for live in (*head.live, *head.aside) if live.id in retired), None)
    if both:
        raise Invalid(f"{both.id.label} is in `live` and in `retired`, expected in one of them")


def _event(event: JournalEvent) -> None:
    _text("event.kind", event.kind)
    _text("event.reason", event.reason, REASON_CHARS_MAX)
    for step in (*event.steps, *(() if event.step is None else (event.step,))):
        _whole("event.steps", step, 0, STEP_MAX)
    if event.attempt is not None:
        parse_name(event.attempt)
    for failure in event.failures:
        _failure("event.failures", failure)


def _live(live: LiveStep) -> None:
    _step_and_attempt(live)
    for pin in live.pins:
        _text("pins", pin)
    _crc("manifest_crc32c", live.manifest_crc32c)
    _whole("bytes", live.bytes, 0, INT64_MAX)
    _time("time", live.time)
    _metrics(live.stored_metrics)
    if live.trust not in TRUSTS:
        raise Invalid(f"step {live.step}: trust is {_brief(live.trust)}, expected one of {sorted(TRUSTS)}")

    if live.quarantine:
        _time("quarantine.time", live.quarantine.time)
        _text("quarantine.reason", live.quarantine.reason, REASON_CHARS_MAX)
        if live.quarantine.trust not in TRUSTS:
            raise Invalid(f"step {live.step}: quarantine.trust is {_brief(live.quarantine.trust)}")


def _intent(intent: Intent) -> None:
    _text("opened_by", intent.opened_by)
    _step_and_attempt(intent)
    _whole("epoch", intent.epoch, 0, INT64_MAX)
    _built_on(intent.built_on)
    _time("time", intent.time)
    _whole("process_count", intent.process_count, 1, PROCESSES_MAX)
    _whole("device_count", intent.device_count, 0, PROCESSES_MAX)  # an adopted step's devices are not known
    for axis, size in intent.mesh.items():
        _whole(f"mesh.{axis}", size, 1, PROCESSES_MAX)
    _whole("mesh, devices in it", math.prod(intent.mesh.values()), 1, PROCESSES_MAX)
    _leaves(intent.tree.leaves)
    holders.check(intent)


def _receipt(receipt: Receipt) -> None:
    _text("host", receipt.host)
    _step_and_attempt(receipt)
    _built_on(receipt.built_on)
    _whole("process", receipt.process, 0, PROCESSES_MAX)
    _text("went_by", receipt.went_by, 8)
    _files(receipt.files)
    _seconds("seconds", receipt.seconds)
    before: tuple[Box, ...] = ()
    for name, boxes in receipt.boxes.items():
        if boxes != before:  # most arrays of a state are cut alike
            for box in boxes:
                _box(f"boxes.{name}", box)
            before = boxes
    _all_hex("places", [place.crc32c for place in receipt.places.values()], 8)
    for key, body in receipt.small.items():
        if len(body) <= zarr_chunks.CHECKSUM_BYTES:
            raise Invalid(f"small.{key:.100}: {len(body)} bytes, expected elements and a CRC-32C")
    for name, prints in receipt.prints.items():
        for shard in prints:
            _box(f"prints.{name}", shard.box)
        _all_hex(f"prints.{name}", [shard.print for shard in prints], 32)
    if receipt.failure is not None:
        _same("failure.process", receipt.failure.process, receipt.process)
        _failure("failure", receipt.failure)


def _group_receipt(group: GroupReceipt) -> None:
    _step_and_attempt(group)
    _built_on(group.built_on)
    _whole("process", group.process, 0, PROCESSES_MAX)
    _whole("number", group.number, 1, PROCESSES_MAX)
    _unique("receipts", "process", [receipt.process for receipt in group.receipts])
    for receipt in group.receipts:
        _receipt(receipt)
        if receipt.id != group.id or receipt.failure is not None:
            raise Invalid(f"receipts: process {receipt.process}'s is of {receipt.id.label}, or a vote to abort")


def _manifest(manifest: Manifest) -> None:
    _step_and_attempt(manifest)
    _built_on(manifest.built_on)
    _text("built_on_id", manifest.built_on_id)
    _whole("process_count", manifest.process_count, 1, PROCESSES_MAX)
    _same("hosts, how many", len(manifest.hosts), manifest.process_count)
    for host in manifest.hosts:
        _text("hosts", host)
    _same("seconds, how many", len(manifest.seconds), manifest.process_count)
    for process, seconds in enumerate(manifest.seconds):
        _seconds(f"seconds[{process}]", seconds)
    _files(manifest.files)
    _whole("files, bytes of all", manifest.total_bytes, 0, INT64_MAX)
    _all_hex("chunks", list(manifest.chunks.values()), 8)
    _all_hex("fingerprints", list(manifest.fingerprints.values()), 32)


def _extra(extra: Extra) -> None:
    _whole("step", extra.step, 0, STEP_MAX)
    _time("timestamp", extra.timestamp)
    _metrics(extra.stored_metrics)
    values: list[Any] = [extra.stored_extra]
    for _ in range(DEPTH_MAX):
        if not values:
            return
        values = [inner for value in values if isinstance(value, dict | list | tuple) for inner in _inside(value)]
    raise Invalid(f"extra: nested more than {DEPTH_MAX} deep")


def _placement(placement: Placement) -> None:
    _whole("epoch", placement.epoch, 0, INT64_MAX)
    _time("time", placement.time)
    for text in (placement.asked, placement.level, *placement.notes):
        _text("placement", text)
    for host in placement.hosts:
        for text in (host.name, host.node, host.rack, host.slice):
            _text("hosts", text)
        for process in host.processes:
            _whole("hosts.processes", process, 0, PROCESSES_MAX)
        for target in host.targets:
            _whole("hosts.targets", target, 0, len(placement.hosts) - 1)


def _inside(value: dict[str, Any] | Sequence[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


_RULES: dict[type[Record], Callable[[Any], None]] = {
    Head: _head,
    Intent: _intent,
    Receipt: _receipt,
    GroupReceipt: _group_receipt,
    Manifest: _manifest,
    Extra: _extra,
    Placement: _placement,
}


# Leaves.


@kept
def _leaves(leaves: tuple[LeafSpec, ...]) -> None:
    if not leaves:
        raise Invalid("tree: no leaves, expected one at least")
    forms = set()  # a state has many leaves of few forms
    for leaf in leaves:
        if problem := name_problem(leaf):
            raise Invalid(f"tree: {problem}")
        form = (leaf.kind, leaf.shape, leaf.dtype, leaf.stored_shape, leaf.stored_dtype, leaf.chunk)
        if not leaf.kind_stored:
            _value(leaf)
        elif form not in forms:
            _array(leaf)
            forms.add(form)
        if len(leaf.sharding) > SHARDING_CHARS_MAX:
            raise Invalid(f"{_name(leaf)}: sharding of {len(leaf.sharding)} characters, limit {SHARDING_CHARS_MAX}")
        if leaf.external is not None:
            _external(leaf, leaf.external)
    clash = name_clash(leaves)
    if clash:
        raise Invalid(f"tree: {clash}")


def _name(leaf: LeafSpec) -> str:
    return "tree: " + _brief(leaf.label)


def _array(leaf: LeafSpec) -> None:
    """Check the form of an array: its shapes, dtypes, and that they are consistent."""
    where = _name(leaf)
    stored = leaf.stored_dtype or leaf.dtype
    if stored not in ITEM_BYTES:
        raise Invalid(f"{where}: dtype {_brief(stored)}, which no array store holds")
    if leaf.kind == "key":
        known = _KEY_DTYPE.fullmatch(leaf.dtype) is not None
        prefix = leaf.stored_shape is not None and leaf.stored_shape[: len(leaf.shape)] == leaf.shape
        if not known or not prefix or not leaf.value or stored != "uint32":
            raise Invalid(f"{where}: a PRNG key of {_brief(leaf.dtype)}{leaf.shape}, stored as {leaf.stored_shape}")
    elif stored not in (leaf.dtype, STORED_AS.get(leaf.dtype)) or leaf.stored_shape not in (None, leaf.shape):
        raise Invalid(f"{where}: {_brief(leaf.dtype)}{leaf.shape}, stored as {stored}{leaf.stored_shape or leaf.shape}")
    shape = leaf.file_shape
    if len(shape) > RANK_MAX:
        raise Invalid(f"{where}: {len(shape)} dimensions, expected at most {RANK_MAX}")
    for size in (*leaf.shape, *shape):
        _whole(f"{where}: shape", size, 0, INT64_MAX)
    _whole(f"{where}: bytes", math.prod(size or 1 for size in shape) * ITEM_BYTES[stored], 0, INT64_MAX)
    if leaf.chunk is not None and (
        len(leaf.chunk) != len(shape)
        or not all(1 <= size <= whole and whole % size == 0 for size, whole in zip(leaf.chunk, shape, strict=True))
    ):
        raise Invalid(f"{where}: chunks of {_brief(leaf.chunk)}, which do not tile {list(shape)}")


def _value(leaf: LeafSpec) -> None:
    """A value that is kept in the tree spec."""
    readable = _READABLE.get(leaf.kind)
    if readable is None:
        raise Invalid(f"{_name(leaf)}: kind {_brief(leaf.kind)} is unknown")
    try:
        good = readable(leaf.value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise Invalid(f"{_name(leaf)}: {_brief(leaf.value)} is no {leaf.kind}")
    if leaf.shape or leaf.chunk is not None or leaf.external or leaf.stored_shape is not None:
        raise Invalid(f"{_name(leaf)}: has a shape, expected a value of kind {leaf.kind}")


def _is_float(text: str) -> bool:
    float.fromhex(text)
    return True


def _is_bytes(text: str) -> bool:
    base64.b64decode(text, validate=True)
    return True


_READABLE: Mapping[str, Callable[[str], bool]] = {
    "none": lambda text: text == "",
    "bool": lambda text: text in ("True", "False"),
    "int": lambda text: len(text) <= INT_DIGITS_MAX + 1 and _INT.fullmatch(text) is not None,
    "float": _is_float,
    "complex": lambda text: text.count(" ") == 1 and all(map(_is_float, text.split(" "))),
    "str": lambda text: True,
    "bytes": _is_bytes,
    "empty": _CONTAINERS.__contains__,
}


def _external(leaf: LeafSpec, external: ExternalArray) -> None:
    where = f"{_name(leaf)}: external"
    if external.driver not in _DRIVERS:
        raise Invalid(f"{where}: driver {_brief(external.driver)}, expected zarr or zarr3")
    if leaf.chunk is not None:
        raise Invalid(f"{where}: has a chunk shape of ours, expected none")
    for part in (external.item, external.name):
        if part:
            keys.check_key(part, where)
        if "|" in part:
            raise Invalid(f"{where}: {_brief(part)} has a `|`, which begins another store in a URL")


def _has_files(leaf: LeafSpec, external: ExternalArray, names: set[str]) -> None:
    """Check that an external array is in files that the manifest lists, so that it belongs to this step."""
    item = keys.STATE + (f"{external.item}/" if external.item else "")
    if external.ocdbt:
        found = item + keys.STORE in names
    else:
        found = any(name.startswith(f"{item}{external.name}/") for name in names)
    if not found:
        raise Invalid(f"{leaf.label}: the manifest lists no files of {_brief(external.name)} in {_brief(item)}")


# Fields.


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _text(name: str, value: str, most: int = TEXT_CHARS_MAX) -> None:
    if len(value) > most:
        raise Invalid(f"{name}: {len(value)} characters, expected at most {most}")


def _failure(name: str, failure: Failure) -> None:
    _whole(f"{name}.process", failure.process, -1, PROCESSES_MAX)
    _text(f"{name}.host", failure.host)
    _text(f"{name}.phase", failure.phase)
    _text(f"{name}.cause", failure.cause, REASON_CHARS_MAX)


def _whole(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise Invalid(f"{name} is {_brief(value)}, expected {least} to {most}")


def _same(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise Invalid(f"{name} is {got}, expected {expected}")


def _time(name: str, value: float) -> None:
    if not 0 <= value <= TIME_MAX_S:  # also rejects NaN
        raise Invalid(f"{name} is {value}, expected seconds since 1970")


def _seconds(name: str, values: Mapping[str, float]) -> None:
    for part, value in values.items():
        if not 0 <= value <= SECONDS_MAX:
            raise Invalid(f"{name}.{part:.100} is {value}, expected seconds")


def _metrics(metrics: Mapping[str, float | str | None]) -> None:
    for name, value in metrics.items():
        if value is None:  # earlier versions wrote it for adopted steps
            continue
        if not (value in NOT_FINITE if isinstance(value, str) else math.isfinite(value)):
            raise Invalid(f"metrics.{name:.100} is {_brief(value)}, expected a number or one of {sorted(NOT_FINITE)}")


def _step_and_attempt(record: LiveStep | RetiredAttempt | Intent | Receipt | GroupReceipt | Manifest) -> None:
    _whole("step", record.step, 0, STEP_MAX)
    parse_name(record.attempt)


def _built_on(version: int) -> None:
    _whole("built_on", version, -1, keys.VERSION_MAX)


def _crc(name: str, value: str) -> None:
    _all_hex(name, [value], 8)


def _all_hex(name: str, values: list[str], digits: int) -> None:
    """Checks many at once, for speed: a manifest has one for each chunk."""
    if set(map(len, values)) - {digits} or "".join(values).strip(_HEX):
        wrong = next(value for value in values if len(value) != digits or value.strip(_HEX))
        raise Invalid(f"{name}: {_brief(wrong)} is not {digits} hex digits")


def _unique(name: str, field: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise Invalid(f"{name}: {field} {_brief(Counter(values).most_common(1)[0][0])} twice")


def _files(files: Sequence[FileEntry]) -> None:
    _unique("files", "path", [entry.path for entry in files])
    for entry in files:
        keys.check_key(entry.path, "files")
        if not 0 <= entry.bytes <= INT64_MAX:
            raise Invalid(f"files: {_brief(entry.path)}: {_brief(entry.bytes)} bytes")
    _all_hex("files: crc32c", [entry.crc32c for entry in files], 8)
    _all_hex("files: crc32", [entry.crc32 for entry in files if entry.crc32], 8)


def _box(name: str, box: Box) -> None:
    if len(box.start) != len(box.stop) or len(box.start) > RANK_MAX:
        raise Invalid(f"{name}: a region from {len(box.start)} to {len(box.stop)} indices")
    for start, stop in zip(box.start, box.stop, strict=True):
        if not 0 <= start <= stop <= INT64_MAX:
            raise Invalid(f"{name}: a region from {_brief(start)} to {_brief(stop)}")
