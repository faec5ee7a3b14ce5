"""The programs that copy shards within their devices, compiled once for each form of state, and which shards become
which arrays: small ones are packed with others of their dtype, as a transfer to the host takes as long as 1 MiB in it.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import SingleDeviceSharding

from orchestrator.arrays.element_types import carrier
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.writing.write_plan import Shard

PACK_BYTES = 256 << 10  # smaller shards are packed
_OPERANDS_MAX = 256  # of one concatenation: compiling takes longer than in proportion
_PROGRAMS_MAX = 64  # kept; a form of state has two on each device


# For each array that a program makes: shape and dtype of the shards that become it.
_Groups = tuple[tuple[tuple[tuple[int, ...], Any], ...], ...]


@dataclass(frozen=True)
class Call:
    """What one program copies on one device: for each array that it makes, the numbers of its shards."""

    device: Any
    groups: tuple[tuple[int, ...], ...]
    form: _Groups
    packs: bool


@dataclass(frozen=True, eq=False)
class Layout:
    """What becomes of shards, by number: the arrays of programs, but for those that are `direct`."""

    shards: tuple[Shard, ...]
    calls: tuple[Call, ...]

    @functools.cached_property
    def sizes(self) -> Mapping[Any, int]:
        """Bytes by device."""
        sizes: dict[Any, int] = {}
        for shard in (one for one in self.shards if not one.direct):
            sizes[shard.device] = sizes.get(shard.device, 0) + shard.nbytes
        return sizes


def layout_of(shards: Sequence[Shard]) -> Layout:
    packed: dict[Any, dict[Any, list[int]]] = {}
    alone: dict[Any, list[list[int]]] = {}
    for number, shard in enumerate(shards):
        if shard.direct:
            continue
        if shard.nbytes <= PACK_BYTES:
            packed.setdefault(shard.device, {}).setdefault((shard.dtype, shard.small), []).append(number)
        else:
            alone.setdefault(shard.device, []).append([number])
    given = [(device, list(groups.values()), True) for device, groups in packed.items()]
    given += [(device, groups, False) for device, groups in alone.items()]
    calls = []
    for device, groups, packs in given:
        form = tuple(tuple((shards[number].shape, shards[number].dtype) for number in group) for group in groups)
        calls.append(Call(device, tuple(map(tuple, groups)), form, packs))
    return Layout(tuple(shards), tuple(calls))


class Programs:
    """The compiled programs, by device and form. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Any, Any] = OrderedDict()  # None: it cannot be compiled

    def has(self, call: Call) -> bool:
        """Whether `compiled` returns at once."""
        with self._lock:
            return (call.device, call.form) in self._compiled

    def forget(self, call: Call) -> None:
        """Its program does not take what it was compiled for."""
        with self._lock:
            self._compiled[call.device, call.form] = None

    @in_own_context
    def compiled(self, call: Call) -> Any:
        """The program, which takes lists of shards; None if it cannot be compiled."""
        key = (call.device, call.form)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        sharding = SingleDeviceSharding(call.device)
        given = [[jax.ShapeDtypeStruct(*each, sharding=sharding) for each in group] for group in call.form]
        try:
            program = jax.jit(_packed if call.packs else _copied).lower(given).compile()
        except Exception as error:  # a dtype that this platform cannot join: staged one by one
            logging.warning("no snapshots on %s of %d arrays: %s", call.device, len(given), error)
            program = None
        with self._lock:
            self._compiled[key] = program
            while len(self._compiled) > _PROGRAMS_MAX:
                self._compiled.popitem(last=False)
        return program


PROGRAMS = Programs()  # of this process: every agent's


def _copied(groups: list[list[Any]]) -> list[Any]:
    return [jnp.copy(shard) for (shard,) in groups]


def _packed(groups: list[list[Any]]) -> list[Any]:
    return [_joined([_as_bits(shard.reshape(-1)) for shard in group]) for group in groups]


def _as_bits(elements: Any) -> Any:
    """XLA joins small floats as larger ones where it has nothing better (CPUs: bfloat16), which changes NaNs."""
    carried = carrier(elements.dtype)
    return elements if carried is None else jax.lax.bitcast_convert_type(elements, carried)


def _joined(parts: list[Any]) -> Any:
    while len(parts) > _OPERANDS_MAX:
        parts = [_joined(parts[first : first + _OPERANDS_MAX]) for first in range(0, len(parts), _OPERANDS_MAX)]
    return jnp.concatenate(parts) if len(parts) > 1 else jnp.copy(parts[0])
