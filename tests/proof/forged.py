"""Forged runs that are known by name: each once crashed, hung, filled memory or gave out what was never saved.

`CASES` is the table; tests/proof/fuzz.py plays it, each case in a process of its own. All checksums are right.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c

from orchestrator.arrays.format import ocdbt
from tests.proof.fuzz import Case
from tests.support.images import NEWEST, Image, signed, signed_text

_HUGE = 2**60
_BOMB = 4 << 30
Change = Callable[[Image], None]


def leaf(*path: str, **change: Any) -> Change:
    return lambda image: image.leaf(*path, **change)


def intent(**change: Any) -> Change:
    return lambda image: image.set_record("intent.json", lambda record: record.update(change))


def head(**change: Any) -> Change:
    return lambda image: image.set_head(lambda record: record.update(change))


def live(**change: Any) -> Change:
    """The newest step's line in the journal."""
    return lambda image: image.set_head(lambda record: record["live"][-1].update(change))


def manifest(**change: Any) -> Change:
    return lambda image: image.set_manifest(lambda record: record.update(change))


def external(item: str = "", driver: str = "zarr3", ocdbt: bool = True, name: str = "n") -> Change:
    return leaf("n", chunk=None, foreign={"item": item, "driver": driver, "ocdbt": ocdbt, "name": name})


def text(name: str, old: bytes, new: bytes) -> Change:
    """A record with text that json.dumps would not write. `name`: `` for the journal's head."""

    def change(image: Image) -> None:
        if not name:
            image.changed[image.head] = image.replace_text(image.head, old, new)
        else:
            image.put(name, image.replace_text(image.attempt() + name, old, new))

    return change


def from_step_2(name: str) -> Change:
    return lambda image: image.put(name, image[image.attempt(NEWEST - 1) + name])


