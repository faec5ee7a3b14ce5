"""Items with handlers of the user's own: the handler writes files into a directory of this host, and they travel in
each process's own bytes, so that receipt and manifest cover them like everything else.

On the main thread, and whole in memory: for what is small beside the arrays. Barriers in a handler are its own.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.arrays.format import orbax_api
from orchestrator.errors import UnsafeKey, UsageError
from orchestrator.rules.keys import check_key

BYTES_MAX = 256 << 20
Files = dict[str, str]  # path below the item -> base64


def save(handler: Any, name: str, args: Any) -> Files:
    """Have `handler` save, and return its files. Raises whatever it raises, UsageError for more than BYTES_MAX."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-item-") as folder:
        directory = orbax_api.path(os.path.join(folder, name))
        directory.mkdir()
        if hasattr(handler, "async_save"):
            asyncio.run(_async_save(handler, directory, args))
        else:
            handler.save(directory, args=args)
        if hasattr(handler, "finalize"):
            handler.finalize(directory)
        return _packed(os.fspath(directory), name)


async def _async_save(handler: Any, directory: Any, args: Any) -> None:
    for future in await handler.async_save(directory, args=args) or ():
        future.result()


def restore(handler: Any, name: str, args: Any, files: Mapping[str, str]) -> Any:
    """What `handler` makes of an item's files. Raises whatever it raises."""
    accepts = inspect.signature(handler.restore).parameters
    given = {"args": args} if args is not None and ("args" in accepts or "kwargs" in accepts) else {}
    return with_files(name, files, lambda directory: handler.restore(directory, **given))


def with_files(name: str, files: Mapping[str, str], use: Callable[[Any], Any]) -> Any:
    """What `use` makes of a directory that holds an item's files for as long."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-item-") as folder:
        directory = os.path.join(folder, name)
        unpack(files, directory)
        return use(orbax_api.path(directory))


def unpack(files: Mapping[str, str], directory: str) -> None:
    os.makedirs(directory, exist_ok=True)
    for path, text in files.items():
        target = os.path.join(directory, check_key(path, directory))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "xb") as file:
            file.write(base64.b64decode(text))


def _packed(directory: str, name: str) -> Files:
    found, total = {}, 0
    for above, _, names in os.walk(directory):
        for each in names:
            path = os.path.join(above, each)
            total += os.path.getsize(path)
            if total > BYTES_MAX:
                raise UsageError(
                    f"item {name!r}: its handler wrote more than {BYTES_MAX >> 20} MiB; save arrays with StandardSave "
                    "or PyTreeSave"
                )
            with open(path, "rb") as file:
                found[_name(path, directory, name)] = base64.b64encode(file.read()).decode()
    return found


def _name(path: str, directory: str, item: str) -> str:
    """Raises UsageError for a name that would not be read back."""
    try:
        return check_key(os.path.relpath(path, directory), f"item {item!r}")
    except UnsafeKey:
        text = f"item {item!r}: its handler wrote a file {os.path.basename(path)!r}; use printable names without \\"
        raise UsageError(text) from None
