"""`orchestrator export`: other programs read what was saved, bit for bit; memory is bounded; nothing half is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.cli.export import Exported
from orchestrator.cli.main import main
from orchestrator.tools import export as export_tool
from tests.support.runs import now
from tests.support.snapshots import snapshot


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "w": rng.random((64, 64), dtype=np.float32),
        "bf16": rng.integers(0, 2**16, (8, 8), dtype=np.uint16).view(ml_dtypes.bfloat16),
        "ids": rng.integers(-9, 9, (7,), dtype=np.int8),
        "flag": np.array(True),
    }


@pytest.fixture
def run(root: Path, mesh8: jax.sharding.Mesh) -> Path:
    both = NamedSharding(mesh8, PartitionSpec("data", "model"))
    state: dict[str, Any] = {
        "params": {
            name: jax.device_put(value, both if value.ndim == 2 else NamedSharding(mesh8, PartitionSpec()))
            for name, value in arrays().items()
        },
        "rng": jax.random.key(3),
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "lr": 0.5,
    }
    with oc.Agent(root, options=now()) as agent:
        agent.save(7, state, metrics={"loss": 0.25}, extra={"note": "x"})
    return root


def export(run: Path, destination: Path, form: str, step: str = "newest") -> int:
    return main(["orchestrator", "export", str(run), step, str(destination), f"--format={form}", "--json"])


def test_numpy_files_are_what_was_saved_and_the_index_has_the_rest(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "out", "numpy", "7") == 0
    done = msgspec.json.decode(capsys.readouterr().out, type=Exported)
    assert (done.step, done.format) == (7, "numpy")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    leaves = {"/".join(leaf["path"]): leaf for leaf in index["leaves"]}
    for name, value in arrays().items():
        leaf = leaves[f"params/{name}"]
        got = np.load(tmp_path / "out" / leaf["file"]).view(getattr(ml_dtypes, leaf["dtype"], leaf["dtype"]))
        assert got.dtype == value.dtype and got.shape == value.shape and got.tobytes() == value.tobytes()
    assert leaves["params/bf16"]["file_dtype"] == "uint16"
    assert np.load(tmp_path / "out" / leaves["empty"]["file"]).shape == (0, 3)
    assert np.load(tmp_path / "out" / leaves["rng"]["file"]).tolist() == [0, 3]
    assert float.fromhex(leaves["lr"]["value"]) == 0.5 and index["metrics"] == {"loss": 0.25}
    assert done.bytes == sum(value.nbytes for value in arrays().values()) + 8


def test_safetensors_own_library_reads_the_file(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the `safetensors` extra is not installed")
    assert export(run, tmp_path / "out.safetensors", "safetensors") == 0
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {*(f"params.{name}" for name in arrays()), "rng", "empty"}
        assert json.loads(file.metadata()["metrics"]) == {"loss": 0.25}
        for name, value in arrays().items():
            if value.dtype != ml_dtypes.bfloat16:  # numpy has none: compared below
                assert np.array_equal(file.get_tensor(f"params.{name}"), value)
    body = (tmp_path / "out.safetensors").read_bytes()
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + size])
    start, end = header["params.bf16"]["data_offsets"]
    assert header["params.bf16"]["dtype"] == "BF16" and (8 + size) % 8 == 0
    assert body[8 + size + start : 8 + size + end] == arrays()["bf16"].tobytes()


def test_plain_orbax_reads_the_orbax_export(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "orbax") == 0
    target = {"params": {name: jnp.zeros(value.shape, value.dtype) for name, value in arrays().items()}}
    with ocp.PyTreeCheckpointer() as reader:
        restored = reader.restore(
            tmp_path / "out",
            args=ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
            ),
        )
    for name, value in arrays().items():
        assert np.asarray(restored["params"][name]).tobytes() == value.tobytes()


@pytest.mark.parametrize("form", ["numpy", "safetensors", "orbax"])
def test_damage_is_rejected_and_nothing_is_left(
    run: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in (run / "steps").rglob("d/*"):
        body = bytearray(data.read_bytes())
        at = bytes(body).find(arrays()["w"].tobytes()[:16])
        if at >= 0:
            body[at] ^= 1
            data.write_bytes(body)
    (tmp_path / "to").mkdir()
    assert export(run, tmp_path / "to" / "out", form) == 4
    assert "crc32c" in capsys.readouterr().err and list((tmp_path / "to").iterdir()) == []


def swaps(root: Path) -> list[tuple[Path, Path]]:
    """(a file of step 7's state, another save's file of the same size that stands in its place)."""
    ours, theirs = (
        [path for path in (root / "steps" / f"{step:08d}").rglob("state/**/*") if path.is_file()] for step in (7, 6)
    )
    return [
        (mine, other)
        for mine in ours
        for other in theirs
        if other.stat().st_size == mine.stat().st_size and other.read_bytes() != mine.read_bytes()
    ]


@pytest.mark.parametrize("mebibytes", [1, 6], ids=["with a second checksum", "too large for one"])
def test_what_verify_calls_damaged_no_format_exports(root: Path, tmp_path: Path, mebibytes: int, capsys: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        for step in (6, 7):
            agent.save(step, {"w": np.full(mebibytes << 18, step, np.float32), "small": np.full(3, step)})
    pairs = swaps(root)
    assert pairs, "two saves of one tree have files of one size"
    for number, (mine, other) in enumerate(pairs):
        whole = mine.read_bytes()
        mine.write_bytes(other.read_bytes())
        assert main(["orchestrator", "verify", str(root), "--step=7", "--repair_journal=never"]) == 4
        for form in export_tool.FORMATS:
            code = export(root, tmp_path / "to" / f"{form}-{number}", form, "7")
            # What a format does not read cannot hurt it; what it writes is then what was saved.
            assert code == 4 if form == "orbax" else code in (0, 4), (mine, form)
            if code == 0:
                assert_saved(tmp_path / "to" / f"{form}-{number}", form, np.full(mebibytes << 18, 7, np.float32))
        mine.write_bytes(whole)
    said = capsys.readouterr().err
    assert f"{root}/steps/00000007" in said and ".partial" not in said


def assert_saved(out: Path, form: str, value: np.ndarray) -> None:
    assert (
        value.tobytes() in out.read_bytes() if form == "safetensors" else np.array_equal(np.load(out / "w.npy"), value)
    )


SCHEMES = [
    "gs://bucket/dest",
    "s3://b/d",
    "file:///tmp/x",
    "file:x",
    "http://h/x",
    "gs:/bucket/dest",
    "GS://b/x",
    "az+x://y",
]


@pytest.mark.parametrize(
    "words",
    [
        *(["export", "newest", "DEST", f"--format={form}"] for form in export_tool.FORMATS),
        ["report", "--output=DEST"],
        ["report", "-o", "DEST"],
        *([name, "--events_dir=DEST"] for name in ("watch", "doctor", "report", "plan")),
    ],
    ids=" ".join,
)
def test_a_url_is_no_path(
    run: Path, tmp_path: Path, words: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    name, *more = words
    for url in SCHEMES:
        assert main(["orchestrator", name, str(run), *(word.replace("DEST", url) for word in more)]) == 2
        err = capsys.readouterr().err
        assert "expected a path on this machine" in err and url in err and "gcloud storage cp" in err
        assert err.count("\n") == 1 and snapshot(tmp_path) == before


def test_a_name_with_a_colon_is_a_path_when_it_says_so(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["orchestrator", "export", str(run), "7", "./gs:x", "--format=numpy"]) == 0
    assert main(["orchestrator", "report", str(run), "-o", "./at 12:30.html"]) == 0
    assert (tmp_path / "gs:x" / "index.json").exists() and (tmp_path / "at 12:30.html").exists()


LONG = "x" * 300


@pytest.mark.parametrize(
    ("names", "form", "rejected"),
    [
        (["__metadata__"], "safetensors", "__metadata__: safetensors keeps this name for itself"),
        (["__metadata__"], "numpy", None),
        (["index", "index.json", ".", "..", "W", "w", " ", "CON", "é", "a/b", "a\\b", "%41", "A"], "numpy", None),
        (["index", "index.json", ".", "..", "W", "w", " ", "é", "a/b", "%41", "A"], "safetensors", None),
        ([LONG, LONG + "y", "leaf-0", "leaf-1", "LEAF-0"], "numpy", None),
        ([LONG, LONG + "y", "leaf-0"], "safetensors", None),
    ],
)
def test_every_leaf_is_in_the_export_under_a_name_of_its_own(
    root: Path, tmp_path: Path, names: list[str], form: str, rejected: str | None, capsys: Any
) -> None:
    state = {name: np.full(2, number, np.int32) for number, name in enumerate(names)} | {"text": "", "none": None}
    with oc.Agent(root, options=now()) as agent:
        agent.save(7, state)
    code = export(root, tmp_path / "out", form)
    if rejected:
        assert code == 2 and rejected in capsys.readouterr().err and not (tmp_path / "out").exists()
        return
    assert code == 0
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(exported(tmp_path / "out", form, name), value), name
    if form == "numpy":
        files = [path.name for path in (tmp_path / "out").iterdir()]
        assert len({name.lower() for name in files}) == len(names) + 1
    else:
        header = header_of(tmp_path / "out")
        assert json.loads(header["__metadata__"]["values"]).keys() == {"text", "none"}


def header_of(path: Path) -> dict[str, Any]:
    body = path.read_bytes()
    return dict(json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")]))


def exported(out: Path, form: str, name: str) -> np.ndarray:
    if form == "numpy":
        (leaf,) = (leaf for leaf in json.loads((out / "index.json").read_text())["leaves"] if leaf["path"] == [name])
        return np.load(out / leaf["file"])
    entry, body = header_of(out)[name], out.read_bytes()
    start, end = (8 + int.from_bytes(body[:8], "little") + offset for offset in entry["data_offsets"])
    return np.frombuffer(body[start:end], np.int32)


def test_two_leaves_of_one_name_are_rejected() -> None:
    for form, reserved in (("numpy", frozenset[str]()), ("safetensors", frozenset({"__metadata__"}))):
        with pytest.raises(oc.UsageError, match=rf"a.b: {form} would hold two leaves of this name; use"):
            export_tool._distinct(["a", "a.b", "a.b"], form, reserved)


@pytest.mark.parametrize(
    ("step", "form", "place", "code", "said"),
    [
        ("newest", "numpy", "taken", 2, "exists; export to a new name"),
        ("newest", "zip", "out", 2, "--format=zip: choose from orbax, safetensors, numpy"),
        ("8", "numpy", "out", 6, "step 8 is not in this run"),
        ("x", "numpy", "out", 2, "expected the number of a step, or newest"),
        ("7", "numpy", "taken/below", 1, "File exists"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    run: Path, tmp_path: Path, step: str, form: str, place: str, code: int, said: str, capsys: Any
) -> None:
    (tmp_path / "taken").write_text("")
    before = snapshot(tmp_path)
    assert export(run, tmp_path / place, form, step) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and snapshot(tmp_path) == before


def test_a_dtype_that_safetensors_lacks_is_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(0, {"a": jnp.zeros((2,), jnp.int4)})
    assert export(root, tmp_path / "out", "safetensors") == 2
    assert "a: safetensors has no name for int4" in capsys.readouterr().err


def test_slabs_laid_end_to_end_are_the_array(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_tool, "SLAB_BYTES", 300)  # less than two rows of `w`
    assert export(run, tmp_path / "out", "numpy") == 0
    assert np.array_equal(np.load(tmp_path / "out" / "params.w.npy"), arrays()["w"])


@pytest.fixture(scope="module")
def large() -> Iterator[Path]:
    """A run whose one array has 768 MiB."""
    with tempfile.TemporaryDirectory(prefix="large-") as folder:
        root = Path(folder) / "run"
        with oc.Agent(root, options=now(), keep=oc.last(1)) as agent:
            agent.save(0, {"w": jnp.zeros((192, 1 << 20), jnp.float32)})
        yield root


@pytest.mark.slow
@pytest.mark.parametrize("form", ["numpy", "safetensors", "orbax"])
def test_memory_does_not_grow_with_the_array(large: Path, tmp_path: Path, form: str) -> None:
    program = (
        "import sys; from pathlib import Path; import orchestrator.tools.export\n"
        "from orchestrator.cli.main import main\n"
        "used = lambda key: int(next(line for line in Path('/proc/self/status').read_text().splitlines()"
        " if line.startswith(key)).split()[1]) >> 10\n"
        "base = used('VmRSS'); code = main(['orchestrator', 'export', sys.argv[1], '0', sys.argv[2],"
        " '--format=' + sys.argv[3]]); print(used('VmHWM') - base); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(large), str(tmp_path / "out"), form],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 400  # MiB