LEAVES: dict[str, Change] = {
    **{f"an int {value[:9]!r}": leaf("i", value=value) for value in ("abc", "9" * 100_000, "", "1_000", "٣")},
    **{f"a float {value!r}": leaf("f", value=value) for value in ("zz", "0x1p99999999", "")},
    "bytes that are not base64": leaf("raw", value="!!!"),
    "a complex number of one part": leaf("f", kind="complex", value="1"),
    "an unknown kind": leaf("f", kind="wat", value="1"),
    "an unknown container": leaf("e", value="weird"),
    "an unknown key implementation": leaf("b", "k", value="nope"),
    "a key of another shape": leaf("b", "k", stored_shape=[5]),
    **{
        f"dtype {dtype!r}": leaf("n", dtype=dtype)
        for dtype in (
            *("object", "O", "__version__", "finfo", "np", "U0", "i1,i1", "(1000000000000,)i4", "i4,(,", "", "M8[x]"),
            *("a\0b", "uint16", "float64", "float4_e2m1fn", ">i2", "void"),
        )
    },
    "another stored dtype": leaf("n", stored_dtype="int8"),
    **{
        f"shape {str(shape)[:40]}": leaf("w", shape=shape)
        for shape in ([_HUGE], [_HUGE, _HUGE], [-1, 64], [-64, -64], [0, 2**62], [0, 2**70], [2**70], [64], [32, 64])
    },
    **{
        f"chunks {str(chunk)[:40]}": leaf("w", chunk=chunk)
        for chunk in ([0, 64], [-1, 64], [64, -64], [1, 1], [64], [], [2**62, 2**62], [63, 64], [128, 64])
    },
    **{
        f"shape {shape} in chunks {chunk}": leaf("w", shape=shape, chunk=chunk)
        for shape, chunk in (
            *(([_HUGE, 4], [_HUGE, 4]), ([10**9, 64], [1, 64]), ([2**26], [1]), ([512, 64], [-1, 64])),
            *(([512, 1024], [-1, 1024]), ([32, 64], [64, 64]), ([32, 128], [32, 128])),
        )
    },
    "a million million chunks": leaf("n", shape=[10**12], chunk=[1]),
    **{f"{rank} dimensions": leaf("n", shape=[1] * rank, chunk=[1] * rank) for rank in (100, 100_000)},
    "no path": leaf("f", path=[]),
    "one path twice": leaf("f", path=["i"]),
    "a leaf below a leaf": leaf("f", path=["w", "x"]),
    "a leaf above a leaf": leaf("i", path=["b"]),
    "a path out of the run": leaf("n", path=["../../../../etc/passwd"]),
    "a path of 100,000 names": leaf("f", path=["a"] * 100_000),
    "a path of 50 MB": leaf("f", path=["a" * 50_000_000]),
    "a path of slashes": leaf("f", path=["/" * 8000]),
    "a path that is not UTF-8": leaf("f", path=["\ud800"]),
    "no leaves": lambda image: image.set_record("intent.json", lambda record: record["tree"].update(leaves=[])),
    "text as an array": leaf("name", kind="array", shape=[3], dtype="float32", chunk=[3], value=""),
    **{
        f"sharding {value[:24]!r}": leaf("w", sharding=value)
        for value in (
            *(
                "P(__import__('os').abort(),)",
                "P(" + "(" * 90 + ")" * 90 + ")",
                "P(1,{2:3},)",
                "P('a\0',)",
                "P('nope', None)",
                "P(None, None, None, None)",
            ),
        )
    },
}
LEAVES |= {
    "a partition spec of 400,000 parentheses": leaf("w", sharding="P(" + "(" * 200_000 + ")" * 200_000),
    "a partition spec of 100,000 signs": leaf("w", sharding="P(" + "-" * 100_000 + "1,)"),
}
INTENTS: dict[str, Change] = {
    **{f"a mesh of {size}": intent(mesh={"data": size, "b": size}) for size in (0, -3, 2**62)},
    **{f"{count} processes": intent(process_count=count, device_count=count) for count in (0, -1, 2**40)},
    "an intent of the year 10^292": intent(time=1e300),
    "an intent of another step": from_step_2("intent.json"),
    "an intent that is another record": lambda image: image.put("intent.json", image[image.attempt() + "extra.json"]),
    "external data out of the step": external("../../../00000002/e0001-a01/state"),
    "external data out of the run": external("../../../../../compressed/steps/00000003/e0001-a01/state"),
    "external data, percent-encoded": external("%2e%2e/%2e%2e/%2e%2e/00000002/e0001-a01/state"),
    "external data at another host": external("|http://127.0.0.1:9/x|"),
    "external data by a name with dots": external(ocdbt=False, name="../../../../../../../etc"),
    **{
        f"external data by {name}": external(driver=name, ocdbt=False, name="_METADATA")
        for name in ("json", "cast", "n5")
    },
}
ATTEMPTS: dict[str, Change] = {
    "no hosts": manifest(hosts=[]),
    "a manifest of 10^15 processes": manifest(process_count=10**15),
    "a manifest of another step": manifest(step=999, attempt="e9999-a99"),
    "files of -1 bytes": lambda image: image.set_manifest(lambda record: record["files"][0].update(bytes=-1)),
    "files of 2^62 bytes": lambda image: image.set_manifest(lambda record: record["files"][0].update(bytes=2**62)),
    "2,600,000 files": lambda image: image.set_manifest(lambda record: record.update(files=record["files"] * 100_000)),
    "chunks of no array": manifest(chunks={"../../x": "zz", "": ""}),
    "no chunks": manifest(chunks={}),
    "odd fingerprints": manifest(fingerprints={"w": "zz", "n": "1"}),
    "odd seconds": manifest(seconds=[{"stage": 1e308, "x": float(2**70)}]),
    "a process of no number": lambda image: image.put("process/x.bin", b"x"),
    "a process of a negative number": lambda image: image.put("process/-0001.bin", b"x"),
    "extra of another step": from_step_2("extra.json"),
    "extra 900 deep": text("extra.json", b'"extra":{', b'"extra":{"q":' + b"[" * 900 + b"]" * 900 + b","),
    "extra 200,000 deep": text("extra.json", b'"extra":{', b'"extra":{"q":' + b"[" * 200_000 + b"]" * 200_000 + b","),
    "extra with 100,000 digits": text("extra.json", b'"extra":{', b'"extra":{"q":' + b"9" * 100_000 + b","),
    "a receipt of odd files": lambda image: image.set_record(
        "receipts/00000.json", lambda record: record.update(files=[{"path": "../../../x", "bytes": -5, "crc32c": "z"}])
    ),
    "a receipt of odd chunks": lambda image: image.set_record(
        "receipts/00000.json", lambda record: record.update(small={"a": "!!!"})
    ),
    "a receipt of another process": lambda image: image.set_record(
        "receipts/00000.json", lambda record: record.update(process=7)
    ),
    "a receipt of another step": from_step_2("receipts/00000.json"),
}
HEADS: dict[str, Change] = {
    **{f"a head of time {value}": head(time=value) for value in (1e300, -1e18)},
    "a step of time 1e300": live(time=1e300),
    **{f"step {step}": live(step=step) for step in (-3, 2**62, 10**30)},
    **{f"epoch {epoch}": head(epoch=epoch) for epoch in (-5, 2**63)},
    **{f"a step of {size} bytes": live(bytes=size) for size in (-1, 2**63)},
    "one step four times": lambda image: image.set_head(lambda record: record.update(live=record["live"] * 4)),
    "trust of no kind": live(trust="zzz"),
    "an attempt live and retired": lambda image: image.set_head(
        lambda record: record.update(
            retired=[{"step": one["step"], "attempt": one["attempt"], "reason": "x"} for one in record["live"]]
        )
    ),
    "large metrics": live(metrics={"a": 1e308, "b": -0.0, "": 3.0}),
    "300,000 retired attempts": head(
        retired=[{"step": step, "attempt": "e0001-a01", "reason": "x"} for step in range(300_000)]
    ),
    "an odd event": head(event={"kind": "committed", "step": -1, "attempt": "../../x", "reason": "y" * 1000}),
    "an event of 200,000 steps": head(event={"kind": "x", "steps": list(range(200_000))}),
    "an attempt in other digits": live(attempt="e\uff10\uff10\uff10\uff11-a01"),
    "a head 3,000,000 deep": lambda image: image.changed.update(
        {
            image.head: signed_text(
                b'{"format":1,"version":3,"epoch":1,"writer":"x","write_id":"y","time":1.0,"event":{"kind":"x"},"z":'
                + b"[" * 3_000_000
                + b"]" * 3_000_000
                + b"}"
            )
        }
    ),
    "a head of 100 MB": lambda image: image.changed.update(
        {image.head: signed({**image.record(image.head), "writer": "A" * 100_000_000})}
    ),
    "members twice": text("", b'"live":[', b'"live":[],"epoch":99,"live":['),
    **{f"metric {value.decode()}": text("", b'"loss":1.0', b'"loss":' + value) for value in (b"NaN", b"1e999")},
    "a writer of half a character": text("", b'"writer":"', b'"writer":"\\ud800'),
    "a writer that is not UTF-8": text("", b'"writer":"', b'"writer":"\xff\xfe'),
}


