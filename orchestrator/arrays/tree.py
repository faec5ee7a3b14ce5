"""Pytrees taken apart: which leaves a state has, of what kind, and which of them an array store holds.

Moves no array data, does no I/O and knows neither Orbax nor TensorStore. How each kind of leaf is stored is in
docs/reference/on-disk-format.md. In short: arrays in the array store; Python scalars, strings, bytes, None and empty
containers exactly, in the tree spec (and, where Orbax can, in its files too, for plain readers); zero-size arrays in
the tree spec alone; anything else is rejected before anything is written.
"""

from __future__ import annotations

import base64
import functools
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from msgspec import structs

from orchestrator.arrays.jax_context import in_own_context
from orchestrator.errors import Damaged, UnsupportedLeaf, UsageError
from orchestrator.rules import validate, zarr_chunks
from orchestrator.rules.dtypes import ITEM_BYTES, STORED_AS
from orchestrator.rules.matching import TargetLeaf
from orchestrator.rules.records import LeafSpec, TreeSpec

STORABLE = frozenset(ITEM_BYTES)


@functools.lru_cache(maxsize=256)
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name that a tree spec may have, of ml_dtypes' where numpy has none. Raises UsageError."""
    if name in STORABLE or name in STORED_AS:  # numpy reads a language of its own in other names
        try:
            return np.dtype(getattr(ml_dtypes, name, name))
        except TypeError:
            pass
    raise UsageError(f"dtype {name!r} is unknown to this numpy and ml_dtypes; install newer ones")


@dataclass(frozen=True, eq=False)
class Form:
    """What the saves of one job have in common, so that it is worked out once: structure, shapes, dtypes, shardings.

    Not the values of Python numbers and strings: `leaves` has those of the first save. One object for one form: it may
    be a key. Holds no data.

    treedef: with None and empty containers as leaves. bare: with them as structure, as JAX has them; `empties`: each,
    with its number among `leaves`. arrays: which leaves are arrays of JAX; `shardings`: (aval, sharding) of each.
    others: the rest, numbered, each with what two saves must have in common there.
    """

    treedef: Any
    bare: Any
    leaves: tuple[LeafSpec, ...]
    mesh: dict[str, int]
    empties: tuple[tuple[int, Any], ...]
    arrays: tuple[int, ...]
    shardings: list[Any]
    others: tuple[tuple[int, Any], ...]


@dataclass(frozen=True)
class Flat:
    """A tree taken apart: the spec, and for each leaf of it the value to store."""

    spec: TreeSpec
    values: Sequence[Any]
    form: Form


_ON_DEVICES = operator.attrgetter("aval", "sharding")
_IS_DELETED = operator.methodcaller("is_deleted")
_recent: deque[Form] = deque(maxlen=4)


def flatten(tree: Any) -> Flat:
    """Describe every leaf of `tree`. Moves no data. Quick for a tree of a form that was flattened lately.

    Raises UnsupportedLeaf naming the path for values that cannot be stored, deleted (donated) arrays and name clashes.
    """
    try:
        values, bare = jax.tree_util.tree_flatten(tree)
    except (ValueError, SystemError, RecursionError) as error:  # keys that have no order; a stack that overflows
        raise UnsupportedLeaf(_no_tree(tree, error)) from error
    for form in tuple(_recent):
        if form.bare == bare and (flat := _as_before(form, values)):
            _remember(form)
            return flat
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
    values = [value for _, value in with_paths]
    leaves = tuple(_describe(tree_path(path), value) for path, value in with_paths)
    if leaves[0].path == () and leaves[0].kind in ("none", "empty"):
        raise UnsupportedLeaf("the state has no leaves: there is nothing to save")
    _check_names(leaves)
    mesh = next((dict(sharding.mesh.shape) for value in values if (sharding := _named(value))), {})
    numbered = list(enumerate(values))
    arrays = tuple(number for number, value in numbered if isinstance(value, jax.Array))
    # Of a type of the user's own, an empty container may be a leaf to JAX as well.
    empties = tuple(
        (number, value) for number, value in numbered if _is_empty(value) and not jax.tree_util.tree_leaves(value)
    )
    rest = sorted({number for number, _ in numbered} - {*arrays, *(number for number, _ in empties)})
    form = Form(
        treedef,
        bare,
        leaves,
        mesh,
        empties,
        arrays,
        [_ON_DEVICES(values[number]) for number in arrays],
        tuple((number, _form_key(leaves[number], values[number])) for number in rest),
    )
    _remember(form)
    return Flat(TreeSpec(leaves=leaves), values, form)


def _no_tree(tree: Any, error: BaseException) -> str:
    if isinstance(error, ValueError):
        return f"the state is no pytree: {error} All keys of a dict must be of one kind that can be ordered"
    return f"the state ({type(tree).__name__}) contains itself, or is nested too deeply for JAX"


