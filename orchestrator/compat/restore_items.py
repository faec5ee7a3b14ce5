"""Restoring items by their names: the arrays of all of them in one go, then JSON and iterators. Main thread, all
processes in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.compat import custom_items, orbax_items
from orchestrator.compat.adopt import EXTRA
from orchestrator.compat.item_handlers import ItemHandlers
from orchestrator.compat.orbax_steps import DEFAULT
from orchestrator.compat.stored_items import StoredItems
from orchestrator.compat.stored_steps import NoSuchItem, NoSuchStep
from orchestrator.job.read_step import ReadOptions
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.restore import RestoreOptions, restore_together
from orchestrator.run.journal_store import JournalStore


def restore_items(
    store: JournalStore,
    rendezvous: Rendezvous,
    step: int | None,
    named: Mapping[str, Any],
    stored: StoredItems,
    *,
    handlers: ItemHandlers,
    record: bool,
    timeout_s: float,
) -> dict[str, Any]:
    """Each item of `named` (name -> its args) by its name. `step`: None for the newest good one, of which `stored` is
    the newest whose records can be read. `record`: damage found may be written down.

    Raises NoSuchStep for an item that the step does not hold, and as `restore_together`.
    """
    where = f"{store.url} step {stored.step}"
    wanted = {name: stored.target(name, args, where) for name, args in named.items() if name in stored.trees}
    for name, args in named.items():
        if name not in stored.names and (args is None or orbax_items.kind_of(args, name) != "iterator"):
            raise NoSuchItem(f"{where}: no item {name!r}; it holds {', '.join(stored.names) or 'none'}")
    states, extra = stored.process_states, stored.extra
    trees: dict[str, Any] = {}
    if wanted:
        like = {name: target.like for name, target in wanted.items()}
        read = ReadOptions(partial=True, cast=True)  # partial: each item has been matched above
        options = RestoreOptions(timeout_s, step=step, record=record, read=read)
        restored = restore_together(store, rendezvous, like[DEFAULT] if stored.whole else like, options)
        if restored is None:
            raise NoSuchStep(f"{store.url}: no steps")
        states, extra = restored.process_states, restored.extra.get(EXTRA, {})
        trees = {DEFAULT: restored.state} if stored.whole else restored.state
    result = {}
    for name, args in named.items():
        if name in wanted:
            result[name] = wanted[name].finish(trees[name])
        elif name in stored.json:
            result[name] = extra["json"][name]
        elif stored.is_custom(name):
            files = orbax_items.custom_files(name, states, rendezvous.process)
            result[name] = custom_items.restore(handlers.handler(name, args), name, args, files)
        else:
            result[name] = orbax_items.set_iterator(args.item, name, states, rendezvous.process, rendezvous.count)
    return result
