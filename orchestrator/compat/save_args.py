"""Orbax's SaveArgs: a leaf may be saved in another dtype. Sizes of chunks and files, and aggregation, are hints for
Orbax's own format: ours chooses them by what it measures, and says once that it does."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from absl import logging

from orchestrator.arrays import tree_path
from orchestrator.arrays.jax_context import in_own_context

_said: set[str] = set()


def saved_as(item: Any, args: Any) -> Any:
    """`item` as its args' `save_args` want it saved."""
    if getattr(args, "ocdbt_target_data_file_size", None) is not None:
        say_once("ocdbt_target_data_file_size", "sizes of files are chosen here")
    save_args = getattr(args, "save_args", None)
    if save_args is None:
        return item
    found, _ = jax.tree_util.tree_flatten_with_path(save_args, is_leaf=_is_save_args)
    by_path = {tree_path(path): each for path, each in found}

    def cast(path: Any, leaf: Any) -> Any:
        wanted = by_path.get(tree_path(path))
        for hint in ("chunk_byte_size", "shard_axes", "aggregate"):
            if getattr(wanted, hint, None):
                say_once(f"SaveArgs.{hint}", "chunks are chosen here")
        dtype = getattr(wanted, "dtype", None)
        return leaf if dtype is None else _cast(leaf, dtype)

    return jax.tree_util.tree_map_with_path(cast, item)


def _is_save_args(value: Any) -> bool:
    return type(value).__name__ == "SaveArgs"


@in_own_context
def _cast(leaf: Any, dtype: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf if leaf.dtype == dtype else jax.jit(lambda value: value.astype(dtype))(leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.astype(dtype)
    return np.dtype(dtype).type(leaf).item() if isinstance(leaf, int | float) else leaf


def say_once(what: str, instead: str) -> None:
    if what not in _said:
        _said.add(what)
        logging.warning("orchestrator.compat: %s has no effect: %s", what, instead)