def _remember(form: Form) -> None:
    """As the one used last. Main thread."""
    if form in _recent:
        _recent.remove(form)
    _recent.appendleft(form)


def _as_before(form: Form, bare_values: Sequence[Any]) -> Flat | None:
    """A tree of this form's structure as one of this form, None if its leaves are not. Arrays without a step of Python
    for each."""
    values = list(bare_values)
    for number, value in form.empties:
        values.insert(number, value)
    arrays = [values[number] for number in form.arrays]
    try:
        if list(map(_ON_DEVICES, arrays)) != form.shardings:
            return None
    except AttributeError:  # one is no array of JAX any more
        return None
    if any(map(_IS_DELETED, arrays)):
        for number in form.arrays:
            _check_live(form.leaves[number].label, values[number])
    changed: dict[int, LeafSpec] = {}
    for number, key in form.others:
        leaf = form.leaves[number]
        told = _describe(leaf.path, values[number])
        if _form_key(told, values[number]) != key:
            return None
        if told != leaf:
            changed[number] = told
    leaves = form.leaves
    if changed:
        leaves = tuple(changed.get(number, leaf) for number, leaf in enumerate(leaves))
    return Flat(TreeSpec(leaves=leaves), values, form)


def _form_key(leaf: LeafSpec, value: Any) -> Any:
    """What two saves must have in common at a leaf that is no array of JAX, for it to be stored in the same way."""
    if isinstance(value, jax.Array):
        return _ON_DEVICES(value)
    if leaf.kind == "empty":
        return leaf, type(value)
    if leaf.kind_stored:
        return leaf
    return structs.replace(leaf, value=""), leaf.kind == "int" and fits_int64(value)


def fits_int64(value: int) -> bool:
    """Not by `in range`: of an int of a subclass (an IntEnum) that asks every number of the range, for ever."""
    return -(2**63) <= value < 2**63


