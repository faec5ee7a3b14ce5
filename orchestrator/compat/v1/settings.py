"""The options of Orbax's v1 Context, and what they mean here. What has no counterpart is rejected by name; what is a
hint for Orbax's own format is said to have no effect, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.arrays.format import orbax_api, orbax_v1
from orchestrator.compat.save_args import say_once
from orchestrator.errors import UsageError

# dtype, bytes of a chunk, axes to divide, of a leaf and its path
Storage = Callable[[Any, Any], tuple[Any, int | None, Any]]

_HONOURED = (
    "array.loading.enable_padding_and_truncation",
    "array.saving.scoped_storage_options_creator",
    "array.saving.storage_options",
    "asynchronous.post_finalization_callback",
    "asynchronous.timeout_secs",
    "checkpointables.registry",
    "deletion.gcs_deletion_options",
    "multiprocessing.active_processes",
    "multiprocessing.primary_host",
    "pytree.loading.partial_load",
)
_SECTIONS = ("pytree", "array", "asynchronous", "multiprocessing", "file", "checkpointables", "deletion", "memory")


def check(about: Any) -> None:
    """Raises UsageError naming an option that cannot be honoured here; says once what has no effect."""
    layout = about.checkpoint_layout
    if layout.name not in ("ORBAX", "AUTO"):
        raise UsageError(
            f"Context.checkpoint_layout={layout.name}: not a layout of ours; use orbax.checkpoint.v1 itself for it"
        )
    if orbax_v1.options(about, "pathways").checkpointing_impl is not None:
        raise UsageError("Context.pathways: not supported; leave it out")
    defaults = orbax_v1.public("Context")()
    for section in (*_SECTIONS, "atomicity"):
        given = orbax_v1.options(about, section)
        if given is None:  # each came with a version
            continue
        for name, value, default in _fields(given, orbax_v1.options(defaults, section), section):
            if name not in _HONOURED and value is not default and value != default:
                say_once(f"Context.{name}", "files and memory are managed here, as orchestrator.Options say")


def _fields(options: Any, defaults: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(options):
        name, value = f"{prefix}.{field.name}", getattr(options, field.name)
        default = getattr(defaults, field.name)
        if name not in _HONOURED and type(value) is type(default) and dataclasses.is_dataclass(value):
            yield from _fields(value, default, name)
        elif name == "array.saving.array_metadata_store" and type(value) is type(default):
            continue
        else:
            yield name, value, default


def manager_options(about: Any, **more: Any) -> Any:
    """CheckpointManagerOptions that mean the same."""
    check(about)
    options = orbax_api.public("options")
    trash = orbax_v1.options(about, "deletion").gcs_deletion_options.todelete_full_path
    processes, background = orbax_v1.options(about, "multiprocessing"), orbax_v1.options(about, "asynchronous")
    return orbax_api.public("CheckpointManagerOptions")(
        async_options=options.AsyncOptions(
            timeout_secs=background.timeout_secs,
            post_finalization_callback=background.post_finalization_callback,
        ),
        multiprocessing_options=options.MultiprocessingOptions(
            primary_host=processes.primary_host, active_processes=processes.active_processes
        ),
        todelete_full_path=trash,
        **more,
    )


def storage(about: Any) -> Storage:
    """How each leaf is stored: the creator's options where it gives some, and else those for all."""
    saving = orbax_v1.options(about, "array").saving
    creator = getattr(saving, "scoped_storage_options_creator", None)  # since 0.12

    def of(path: Any, leaf: Any) -> tuple[Any, int | None, Any]:
        found = [creator(path, leaf) if creator else None, saving.storage_options]

        def first(name: str) -> Any:
            return next((value for each in found if each is not None and (value := getattr(each, name))), None)

        return first("dtype"), first("chunk_byte_size"), first("shard_axes") or ()

    return of
