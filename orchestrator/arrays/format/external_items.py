"""Item directories that Orbax's own CheckpointManager has written: what leaves they hold, as tree-spec leaves.

Reads the JSON that Orbax documents its trees with, and opens each array once for its shape and dtype. zarr2 or zarr3,
in an OCDBT store or a directory for each array.
"""

from __future__ import annotations

from typing import Any

import jax
import tensorstore as ts

from orchestrator.arrays.format import orbax_json
from orchestrator.arrays.format.tensorstore_specs import context, external_spec
from orchestrator.arrays.inline_values import inline_text
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.errors import Damaged, UsageError
from orchestrator.rules import arguments
from orchestrator.rules.keys import check_key
from orchestrator.rules.records import ExternalArray, LeafSpec
from orchestrator.storage.store_path import AnyPath, url_of

_TIMEOUT_S = 600.0
_ARRAY = "checkpoint"  # Orbax's name for an array that is an item itself
_EMPTY = {"Dict": "dict", "List": "list", "Tuple": "tuple", "NamedTuple": "tuple"}


def is_tree(directory: AnyPath) -> bool:
    """Whether this is an item that holds a pytree of arrays."""
    return (directory / "_METADATA").is_file()


def is_array(directory: AnyPath) -> bool:
    """Whether this is an item that is one array, as versions before 0.12 wrote it: nothing but the array."""
    base = directory
    return (base / _ARRAY / ".zarray").is_file() and {path.name for path in base.iterdir()} <= {_ARRAY, "_sharding"}


def describe_array(directory: AnyPath, item: str) -> LeafSpec:
    """The one leaf of such an item, without a path. As `describe`."""
    base, external = directory, ExternalArray(item=item, driver="zarr", ocdbt=False, name=_ARRAY)
    future = ts.open(external_spec(url_of(base), external), open=True, read=True, context=context())
    return _array_leaf((), external, "jax.Array", _result(base, external, future), None, str(base))


def describe(directory: AnyPath, item: str) -> list[LeafSpec]:
    """The leaves of the item in `directory`, which will be `state/<item>` of an attempt ('': `state` itself); their
    paths begin with the item. Raises Damaged naming what cannot be read, UsageError for a leaf of an unknown kind."""
    base = directory
    metadata = orbax_json.read(base / "_METADATA", orbax_json.TreeMetadata)
    driver = "zarr3" if metadata.use_zarr3 else "zarr"
    ocdbt = (base / "manifest.ocdbt").exists() if metadata.use_ocdbt is None else metadata.use_ocdbt
    strings = base / "_strings.json"
    texts = orbax_json.read(strings, dict[str, Any]) if strings.exists() else {}
    keys = _key_implementations(base)
    above = (item,) if item else ()
    opened: list[tuple[tuple[str, ...], ExternalArray, str, Any]] = []
    leaves: list[LeafSpec] = []
    shared = context()
    paths = [entry.path for entry in metadata.tree_metadata.values()]
    if len(set(paths)) < len(paths):
        raise Damaged(f"{base}/_METADATA: describes a leaf twice")
    if not all(arguments.is_utf8(name) for path in paths for name in path):
        raise Damaged(f"{base}/_METADATA: a leaf's name is not UTF-8")
    for entry in metadata.tree_metadata.values():
        path, name, kind = (*above, *entry.path), ".".join(entry.path), entry.value_metadata.value_type
        if kind == "None":
            leaves.append(LeafSpec(path=path, kind="none"))
        elif kind in _EMPTY:
            leaves.append(LeafSpec(path=path, kind="empty", value=_EMPTY[kind]))
        elif kind == "string":
            if not isinstance(texts.get(name), str):
                raise Damaged(f"{strings}: no text for {name}")
            leaves.append(LeafSpec(path=path, kind="str", value=texts[name]))
        elif kind in ("jax.Array", "np.ndarray", "scalar"):
            if entry.value_metadata.skip_deserialize:
                raise UsageError(
                    f"{base}: {name} is in the file `checkpoint`, where older versions of Orbax kept small arrays; "
                    "restore the step with Orbax and save it here"
                )
            check_key(name, f"{base}/_METADATA")
            external = ExternalArray(item=item, driver=driver, ocdbt=ocdbt, name=name)
            future = ts.open(external_spec(url_of(base), external), open=True, read=True, context=shared)
            opened.append((path, external, kind, future))
        else:
            raise UsageError(f"{base}: {name} is of Orbax's kind {kind!r}, which cannot be adopted")
    for path, external, kind, future in opened:
        array = _result(base, external, future)
        if kind == "scalar" and array.shape == ():
            text_kind, text = inline_text(_result(base, external, array.read()).item())
            leaves.append(LeafSpec(path=path, kind=text_kind, value=text))
        else:
            leaves.append(_array_leaf(path, external, kind, array, keys.get(external.name), str(base)))
    return leaves


def _result(base: AnyPath, external: ExternalArray, future: Any) -> Any:
    try:
        return future.result(timeout=_TIMEOUT_S)
    except (ValueError, OSError, NotImplementedError) as error:
        raise Damaged(f"{base}: {external.name} cannot be read: {error}") from error


def _key_implementations(base: AnyPath) -> dict[str, str]:
    """Array name -> implementation, of typed PRNG keys."""
    found = {}
    folder = base / "array_metadatas"
    below: list[AnyPath] = sorted(folder.iterdir(), key=str) if folder.is_dir() else []
    for path in (each for each in below if each.name.startswith("process_")):
        for entry in orbax_json.read(path, orbax_json.ArrayMetadatas).array_metadatas:
            array = entry.array_metadata
            if array.ext_metadata and array.ext_metadata.random_key_impl:
                found[array.param_name] = array.ext_metadata.random_key_impl
    return found


@in_own_context
def _array_leaf(
    path: tuple[str, ...], external: ExternalArray, kind: str, array: Any, key: str | None, where: str
) -> LeafSpec:
    shape, dtype = tuple(array.shape), str(array.dtype.name)
    if key:
        try:
            one = jax.eval_shape(lambda: jax.random.key(0, impl=key))
        except ValueError as error:
            raise UsageError(f"{where}: {external.name} is a PRNG key of kind {key!r}: {error}") from error
        data = jax.eval_shape(jax.random.key_data, one)
        return LeafSpec(
            path=path,
            kind="key",
            shape=shape[: len(shape) - len(data.shape)],
            dtype=str(one.dtype),
            stored_shape=shape,
            stored_dtype=dtype,
            value=key,
            external=external,
        )
    named = "numpy" if kind == "np.ndarray" else "array"
    return LeafSpec(path=path, kind=named, shape=shape, dtype=dtype, external=external)
