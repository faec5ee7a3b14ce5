"""Pytrees taken apart: which leaves a state has, of what kind, and which of them an array store holds.

Moves no array data, does no I/O and knows neither Orbax nor TensorStore. How each kind of leaf is stored is in
docs/reference/on-disk-format.md. In short: arrays in the array store; Python scalars, strings, bytes, None and empty
containers exactly, in the tree spec (and, where Orbax can, in its files too, for plain readers); zero-size arrays in
the tree spec alone; anything else is rejected before anything is written.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from msgspec import structs

from orchestrator.arrays.inline_values import fits_int64
from orchestrator.arrays.leaf_specs import check_live, describe, target_leaf
from orchestrator.errors import UnsupportedLeaf
from orchestrator.rules import validate
from orchestrator.rules.matching import TargetLeaf
from orchestrator.rules.records import LeafSpec, TreeSpec


@dataclass(frozen=True, eq=False)
class Form:
    """What the saves of one job have in common, so that it is worked out once: structure, shapes, dtypes, shardings.

    Not the values of Python numbers and strings: `leaves` has those of the first save. One object for one form: it may
    be a key. Holds no data.

    treedef: with None and empty containers as leaves. bare: with them as structure, as JAX has them; `empties`: each,
    with its number among `leaves`. arrays: which leaves are arrays of JAX; `shardings`: (aval, sharding) of each.
    others: the rest, numbered, each with what two saves must have in common there. tiled: how arrays of JAX are cut.
    """

    treedef: Any
    bare: Any
    leaves: tuple[LeafSpec, ...]
    mesh: dict[str, int]
    empties: tuple[tuple[int, Any], ...]
    arrays: tuple[int, ...]
    shardings: list[Any]
    others: tuple[tuple[int, Any], ...]
    tiled: bool = False


@dataclass(frozen=True)
class Flat:
    """A tree taken apart: the spec, and for each leaf of it the value to store."""

    spec: TreeSpec
    values: Sequence[Any]
    form: Form


_ON_DEVICES = operator.attrgetter("aval", "sharding")
_IS_DELETED = operator.methodcaller("is_deleted")
_recent: deque[Form] = deque(maxlen=4)


def flatten(tree: Any, *, tiled: bool = False) -> Flat:
    """Describe every leaf of `tree`. Moves no data. Quick for a tree of a form that was flattened lately.
    `tiled`: arrays of JAX in chunks that have little of each dimension (`zarr_chunks.tile_shape`).

    Raises UnsupportedLeaf naming the path for values that cannot be stored, deleted (donated) arrays and name clashes.
    """
    try:
        values, bare = jax.tree_util.tree_flatten(tree)
    except (ValueError, SystemError, RecursionError) as error:  # keys that have no order; a stack that overflows
        raise UnsupportedLeaf(_no_tree(tree, error)) from error
    for form in tuple(_recent):
        if form.tiled == tiled and form.bare == bare and (flat := _as_before(form, values)):
            _remember(form)
            return flat
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
    values = [value for _, value in with_paths]
    leaves = tuple(describe(tree_path(path), value, tiled=tiled) for path, value in with_paths)
    if leaves[0].path == () and leaves[0].kind in ("none", "empty"):
        raise UnsupportedLeaf("the state has no leaves: there is nothing to save")
    _check_names(leaves)
    mesh = next((dict(sharding.mesh.shape) for value in values if (sharding := _named_sharding(value))), {})
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
        tiled,
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
            check_live(form.leaves[number].label, values[number])
    changed: dict[int, LeafSpec] = {}
    for number, key in form.others:
        leaf = form.leaves[number]
        found = describe(leaf.path, values[number], tiled=form.tiled)
        if _form_key(found, values[number]) != key:
            return None
        if found != leaf:
            changed[number] = found
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


def targets(like: Any) -> tuple[list[TargetLeaf], list[Any], Any]:
    """A target tree taken apart: what is expected at each path, the target's leaves themselves, its structure."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_empty)
    leaves = [target_leaf(tree_path(path), value) for path, value in with_paths]
    return leaves, [value for _, value in with_paths], treedef


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


def _named_sharding(value: Any) -> jax.sharding.NamedSharding | None:
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _check_names(leaves: Sequence[LeafSpec]) -> None:
    problem = next(filter(None, map(validate.name_problem, leaves)), "") or validate.name_clash(leaves)
    if problem:
        raise UnsupportedLeaf(problem)