def targets(like: Any) -> tuple[list[TargetLeaf], list[Any], Any]:
    """A target tree taken apart: what is wanted at each path, the target leaves themselves, the tree structure."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_empty)
    wanted = []
    for raw_path, value in with_paths:
        path = tree_path(raw_path)
        if isinstance(value, jax.ShapeDtypeStruct):
            kind, dtype = _target_form(value.dtype)
            wanted.append(TargetLeaf(path, kind, tuple(value.shape), dtype, _held(value.dtype)))
        else:
            spec = _describe(path, value, check_live=False)
            wanted.append(TargetLeaf(path, spec.kind, spec.shape, spec.dtype))
    return wanted, [value for _, value in with_paths], treedef


@functools.lru_cache(maxsize=256)
def _target_form(dtype: Any) -> tuple[str, str]:
    """(kind, dtype's name) of an abstract array. Kept, as numpy takes 30 microseconds to name one."""
    return "key" if _is_key(dtype) else "array", str(dtype)


def _held(dtype: Any) -> str:
    """The dtype that an array of `dtype` has in this process, '' if it is that one. It may change: x64 is a setting."""
    held = dtype if _is_key(dtype) else jax.dtypes.canonicalize_dtype(dtype)
    return "" if held == dtype else str(held)


def _is_empty(value: Any) -> bool:
    """None and empty containers are leaves for us: they are part of what was saved."""
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def tree_path(path: Sequence[Any]) -> tuple[str, ...]:
    """JAX's key path as the names that a tree spec uses."""
    names = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            names.append(str(key))
    return tuple(names)


def _named(value: Any) -> jax.sharding.NamedSharding | None:
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _describe(path: tuple[str, ...], value: Any, *, check_live: bool = True) -> LeafSpec:
    label = "/".join(path) or "(root)"
    if isinstance(value, jax.Array):
        if isinstance(value, jax.core.Tracer):
            raise UnsupportedLeaf(f"{label}: {value} is being traced; save and restore outside of jax.jit and the like")
        if check_live:
            _check_live(label, value)
        return _describe_jax(path, value)
    if isinstance(value, np.ndarray | np.generic):
        kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        stored = STORED_AS.get(value.dtype.name, "")
        if (stored or value.dtype.name) not in STORABLE:
            raise UnsupportedLeaf(
                f"{label}: numpy dtype {value.dtype} cannot be stored; convert it to numbers or bytes"
            )
        if isinstance(value, np.ma.MaskedArray):
            raise UnsupportedLeaf(f"{label}: a masked array would lose its mask; save `data` and `mask` as two leaves")
        chunk = zarr_chunks.chunk_shape(value.shape, value.dtype.itemsize) if value.size else None
        return LeafSpec(
            path=path, kind=kind, shape=value.shape, dtype=value.dtype.name, stored_dtype=stored, chunk=chunk
        )
    try:
        text = _inline(value)
        if isinstance(value, str):
            value.encode()
    except ValueError as error:  # lone surrogates; an int of thousands of digits
        raise UnsupportedLeaf(f"{label}: {error}; keep it as bytes") from error
    if text is None:
        raise UnsupportedLeaf(
            f"{label}: {type(value).__module__}.{type(value).__qualname__} is neither an array nor a plain value; "
            "register its class with jax.tree_util.register_dataclass, or keep it in `extra`"
        )
    return LeafSpec(path=path, kind=text[0], value=text[1])


def _check_live(label: str, value: jax.Array) -> None:
    if value.is_deleted():
        raise UnsupportedLeaf(f"{label}: the array was donated or deleted; save the state that the step returned")


def _describe_jax(path: tuple[str, ...], value: jax.Array) -> LeafSpec:
    if _is_key(value.dtype):
        return _describe_key(path, value)
    name, stored, sharding, chunk = _array_form(value.dtype, value.shape, value.sharding)
    if (stored or name) not in STORABLE:
        raise UnsupportedLeaf(f"{'/'.join(path)}: dtype {name} cannot be stored; cast it to one that TensorStore has")
    return LeafSpec(
        path=path, kind="array", shape=value.shape, dtype=name, stored_dtype=stored, sharding=sharding, chunk=chunk
    )


@in_own_context
def _describe_key(path: tuple[str, ...], value: jax.Array) -> LeafSpec:
    data = jax.eval_shape(jax.random.key_data, value)
    return LeafSpec(
        path=path,
        kind="key",
        shape=value.shape,
        dtype=str(value.dtype),
        stored_shape=tuple(data.shape),
        stored_dtype=str(data.dtype),
        sharding=_shown(value.sharding),
        value=str(jax.random.key_impl(value)),
        chunk=_chunk(value.shape, value.sharding, tuple(data.shape), data.dtype.itemsize),
    )


@functools.lru_cache(maxsize=256)
def _is_key(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


@functools.lru_cache(maxsize=4096)
def _array_form(
    dtype: np.dtype[Any], shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> tuple[str, str, str, tuple[int, ...] | None]:
    """dtype, stored dtype, sharding and chunk shape of a leaf: a state has many leaves of few forms."""
    chunk = _chunk(shape, sharding, shape, dtype.itemsize)
    return dtype.name, STORED_AS.get(dtype.name, ""), _shown(sharding), chunk


def _shown(sharding: jax.sharding.Sharding) -> str:
    return str(sharding.spec) if isinstance(sharding, jax.sharding.NamedSharding) else type(sharding).__name__


def _chunk(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, stored_shape: tuple[int, ...], item_bytes: int
) -> tuple[int, ...] | None:
    """Chunks tile every shard, so that no two processes write one chunk. None for an array without elements."""
    if 0 in shape:
        return None
    shard = sharding.shard_shape(shape)
    return zarr_chunks.chunk_shape((*shard, *stored_shape[len(shard) :]), item_bytes)


def inline_text(value: bool | int | float | complex) -> tuple[str, str]:
    """(kind, text) of a Python number in the tree spec. Inverse of `inline_value`."""
    told = _inline(value)
    assert told is not None
    return told


def _inline(value: Any) -> tuple[str, str] | None:
    """(kind, text) of a value kept in the tree spec; None if it is not one. Exact: floats as hex."""
    match value:
        case None:
            return "none", ""
        case bool():
            return "bool", str(value)
        case int():
            return "int", str(int(value))
        case float():
            return "float", float.hex(value)
        case complex():
            return "complex", f"{float.hex(value.real)} {float.hex(value.imag)}"
        case str():
            return "str", value
        case bytes():
            return "bytes", base64.b64encode(value).decode()
        case dict() | list() | tuple() if not value:
            return "empty", "tuple" if isinstance(value, tuple) else type(value).__name__
    return None


def inline_value(leaf: LeafSpec) -> Any:
    """The Python value of a leaf kept in the tree spec. Inverse of what `flatten` recorded."""
    match leaf.kind:
        case "none":
            return None
        case "bool":
            return leaf.value == "True"
        case "int":
            return int(leaf.value)
        case "float":
            return float.fromhex(leaf.value)
        case "complex":
            real, imag = leaf.value.split()
            return complex(float.fromhex(real), float.fromhex(imag))
        case "str":
            return leaf.value
        case "bytes":
            return base64.b64decode(leaf.value, validate=True)
        case "empty":
            return {"tuple": (), "list": []}.get(leaf.value, {})
    raise Damaged(f"{leaf.label}: unknown kind {leaf.kind!r} in the tree spec")


def _check_names(leaves: Sequence[LeafSpec]) -> None:
    problem = next(filter(None, map(validate.name_problem, leaves)), "") or validate.name_clash(leaves)
    if problem:
        raise UnsupportedLeaf(problem)
