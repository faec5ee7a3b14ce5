"""A run's files in memory, to be changed and signed again: what accidents and forgers leave of it.

Mutations are drawn by a seed, so that each can be played again. An accident changes bytes; a forger changes what a
record says and makes every checksum right again, up to the journal's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c

NEWEST = 3
DIRECTORY = object()  # what stands where a file was
Body = bytes | None | object  # None: nothing


def hex_crc(data: bytes) -> str:
    return f"{crc32c.crc32c(data):08x}"


def signed_text(body: bytes) -> bytes:
    """`body`: a JSON object without a checksum."""
    return body[:-1] + b',"crc32c":"' + hex_crc(body[:-1]).encode() + b'"}\n'


def signed(record: dict[str, Any]) -> bytes:
    fields = {name: value for name, value in record.items() if name != "crc32c"}
    return signed_text(json.dumps(fields, separators=(",", ":")).encode("utf-8", "surrogatepass"))


class Image:
    """What is below a root, by path, and what of it is changed."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.changed = files, dict[str, Body]()
        self.after: list[Callable[[Path], None]] = []  # what only a file system can hold, done last

    def __getitem__(self, path: str) -> bytes:
        body = self.changed.get(path, self.files.get(path))
        assert isinstance(body, bytes), path
        return body

    @property
    def head(self) -> str:
        return max(path for path in self.files if path.startswith("journal/"))

    def attempt(self, step: int = NEWEST) -> str:
        """Its prefix, ending in `/`."""
        manifests = (path for path in self.files if path.startswith(f"steps/{step:08d}/"))
        return next(path for path in manifests if path.endswith("/manifest.json")).removesuffix("manifest.json")

    def inside(self, step: int = NEWEST) -> list[str]:
        return [path for path in self.files if path.startswith(self.attempt(step))]

    def record(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self[path])
        return found

    def set_head(self, change: Callable[[dict[str, Any]], None]) -> None:
        head = self.record(self.head)
        change(head)
        self.changed[self.head] = signed(head)

    def set_manifest(self, change: Callable[[dict[str, Any]], None], step: int = NEWEST) -> None:
        path = self.attempt(step) + "manifest.json"
        manifest = self.record(path)
        change(manifest)
        self.changed[path] = signed(manifest)

        def follow(head: dict[str, Any]) -> None:
            for live in head["live"]:
                if live["step"] == step:
                    live["manifest_crc32c"] = hex_crc(self[path])

        self.set_head(follow)

    def put(self, name: str, body: bytes, step: int = NEWEST) -> None:
        """A file of the attempt, and the manifest's line of it."""
        self.changed[self.attempt(step) + name] = body

        def follow(manifest: dict[str, Any]) -> None:
            line = {"path": name, "bytes": len(body), "crc32c": hex_crc(body)}
            manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != name] + [line]

        self.set_manifest(follow, step)

    def remove(self, name: str, step: int = NEWEST) -> None:
        """A file of the attempt, and the manifest's line of it."""
        self.changed[self.attempt(step) + name] = None

        def follow(manifest: dict[str, Any]) -> None:
            manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != name]

        self.set_manifest(follow, step)

    def set_record(self, name: str, change: Callable[[dict[str, Any]], None], step: int = NEWEST) -> None:
        record = self.record(self.attempt(step) + name)
        change(record)
        self.put(name, signed(record), step)

    def replace_text(self, path: str, old: bytes, new: bytes) -> bytes:
        """A record with other text in it, which json.dumps would not write."""
        body = self[path].rpartition(b',"crc32c":"')[0] + b"}"
        assert old in body, (path, old)
        return signed_text(body.replace(old, new, 1))

    def leaf(self, *path: str, step: int = NEWEST, **change: Any) -> None:
        def follow(intent: dict[str, Any]) -> None:
            (leaf,) = [leaf for leaf in intent["tree"]["leaves"] if leaf["path"] == list(path)]
            leaf.update(change)

        self.set_record("intent.json", follow, step)


# Accidents: no checksum is made right again.


