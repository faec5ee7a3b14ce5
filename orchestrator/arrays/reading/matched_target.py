"""A restore's target matched with a saved tree: what is to be read, and how it becomes the target's tree.

Of thousands of leaves, matching takes longer than reading them. It follows from the saved tree and the target's form
alone (structure, shapes, dtypes, shardings), so that a process that restores into the same form again, a later step or
the same, only makes sure that it is the same.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from orchestrator.arrays.jax_context import users_mesh
from orchestrator.arrays.reading.device_arrays import as_array
from orchestrator.arrays.reading.requests import ReadRequest
from orchestrator.arrays.reading.target_shardings import shardings_of
from orchestrator.arrays.tree import targets
from orchestrator.rules import matching
from orchestrator.rules.records import LeafSpec, TreeSpec

_NUMBERS = (int, float, complex)
_PLAIN = frozenset((bool, int, float, complex, str, bytes))
_ABSTRACT = operator.attrgetter("shape", "dtype", "sharding")
_ON_DEVICES = operator.attrgetter("aval", "sharding")


@dataclass(frozen=True)
class MatchedTarget:
    """requests: what is to be read, in order. build: makes the target's tree of their values."""

    requests: tuple[ReadRequest, ...]
    build: Callable[[Sequence[Any]], Any]


def match_tree(saved: TreeSpec, like: Any, *, partial: bool, cast: bool, where: str) -> MatchedTarget:
    """Match `saved` with `like`, a pytree of jax.ShapeDtypeStruct or arrays (numpy leaves are restored as numpy); None
    gives nested dicts of numpy arrays. `partial`, `cast` as `matching.match`. Main thread, outside of `own_context`.
    Raises Mismatch naming every leaf, and as `shardings_of`."""
    form = _form(saved, like, partial, cast)
    for known, found in tuple(_matched) if form else ():
        if known == form:
            return found
    if like is None:
        matched = MatchedTarget(tuple(map(ReadRequest, saved.leaves)), _Nested(saved.leaves))
        kept = True
    else:
        matched, kept = _match(saved, like, partial, cast, where)
    if form and kept:
        _matched.appendleft((form, matched))
    return matched


# The same form as lately.


class _Form:
    """All that a match depends on. Holds no arrays."""

    def __init__(self, saved: TreeSpec, how: tuple[Any, ...], bare: Any, forms: list[Any]) -> None:
        self._leaves, self._how, self._bare, self._forms = saved.leaves, how, bare, forms

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Form)
            and self._leaves is other._leaves
            and self._how == other._how
            and self._bare == other._bare
            and self._forms == other._forms
        )

    __hash__ = None  # type: ignore[assignment]


_matched: deque[tuple[_Form, MatchedTarget]] = deque(maxlen=4)


def _form(saved: TreeSpec, like: Any, partial: bool, cast: bool) -> _Form | None:
    """None of a target that is none, or whose leaves are of kinds that are looked at each time."""
    try:
        values, bare = jax.tree_util.tree_flatten(like)
        # What JAX has set: whether it holds 64 bits, and the mesh that shardings without one are over.
        how = (partial, cast, like is None, jax.dtypes.canonicalize_dtype(np.int64), users_mesh())
        kinds = set(map(type, values))
        if kinds == {jax.ShapeDtypeStruct}:
            forms: list[Any] = list(map(_ABSTRACT, values))
        else:
            forms = list(map(_form_of_leaf, values))
    except Exception:  # whatever it is: matching says so
        return None
    return _Form(saved, how, bare, forms)


def _form_of_leaf(value: Any) -> Any:
    kind = type(value)
    if kind is jax.ShapeDtypeStruct:
        return kind, *_ABSTRACT(value)
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        return _ON_DEVICES(value)
    if kind is np.ndarray or isinstance(value, np.generic):
        return kind, value.dtype, value.shape
    if kind in _PLAIN:
        return kind
    raise TypeError(kind)


# Matching.


def _match(saved: TreeSpec, like: Any, partial: bool, cast: bool, where: str) -> tuple[MatchedTarget, bool]:
    """The match, and whether it holds nothing of `like` that may change."""
    expected, leaves, treedef = targets(like)
    chosen = matching.match(saved, expected, partial=partial, cast=cast, where=where)
    shardings = shardings_of([leaf.label for leaf in expected], leaves, where)
    given, fits, requests = dict[int, Any](), dict[int, Callable[[Any], Any]](), list[ReadRequest]()
    for number, (leaf, target, sharding) in enumerate(zip(chosen, leaves, shardings, strict=True)):
        if leaf is None:
            given[number] = target
            continue
        requests.append(_request(leaf, target, sharding, cast))
        if fit := _fit(leaf, target, sharding):
            fits[number] = fit
    mutable = any(isinstance(leaf, list | dict) for leaf in leaves)  # an empty one is the target's own
    return MatchedTarget(tuple(requests), _Build(treedef, given, fits)), not mutable


def _request(leaf: LeafSpec, target: Any, sharding: Any, cast: bool) -> ReadRequest:
    if not leaf.kind_stored or isinstance(target, _NUMBERS):
        return ReadRequest(leaf)
    dtype = target.dtype if cast and leaf.kind != "key" else None
    return ReadRequest(leaf, sharding, dtype)


def _fit(leaf: LeafSpec, target: Any, sharding: Any) -> Callable[[Any], Any] | None:
    """What makes of a value what the target has there, None if it is just that: empty containers are the target's own
    (an optax EmptyState stays one), a Python number and an array without dimensions stand for each other."""
    if leaf.kind in ("none", "empty"):
        return lambda value: target
    if leaf.kind_stored:
        return type(target) if isinstance(target, _NUMBERS) else None
    if leaf.number and hasattr(target, "dtype"):
        return partial(_as_array, leaf, target.dtype, sharding)
    return None


def _as_array(leaf: LeafSpec, dtype: Any, sharding: Any, value: Any) -> Any:
    return as_array(leaf, value, dtype, sharding)


class _Build:
    """given: leaves that are not read, by number. fits: what is made of the others' values, where something is."""

    def __init__(self, treedef: Any, given: dict[int, Any], fits: dict[int, Callable[[Any], Any]]) -> None:
        self._treedef, self._given, self._fits = treedef, given, fits

    def __call__(self, values: Sequence[Any]) -> Any:
        fitted = list(values)
        for number, target in self._given.items():
            fitted.insert(number, target)
        for number, fit in self._fits.items():
            fitted[number] = fit(fitted[number])
        return jax.tree_util.tree_unflatten(self._treedef, fitted)


class _Nested:
    """Nested dicts by the leaves' paths; the value itself where the root is the only leaf."""

    def __init__(self, leaves: tuple[LeafSpec, ...]) -> None:
        self._leaves = leaves

    def __call__(self, values: Sequence[Any]) -> Any:
        if len(self._leaves) == 1 and not self._leaves[0].path:
            return values[0]
        root: dict[str, Any] = {}
        for leaf, value in zip(self._leaves, values, strict=True):
            *above, last = leaf.path
            node = root
            for name in above:
                node = node.setdefault(name, {})
            node[last] = value
        return root