# Array stores.


def zstd_zeros(size: int) -> bytes:
    """A frame that decodes to `size` zeros (a multiple of 128 KiB): one repeated byte in each block."""
    count = size >> 17
    block = (1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"
    last = (1 | 1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\x00\x58" + block * (count - 1) + last


def node_of(image: Image) -> str:
    """The name, below `state/`, of the file with the store's tree."""
    prefix = image.attempt() + "state/d/"
    return next(path for path in image.files if path.startswith(prefix)).removeprefix(image.attempt() + "state/")


def framed_tree(image: Image, body: bytes, height: int = 0) -> None:
    """One node, which is the root."""
    name = node_of(image)
    image.put("state/" + name, body)
    root = ocdbt._Summary(b"", (name, 0, len(body)), 1, 1, 1)
    image.put("state/" + ocdbt.MANIFEST, ocdbt._manifest(root, height, bytes(16), 1))


def node_bomb(image: Image) -> None:
    packed = zstd_zeros(_BOMB)
    body = b"\x0c\xdb\x20\xde" + (18 + len(packed)).to_bytes(8, "little") + b"\0\1" + packed
    framed_tree(image, body + crc32c.crc32c(body).to_bytes(4, "little"))


def endless_tree(image: Image) -> None:
    """The root is its own child."""
    name = node_of(image)
    size = len(ocdbt._interior([ocdbt._Summary(b"w", (name, 0, 100), 1, 1, 1)]))
    framed_tree(image, ocdbt._interior([ocdbt._Summary(b"w", (name, 0, size), 1, 1, 1)]), height=1)


def tall_tree(image: Image) -> None:
    """The root is its own child, and says to be 255 high."""
    name = node_of(image)
    size = len(ocdbt._interior([ocdbt._Summary(b"w", (name, 0, 100), 1, 1, 1)]))
    framed_tree(image, ocdbt._interior([ocdbt._Summary(b"w", (name, 0, size), 1, 1, 1)]), height=255)


def entries_of(image: Image) -> dict[bytes, Any]:
    where = image.attempt() + "state/"
    root = ocdbt.decode_manifest(image[where + ocdbt.MANIFEST], "m")
    assert root is not None
    path, offset, size = root.place
    found, _ = ocdbt.decode_node(image[where + path][offset : offset + size], root, b"", "n")
    return dict(found or ())


def stored_as(image: Image, entries: dict[bytes, Any]) -> None:
    name = node_of(image)
    nodes, tree = ocdbt.encode(sorted(entries), [entries[key] for key in sorted(entries)], name, 0, bytes(16), 1)
    image.put("state/" + name, nodes)
    image.put("state/" + ocdbt.MANIFEST, tree)


def zarr_json(shape: list[int], chunk: list[int]) -> bytes:
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": 0,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 1}},
                *([{"name": "crc32c"}] if len(chunk) > 1 else []),
            ],
        }
    ).encode()


