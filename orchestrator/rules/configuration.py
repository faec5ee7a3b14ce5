"""One job, one configuration: what each host was given, in words that can be compared, and what its hosts differ in.

`RULES` says of every setting whether hosts may differ in it. Pure: `startup` collects the settings and exchanges them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

from orchestrator import environment
from orchestrator.options import Options

TEXT_CHARS = 200  # of a value, as hosts exchange it
_NAMED_MAX = 8  # processes named for one value


class Strictness(Enum):
    """SAME: hosts that differ in it are rejected, as their saves would fail, hang or differ. NOTED: it may work, and is
    logged. OWN: each host may choose."""

    SAME = 1
    NOTED = 2
    OWN = 3


# Every field of Options stands here (a test holds it): a new one cannot be forgotten.
OPTIONS: Mapping[str, Strictness] = {
    "async_save": Strictness.SAME,
    "on_save_failure": Strictness.SAME,  # one raises and leaves, where the others go on and wait for it
    "save_timeout_s": Strictness.SAME,
    "rendezvous_timeout_s": Strictness.SAME,
    "preemption_grace_s": Strictness.SAME,
    "failure_grace_s": Strictness.SAME,
    "chunks": Strictness.SAME,
    "compression": Strictness.SAME,
    "other_tree": Strictness.SAME,
    "host_bytes_max": Strictness.NOTED,  # hosts may have more and less memory
    "when_full": Strictness.SAME,
    "restore_bytes_max": Strictness.NOTED,
    "stage": Strictness.OWN,  # hosts may have more and less memory
    "stage_margin": Strictness.OWN,
    "attest": Strictness.SAME,  # fingerprints of some prove nothing, and a collective of some hangs
    "host_local": Strictness.SAME,
    "load_once": Strictness.SAME,
    "upload_bytes_per_s": Strictness.OWN,  # hosts may have faster and slower networks
    "quarantine_keep_s": Strictness.SAME,
    "events_dir": Strictness.OWN,
    "metrics_port": Strictness.OWN,
    "metrics_address": Strictness.OWN,
    "metrics_file": Strictness.OWN,
    "traces": Strictness.OWN,
    "progress": Strictness.OWN,
}
RULES: Mapping[str, Strictness] = {
    "save": Strictness.SAME,
    "keep": Strictness.SAME,
    "tiers": Strictness.SAME,  # what is held, and restored, takes all processes
    **{f"Options.{name}": rule for name, rule in OPTIONS.items()},
    # What arrays are, and what random numbers come out, on each host.
    "jax_enable_x64": Strictness.SAME,
    "jax_threefry_partitionable": Strictness.SAME,
    "jax_default_prng_impl": Strictness.SAME,
    environment.STEP_BACK: Strictness.NOTED,  # process 0's counts
    environment.STORE_DEADLINE: Strictness.NOTED,
    # Versions that differ may work together; when they do not, this is the first that people must know.
    "Python": Strictness.NOTED,
    "checkpoint-orchestrator": Strictness.NOTED,
    "jax": Strictness.NOTED,
    "jaxlib": Strictness.NOTED,
    "numpy": Strictness.NOTED,
    "orbax-checkpoint": Strictness.NOTED,
    "tensorstore": Strictness.NOTED,
}
ORBAX = "CheckpointManagerOptions."  # what begins so is an option of Orbax's, all of which are SAME
PACKAGES = ("checkpoint-orchestrator", "jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore")
JAX_SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_prng_impl")
ENVIRONMENT = (environment.STEP_BACK, environment.STORE_DEADLINE)

Settings = Mapping[str, str]  # name of a setting -> its value, in words


def rule_of(name: str) -> Strictness:
    """NOTED for what this version does not know: another host's does."""
    return Strictness.SAME if name.startswith(ORBAX) else RULES.get(name, Strictness.NOTED)


def of_agent(save: object, keep: object, options: Options, tiers: object = ()) -> dict[str, str]:
    """What an agent was given. Raises KeyError for an option without a rule."""
    given: dict[str, object] = {"save": save, "keep": keep, "tiers": tiers}
    for field in fields(options):
        if OPTIONS[field.name] is not Strictness.OWN:
            given[f"Options.{field.name}"] = getattr(options, field.name)
    return {name: described(value) for name, value in given.items()}


def of_orbax(options: Any) -> dict[str, str]:
    """What a CheckpointManager was given: its options, a dataclass."""
    return {ORBAX + field.name: described(getattr(options, field.name)) for field in fields(options)}


def described(value: object) -> str:
    """A value in words that are the same on every host that was given the same, of at most TEXT_CHARS characters.

    Of functions and objects whose insides nobody knows only the name of their kind: what they hold (an address, a time,
    a host's name) may well differ.
    """
    text = _described(value)
    if len(text) <= TEXT_CHARS:
        return text
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
    return f"{text[: TEXT_CHARS - 20]}… ({digest})"


def _described(value: object) -> str:
    match value:
        case tuple() | list():
            return f"({', '.join(map(_described, value))})"
        case frozenset() | set():
            return f"{{{', '.join(map(_described, _sorted(value)))}}}"
        case Mapping():
            return f"{{{', '.join(f'{_described(key)}: {_described(value[key])}' for key in _sorted(value))}}}"
        case Enum():
            return str(value)
    if is_dataclass(value) and not isinstance(value, type) and _is_frozen(type(value)):
        given = ", ".join(
            f"{field.name}={_described(getattr(value, field.name))}"
            for field in fields(value)
            if field.default is MISSING or getattr(value, field.name) != field.default
        )
        return f"{type(value).__name__.removeprefix('_')}({given})"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    plain = type(value).__module__ in ("builtins", "datetime", "pathlib") and type(value) is not object
    return repr(value) if plain else f"{type(value).__qualname__}(...)"


def _is_frozen(kind: type) -> bool:
    """Whether it is a value by its author's own word."""
    return bool(getattr(kind, "__dataclass_params__").frozen)  # noqa: B009  (typeshed does not know it)


def _sorted(values: Any) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=_described)


def digest(settings: Settings) -> str:
    """The same for hosts that do not differ in anything."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(reported: Sequence[Settings], named: Callable[[Sequence[int]], str]) -> tuple[list[str], list[str]]:
    """(differences that are rejected, differences that are only logged): a line for each setting, with its values and
    whose they are, process 0's first. `reported`: by process. `named`: processes in words."""
    lines: dict[Strictness, list[str]] = {rule: [] for rule in Strictness}
    for name in sorted({name for settings in reported for name in settings}, key=_place):
        holders: dict[str, list[int]] = {}
        for process, settings in enumerate(reported):
            holders.setdefault(settings.get(name, "not known"), []).append(process)
        if len(holders) > 1:
            values = "; ".join(f"{value} on {named(processes)}" for value, processes in holders.items())
            lines[rule_of(name)].append(f"{name}: {values}")
    return lines[Strictness.SAME], lines[Strictness.NOTED]


_PLACES = {name: place for place, name in enumerate(RULES)}


def _place(name: str) -> tuple[int, str]:
    return _PLACES.get(name, len(_PLACES)), name


def who(hosts: Mapping[int, str], processes: Sequence[int]) -> str:
    """Processes by index and host: `process 1 (host-b)`, `processes 0 (host-a), 2 (host-c)`; of many the first."""
    named = ", ".join(f"{process} ({hosts.get(process, '?')})" for process in processes[:_NAMED_MAX])
    more = f" and {len(processes) - _NAMED_MAX} more" if len(processes) > _NAMED_MAX else ""
    return f"process{'es' if len(processes) > 1 else ''} {named}{more}"
