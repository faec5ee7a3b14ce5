"""Items and leaves whose names begin like one another, with dots, slashes and escapes: plain Orbax finds in the
directory of each item what was saved as that item, and nothing of another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from orchestrator import compat
from orchestrator.cli.main import main

ARGS = ocp.args


def one(number: float) -> jax.Array:
    return jnp.full((2, 3), number)


CASES: dict[str, dict[str, Any]] = {
    "a prefix with a dot": {"a": {"x": one(1)}, "a.b": {"x": one(2)}, "a.b.c": {"x": one(3), "d": {"y": one(4)}}},
    "the same texts in both": {"a": {"s": "one", "x": one(1)}, "a.b": {"s": "two", "x": one(2)}},
    "a leaf like an item": {"a": {"b": {"w": one(1)}}, "a.b": {"v": one(2)}},
    "leaves with dots": {"a": {"b.w": one(1), "c.": one(2)}, "a.b": {"v.w": one(3)}},
    "leaves with slashes": {"a": {"b/c": one(1), "t/u": "text"}, "a.b": {"c/d": one(2), "t": "x"}},
    "leaves like chunks": {"a": {"c": one(1), "x": jnp.float32(2)}, "a.c": {"c": one(3), "zarr.json": one(4)}},
    "escapes": {"a": {"~0": one(1), "~1x": "t~1u", "%2F": one(2)}, "a%2F": {"x": one(3)}, "a~b": {"x": one(4)}},
    "items that are arrays": {"a": one(1), "a.b": one(2), "a.b.c": {"x": one(3)}},
    "spaces and other letters": {"ä": {"x": one(1)}, "ä.ö": {"x y": one(2), "ü": "ß"}},
    "lists below": {"a": [one(1), {"b": one(2)}], "a.0": {"x": one(3)}},
    "an item without arrays": {"a": {"s": "t", "n": None}, "a.s": {"x": one(1)}},
}


KEYS = {"typed": jax.random.key(3), "typed.raw": jax.random.PRNGKey(4), "typed.raw.x": {"x": one(1)}}


def test_plain_orbax_finds_random_keys_in_its_own_form(root: Path, tmp_path: Path) -> None:
    args: dict[str, Any] = {name: ARGS.JaxRandomKeySave(key) for name, key in KEYS.items() if name != "typed.raw.x"}
    with compat.CheckpointManager(root) as manager:
        assert manager.save(1, args=ARGS.Composite(**args, **{"typed.raw.x": saved(KEYS["typed.raw.x"])}))
    asked: dict[str, Any] = {name: ARGS.JaxRandomKeyRestore() for name in args}
    assert main(["orchestrator", "export", str(root), str(tmp_path / "out")]) == 0
    assert main(["orchestrator", "adopt", str(tmp_path / "back"), f"--from={tmp_path / 'out'}"]) == 0
    options = ocp.CheckpointManagerOptions(read_only=True)
    for directory, kind in ((root, ocp), (tmp_path / "out", ocp), (root, compat), (tmp_path / "back", compat)):
        with kind.CheckpointManager(directory, options=options) as reader:
            found = reader.restore(1, args=ARGS.Composite(**asked, **{"typed.raw.x": ARGS.PyTreeRestore()}))
        assert_same({name: found[name] for name in KEYS}, KEYS)


def saved(item: Any) -> Any:
    return ARGS.ArraySave(item) if isinstance(item, jax.Array) else ARGS.PyTreeSave(item)


def restored(item: Any) -> Any:
    return ARGS.ArrayRestore() if isinstance(item, jax.Array) else ARGS.PyTreeRestore()


def arrays_in(directory: Path) -> tuple[int, int]:
    """How many are in an item's store, and how many have a sharding there."""
    if not (directory / "manifest.ocdbt").exists():
        return 0, 0
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}).result()
    keys = store.list().result()
    return sum(key.endswith(b"/zarr.json") for key in keys), len(json.loads((directory / "_sharding").read_text()))


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if isinstance(want, jax.Array) and jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(got) == jax.random.key_impl(want)
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        assert got == want if isinstance(want, str) else np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("case", CASES)
def test_plain_orbax_finds_each_item_whole_and_nothing_of_anothers(case: str, root: Path, tmp_path: Path) -> None:
    items = CASES[case]
    with compat.CheckpointManager(root) as manager:
        assert manager.save(1, args=ARGS.Composite(**{name: saved(item) for name, item in items.items()}))
    assert main(["orchestrator", "export", str(root), str(tmp_path / "out")]) == 0
    for directory, kind in ((root, compat), (root, ocp), (tmp_path / "out", ocp)):
        options = ocp.CheckpointManagerOptions(read_only=True)
        with kind.CheckpointManager(directory, options=options) as reader:
            found = reader.restore(1, args=ARGS.Composite(**{name: restored(item) for name, item in items.items()}))
        for name, item in items.items():
            assert_same(found[name], item)
            about = json.loads((directory / "1" / name / "_METADATA").read_text())
            leaves = jax.tree.leaves(item, is_leaf=lambda leaf: leaf is None)
            assert len(about["tree_metadata"]) == len(leaves)
            stored = sum(isinstance(leaf, jax.Array) for leaf in leaves)
            assert arrays_in(directory / "1" / name) == (stored, stored)