def chunk_bomb(shape: list[int], chunk: list[int], *, signs: bool = True) -> Change:
    """The chunk of w decodes to 4 GiB. `chunk`: as its metadata says. `signs`: the manifest has its checksum."""

    def change(image: Image) -> None:
        packed = zstd_zeros(_BOMB)
        crc = crc32c.crc32c(packed)
        image.put("state/big", packed + crc.to_bytes(4, "little"))
        size = len(packed) + 4
        entries = entries_of(image)
        entries = {key: value for key, value in entries.items() if not key.startswith(b"w/")}
        entries |= {
            b"w/" + b"/".join([b"c", *[b"0"] * len(shape)]): ("big", 0, size),
            b"w/zarr.json": zarr_json(shape, chunk),
        }
        stored_as(image, entries)
        chunks = {key.decode(): value for key, value in entries.items() if not key.endswith(b"/zarr.json")}

        def follow(record: dict[str, Any]) -> None:
            known = {key: value for key, value in record["chunks"].items() if not key.startswith("w/")}
            record["chunks"] = {key: known.get(key, f"{crc:08x}") for key in chunks}

        image.set_manifest(follow)
        if signs:
            image.leaf("w", shape=shape)

    return change


def external_bomb(shape: list[int], chunk: list[int]) -> Change:
    """As `chunk_bomb`, in a run whose arrays are not ours."""

    def change(image: Image) -> None:
        packed, folder = zstd_zeros(_BOMB), "state/w/"
        for name in [path.removeprefix(image.attempt()) for path in image.inside()]:
            if name.startswith(folder + "c/"):
                image.remove(name)
        image.put(folder + "zarr.json", zarr_json(shape, chunk))
        image.put(folder + "/".join(["c", *["0"] * len(shape)]), packed)
        image.leaf("w", shape=shape)

    return change


def unlisted(image: Image) -> None:
    """The tree leads to a whole and equal copy of w's chunk in a file that the manifest does not list."""
    entries = entries_of(image)
    key = next(key for key, value in entries.items() if not isinstance(value, bytes))
    path, offset, size = entries[key]
    stored_as(image, {**entries, key: ("stray", 0, size)})
    where = image.attempt() + "state/"
    image.changed[where + "stray"] = image[where + path][offset : offset + size]


