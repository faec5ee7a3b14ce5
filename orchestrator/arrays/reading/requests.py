"""What a reader is asked for: one leaf, where it goes to and as what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import msgspec
import numpy as np

from orchestrator.arrays.element_types import numpy_dtype
from orchestrator.rules.records import LeafSpec


@dataclass(frozen=True)
class Frame:
    """A larger array that a leaf is read into, at `start`, before devices exchange their parts of it. What lies around
    the leaf is not read, and the elements are unsigned integers of the same size (`element_types.carrier`)."""

    shape: tuple[int, ...]
    start: tuple[int, ...]


class ReadRequest(msgspec.Struct, frozen=True):
    """One leaf to read. A struct, which is made ten times as quickly: a state may have many thousands.

    sharding: of the restored array (of the frame, where there is one); None: a numpy array on the host. dtype: what to
    cast to; None: as saved.
    """

    leaf: LeafSpec
    sharding: jax.sharding.Sharding | None = None
    dtype: Any = None
    frame: Frame | None = None

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of the elements as they are in the store."""
        return numpy_dtype(self.leaf.stored_dtype or self.leaf.dtype)

    def converted(self, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Stored elements as the leaf's own dtype, cast where that was asked for."""
        leaf = self.leaf
        data = stored.view(numpy_dtype(leaf.dtype)) if leaf.kind != "key" and leaf.stored_dtype else stored
        return data if self.dtype is None or data.dtype == self.dtype else data.astype(self.dtype)