def accident(image: Image, chance: random.Random) -> str:
    """Change one file (or two, or a folder) as disks and people do. Returns what was done."""
    names = sorted(image.files)
    path = chance.choice(names)
    body = image.files[path]
    kind = chance.choice(list(_ACCIDENTS))
    told = _ACCIDENTS[kind](image, path, body, chance)
    return f"{kind} {path}{told or ''}"


def _bits(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    changed = bytearray(body)
    for _ in range(chance.choice((1, 1, 1, 2, 30)) if body else 0):
        changed[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    image.changed[path] = bytes(changed)


def _cut(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    image.changed[path] = body[: chance.choice((0, chance.randrange(len(body) + 1)))]


def _longer(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    image.changed[path] = body + chance.randbytes(chance.randint(1, 5000))


def _zeroed(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    at, size = chance.randrange(len(body) + 1), chance.randint(1, 600)
    image.changed[path] = body[:at] + bytes(len(body[at : at + size])) + body[at + size :]


def _swapped(image: Image, path: str, body: bytes, chance: random.Random) -> str:
    other = chance.choice(sorted(image.files))
    image.changed[path], image.changed[other] = image.files[other], body
    return f" with {other}"


def _of_another_step(image: Image, path: str, body: bytes, chance: random.Random) -> str:
    name = path.rpartition("/")[2]
    folder = path.rpartition("/")[0].rpartition("/")[2]
    alike = [each for each in sorted(image.files) if each != path and f"/{folder}/" in each and "steps/" in each]
    same = [each for each in alike if each.endswith(f"/{name}")] or alike or sorted(image.files)
    other = min(same, key=lambda each: (abs(len(image.files[each]) - len(body)), chance.random()))
    image.changed[path] = image.files[other]
    return f" is {other}"


def _missing(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    image.changed[path] = None


def _folder_missing(image: Image, path: str, body: bytes, chance: random.Random) -> str:
    parts = path.split("/")[:-1]
    folder = "/".join(parts[: chance.randint(1, len(parts))]) + "/"
    image.changed |= {each: None for each in image.files if each.startswith(folder)}
    return f" below {folder}"


def _copied(image: Image, path: str, body: bytes, chance: random.Random) -> str:
    names = ("00000000000000000009.json", "00001.json", "00000.bin", "manifest.json", "x~")
    other = path.rpartition("/")[0] + "/" + chance.choice(names)
    image.changed[other] = body
    return f" to {other}"


def _renamed(image: Image, path: str, body: bytes, chance: random.Random) -> str:
    other = path[:-1] + chance.choice("0123456789abcdef~")
    image.changed |= {path: None, other: body}
    return f" to {other}"


def _spliced(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    other = image.files[chance.choice(sorted(image.files))]
    at, size = chance.randrange(len(body) + 1), chance.randint(1, 300)
    image.changed[path] = (body[:at] + other[:size] + body[at + size :])[: len(body)]


def _blocks_swapped(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    size = min(chance.choice((1, 4, 16, 64, 512)), len(body) // 2)
    one, other = (chance.randrange(len(body) - size + 1) for _ in range(2))
    changed = bytearray(body)
    changed[one : one + size], changed[other : other + size] = body[other : other + size], body[one : one + size]
    image.changed[path] = bytes(changed)


def _noise(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    image.changed[path] = chance.randbytes(chance.randint(0, 3000))


def _made_a_folder(image: Image, path: str, body: bytes, chance: random.Random) -> None:
    image.changed[path] = DIRECTORY


_ACCIDENTS: dict[str, Callable[[Image, str, bytes, random.Random], str | None]] = {
    "bits flipped": _bits,
    "cut": _cut,
    "longer": _longer,
    "a part zeroed": _zeroed,
    "swapped": _swapped,
    "of another step": _of_another_step,
    "missing": _missing,
    "folder missing": _folder_missing,
    "copied": _copied,
    "renamed": _renamed,
    "spliced": _spliced,
    "blocks swapped": _blocks_swapped,
    "noise": _noise,
    "a folder": _made_a_folder,
}

# Forgeries: what a record says is changed, and everything is signed again.

_NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(1e308, -1e308, 1e-320, 0.5, float("inf"), float("nan")),
    *("", "a", "..", "/", "../../x", "a/b", "\0", "\ud800", "é" * 50, "x" * 5000, "9" * 5000, "NaN"),
    *("e0001-a01", "e0009-a01", "float32", "int8", "object", "array", "key", "none", "zzz", "P('data',)", "00000000"),
    *("quarantined", "restored", "P(((((((((", "0x1p99999", "True", "|", "zarr3"),
    *([], {}, [[]], [0], [-1], [2**62], [1] * 70, {"": 1}, {"a": {"b": []}}),
]
RECORDS = ("journal", "manifest.json", "intent.json", "extra.json", "receipts/00000.json")


def forgery(image: Image, chance: random.Random) -> str:
    """Change one field of a record, or bytes of the array store's tree. Returns what was done."""
    step = chance.choice((NEWEST, NEWEST, NEWEST, NEWEST - 1))
    names = {path.removeprefix(image.attempt(step)) for path in image.inside(step)}
    trees = sorted(name for name in names if name.endswith("manifest.ocdbt") or "/d/" in name)
    of_records = [name for name in RECORDS if name == "journal" or name in names]
    target = chance.choice([*of_records, "intent.json", *(["tree", "tree"] if trees else [])])
    if target == "tree":
        name = chance.choice(trees)
        image.put(name, _tree_forged(image[image.attempt(step) + name], chance), step)
        return f"{name} of step {step}"
    told: list[str] = []

    def change(record: dict[str, Any]) -> None:
        told.append(_field_forged(record, chance))

    if target == "journal":
        image.set_head(change)
    elif target == "manifest.json":
        image.set_manifest(change, step)
    else:
        image.set_record(target, change, step)
    return f"{target} of step {step}: {told[0]}"


def _fields(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [above] if above and above != ("crc32c",) else []
    if isinstance(value, dict):
        found += [path for key in value for path in _fields(value[key], (*above, key))]
    elif isinstance(value, list):
        found += [path for index, one in enumerate(value[:40]) for path in _fields(one, (*above, index))]
    return found


def _field_forged(record: dict[str, Any], chance: random.Random) -> str:
    *above, last = path = chance.choice(_fields(record))
    holder: Any = record
    for key in above:
        holder = holder[key]
    shown, old, drawn = ".".join(map(str, path)), holder[last], chance.random()
    if drawn < 0.12:
        del holder[last]
        return f"{shown} deleted"
    if drawn < 0.2 and isinstance(holder, dict):
        name = chance.choice(("", "zz", "../x", "a" * 3000))
        holder[name] = holder.pop(last)
        return f"{shown} renamed"
    number = isinstance(old, int | float) and not isinstance(old, bool)
    if drawn < 0.35 and (number or isinstance(old, str | list)):
        holder[last] = old * 2
    elif drawn < 0.45 and number:
        holder[last] = old + chance.choice((1, -1))
    else:
        holder[last] = chance.choice(_NASTY)
    return f"{shown} is {holder[last]!r:.60}"


def _tree_forged(body: bytes, chance: random.Random) -> bytes:
    """A node or manifest of OCDBT (or a data file) with other bytes; its length and last CRC-32C are right."""
    changed = bytearray(body)
    if len(body) < 24:
        return chance.randbytes(24)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(12, len(changed) - 4)
        changed[at] = chance.choice((changed[at] ^ (1 << chance.randrange(8)), 0, 255, 127, 128, chance.randrange(256)))
    if chance.random() < 0.2:
        more = chance.choice((b"\xff" * 9 + b"\x01", b"\x80" * 20, b"\xff\xff\xff\xff\x0f", bytes(30)))
        at = chance.randrange(14, len(changed) - 4)
        changed[at:at] = more
    if chance.random() < 0.2:
        at = chance.randrange(14, max(15, len(changed) - 24))
        del changed[at : at + chance.randint(1, 16)]
    changed[4:12] = len(changed).to_bytes(8, "little")
    changed[-4:] = crc32c.crc32c(bytes(changed[:-4])).to_bytes(4, "little")
    return bytes(changed)