def keys_twice(image: Image) -> None:
    entries = sorted(entries_of(image).items())
    name = node_of(image)
    twice = [entries[0], *entries]
    nodes, tree = ocdbt.encode([key for key, _ in twice], [chunk for _, chunk in twice], name, 0, bytes(16), 1)
    image.put("state/" + name, nodes)
    image.put("state/" + ocdbt.MANIFEST, tree)


def one_more_key(image: Image) -> None:
    stored_as(image, {**entries_of(image), b"zz/c/0": b"x" * 8})


STORES: dict[str, Change] = {
    "a node of 131 KB that decodes to 4 GiB": node_bomb,
    "a tree without end": endless_tree,
    "a tree without end, 255 high": tall_tree,
    "data in a file that is not listed": unlisted,
    "a chunk twice": keys_twice,
    "a chunk that is not listed": one_more_key,
}
COMPRESSED: dict[str, Change] = {
    "a node of 131 KB that decodes to 4 GiB": node_bomb,
    "a chunk of 4 GiB for 16 elements": chunk_bomb([4, 4], [1 << 15, 1 << 15]),
    "a chunk of 4 GiB, 16 elements said": chunk_bomb([4, 4], [4, 4]),
    "a chunk of 4 GiB, as large as its array": chunk_bomb([1 << 15, 1 << 15], [1 << 15, 1 << 15]),
    "a chunk of 4 GiB for another shape": chunk_bomb([1 << 15, 1 << 15], [1 << 15, 1 << 15], signs=False),
    "data in a file that is not listed": unlisted,
}
EXTERNAL: dict[str, Change] = {
    "an external chunk of 4 GiB for 16 elements": external_bomb([16], [1 << 30]),
    "an external chunk of 4 GiB, 16 elements said": external_bomb([4, 4], [4, 4]),
    "an external chunk of 4 GiB, as large as its array": external_bomb([1 << 30], [1 << 30]),
}


# What only a file system can hold.


def sparse(path: Callable[[Image], str], size: int = 200 << 30) -> Change:
    def change(image: Image) -> None:
        name = path(image)

        def make(root: Path) -> None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with open(root / name, "wb") as file:
                file.truncate(size)

        image.after.append(make)

    return change


def instead(path: Callable[[Image], str], make: Callable[[Path], None]) -> Change:
    def change(image: Image) -> None:
        name = path(image)

        def replace(root: Path) -> None:
            target = root / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            make(target)

        image.after.append(replace)

    return change


SPECIAL: dict[str, Change] = {
    f"{kind} as {name}": instead(path, make)
    for kind, make in {"a pipe": os.mkfifo, "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero")}.items()
    for name, path in {
        "the next head": lambda image: "journal/00000000000000000099.json",
        "manifest.json": lambda image: image.attempt() + "manifest.json",
        "intent.json": lambda image: image.attempt() + "intent.json",
        "a receipt": lambda image: image.attempt() + "receipts/00000.json",
        "a data file": lambda image: image.attempt() + "state/" + node_of(image),
    }.items()
}
SPECIAL |= {
    "a manifest of 200 GB": sparse(lambda image: image.attempt() + "manifest.json"),
    "a head of 200 GB": sparse(lambda image: "journal/00000000000000000099.json"),
    "a receipt of 200 GB": sparse(lambda image: image.attempt() + "receipts/00000.json"),
    "a data file of 200 GB": sparse(lambda image: image.attempt() + "state/" + node_of(image)),
}

OF_RUN = {
    "plain": {**LEAVES, **INTENTS, **ATTEMPTS, **HEADS, **STORES},
    "compressed": COMPRESSED,
    "adopted-zarr3": EXTERNAL,
}
CASES = [Case(name, run, change, True) for run, changes in OF_RUN.items() for name, change in changes.items()]
# What a reader of a pipe or of 200 GB does is up to the storage: these are not of the bytes.
CASES += [Case(name, "plain", change, True) for name, change in SPECIAL.items()]
