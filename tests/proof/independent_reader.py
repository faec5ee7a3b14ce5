"""A reader of runs, written from docs/reference/on-disk-format.md alone: no line of it is the package's, and it may not
import the package. Needs json, numpy, ml_dtypes, crc32c, and TensorStore for what Orbax's stores are made of.

python independent_reader.py ROOT [STEP]   prints each leaf with a checksum of its elements
"""

import base64
import itertools
import json
import re
import sys
import zlib
from pathlib import Path

import crc32c
import ml_dtypes
import numpy as np
import tensorstore as ts


def record(data):
    """A record, its own checksum checked first, then its format."""
    body, separator, tail = data.rpartition(b',"crc32c":"')
    assert separator and tail == f"{crc32c.crc32c(body):08x}".encode() + b'"}\n', "damaged record"
    value = json.loads(data)
    assert value["format"] <= 1, "of a newer format"
    return value


def safe(name):
    assert name and "\\" not in name and not {"", ".", ".."} & set(name.split("/")), f"unsafe key {name!r}"
    return name


def plain(value):
    """The user's JSON, with the numbers that JSON has no word for."""
    if isinstance(value, dict) and len(value) == 1:
        (name, inner), *_ = value.items()
        if name == "$number" and inner in ("NaN", "Infinity", "-Infinity"):
            return float(inner)
        if re.fullmatch(r"\$\$+number", name):
            return {name[1:]: plain(inner)}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


class Step:
    def __init__(self, root, step=None):
        entries = [path for path in (root / "journal").iterdir() if re.fullmatch(r"\d{20}\.json", path.name)]
        newest = max(entries, key=lambda path: path.name)
        head = record(newest.read_bytes())
        assert head["version"] == int(newest.stem)
        good = [live for live in head["live"] if live["trust"] != "quarantined"]
        self.live = next(live for live in reversed(good) if step in (None, live["step"]))
        assert re.fullmatch(r"e\d{4,}-a\d{2,}", self.live["attempt"])
        self.directory = root / "steps" / f"{self.live['step']:08d}" / self.live["attempt"]
        manifest = (self.directory / "manifest.json").read_bytes()
        assert f"{crc32c.crc32c(manifest):08x}" == self.live["manifest_crc32c"], "another manifest"
        self.manifest = record(manifest)
        self.files = {safe(entry["path"]): entry for entry in self.manifest["files"]}
        self.leaves = record(self.file("intent.json"))["tree"]["leaves"]
        extra = record(self.file("extra.json"))
        self.metrics = {name: float(value) for name, value in extra["metrics"].items()}
        self.extra = {name: plain(value) for name, value in extra["extra"].items()}
        own = (name for name in self.files if name.startswith("process/"))
        self.process_states = {int(Path(name).stem): self.file(name) for name in own}

    def file(self, name):
        data, said = (self.directory / name).read_bytes(), self.files[name]
        assert (len(data), f"{crc32c.crc32c(data):08x}") == (said["bytes"], said["crc32c"]), f"{name} is damaged"
        return data

    def read(self):
        """Path -> numpy array or Python value, of every leaf."""
        if any("foreign" in leaf for leaf in self.leaves):
            for name in self.files:
                self.file(name)
        return {tuple(leaf["path"]): self.leaf(leaf) for leaf in self.leaves}

    def leaf(self, leaf):
        kind, text = leaf["kind"], leaf.get("value", "")
        if kind not in ("array", "key", "numpy", "numpy_scalar"):
            return INLINE[kind](text)
        shape = leaf.get("stored_shape") or leaf.get("shape", [])
        dtype = np.dtype(getattr(ml_dtypes, name := leaf.get("stored_dtype") or leaf["dtype"], name))
        if 0 in shape:
            return np.zeros(shape, dtype)
        array = self.chunks(leaf, shape, dtype) if leaf.get("chunk") is not None else self.zarr(leaf)
        plain = np.dtype(getattr(ml_dtypes, leaf["dtype"], leaf["dtype"])) if kind != "key" else dtype
        return array.view(plain)

    def chunks(self, leaf, shape, dtype):
        """Chunks of raw elements, each followed by its CRC."""
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{self.directory}/state/"}).result()
        whole, name = np.empty(shape, dtype), ".".join(leaf["path"])
        for at in itertools.product(*(range(size // part) for size, part in zip(shape, leaf["chunk"], strict=True))):
            key = "/".join((name, "c", *map(str, at)))
            body = store.read(key).result().value
            said = int.from_bytes(body[-4:], "little")
            assert crc32c.crc32c(body[:-4]) == said and f"{said:08x}" == self.manifest["chunks"][key], key
            where = tuple(slice(i * part, (i + 1) * part) for i, part in zip(at, leaf["chunk"], strict=True))
            whole[where] = np.frombuffer(body[:-4], dtype).reshape(leaf["chunk"])
        return whole

    def parts(self):
        """Chunk -> whether each of its parts has the CRC that follows the chunk in its data file."""
        found = {}
        for name in (name for name in self.files if name.startswith("receipts/")):
            receipt = record(self.file(name))
            for key, (number, offset, size, _) in receipt["places"].items():
                data = (self.directory / receipt["files"][number]["path"]).read_bytes()[offset:]
                elements = data[: size - 4]
                parts = [elements[at : at + 262144] for at in range(0, len(elements), 262144)]
                if len(parts) > 1:
                    said = np.frombuffer(data[size : size + 4 * len(parts)], "<u4").tolist()
                    found[key] = said == [crc32c.crc32c(part) for part in parts]
        return found

    def zarr(self, leaf):
        """Compressed, or Orbax's own."""
        plain = {"item": "", "driver": "zarr3", "ocdbt": True, "name": ".".join(leaf["path"])}
        where = leaf.get("foreign", plain)
        item = self.directory / "state" / where["item"]
        store = {"driver": "ocdbt", "base": f"file://{item}/", "path": where["name"] + "/"}
        if not where["ocdbt"]:
            store = {"driver": "file", "path": f"{item}/{where['name']}/"}
        return ts.open({"driver": where["driver"], "kvstore": store}, open=True, read=True).result().read().result()


INLINE = {
    "none": lambda text: None,
    "bool": lambda text: text == "True",
    "int": int,
    "float": float.fromhex,
    "complex": lambda text: complex(*map(float.fromhex, text.split())),
    "str": str,
    "bytes": base64.b64decode,
    "empty": lambda text: {"tuple": (), "list": [], "dict": {}}[text],
}


if __name__ == "__main__":
    chosen = Step(Path(sys.argv[1]).resolve(), *(int(word) for word in sys.argv[2:]))
    for path, value in chosen.read().items():
        data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        print("/".join(path), f"{zlib.crc32(data):08x}")
