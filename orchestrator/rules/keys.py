"""The keys of a run and the names of an attempt's files, built and parsed in one place (the on-disk contract);
`attempt_id` puts the two together.

Keys are relative to the run's root, `/`-separated on every store. Pure: no I/O. Keys that come *from* storage must pass
`check_key` before they are used.
"""

from __future__ import annotations

import re

from orchestrator.errors import UnsafeKey

JOURNAL = "journal/"
JOURNAL_INDEX = "journal-index/"
STEPS = "steps/"
PLACEMENT = "placement.json"  # at the root of a process's tier; a run has none
TEMPORARY = ".tmp"  # on a file system: objects that are not whole yet
# Directories that a run has at its root, or has had; nobody else may give one of these names.
AT_ROOT = frozenset({"journal", "journal-index", "steps", "events", "heartbeats", "metadata", TEMPORARY})
STEP_DIGITS = 8
VERSION_MAX = 10**20 - 1  # of a journal entry: the largest that fits its key
# ASCII digits only, and one spelling of each name: what is parsed must equal what would be built.
_JOURNAL_KEY = re.compile(r"journal/([0-9]{20})\.json")
_INDEX_KEY = re.compile(r"journal-index/([0-9]{20})")


def journal_key(version: int) -> str:
    return f"{JOURNAL}{version:020d}.json"


def journal_version(key: str) -> int | None:
    """The version of a journal key; None for any other key (a stray file is not an entry)."""
    found = _JOURNAL_KEY.fullmatch(key)
    return int(found[1]) if found else None


def index_key(version: int) -> str:
    """Key of the marker of an existing version. Later versions come first in key order, so that the first
    page of a listing finds the journal's end, however long it is."""
    return f"{JOURNAL_INDEX}{VERSION_MAX - version:020d}"


def indexed_version(key: str) -> int | None:
    """The version of a marker's key; None for any other key."""
    found = _INDEX_KEY.fullmatch(key)
    return VERSION_MAX - int(found[1]) if found else None


def step_prefix(step: int) -> str:
    return f"{STEPS}{step:0{STEP_DIGITS}d}/"


# Names of an attempt's files, which follow its prefix.
INTENT = "intent.json"
MANIFEST = "manifest.json"
EXTRA = "extra.json"
STATE = "state/"
STORE = "manifest.ocdbt"  # below `state/`, or below an item of it: what makes a directory an OCDBT store
RECEIPTS = "receipts/"
PROCESS = "process/"
_OF_A_PROCESS = re.compile(rf"(?:{RECEIPTS}([0-9]+)\.json|{PROCESS}([0-9]+)\.bin)")
_OF_A_GROUP = re.compile(rf"{RECEIPTS}group-([0-9]{{5,18}})-([0-9]{{2,18}})\.json")


def receipt_name(process: int) -> str:
    return f"{RECEIPTS}{process:05d}.json"


def group_receipt_name(leader: int, number: int) -> str:
    return f"{RECEIPTS}group-{leader:05d}-{number:02d}.json"


def group_of(name: str) -> tuple[int, int] | None:
    """(leader, number) in the name of receipts that were stored as one; None for any other name."""
    found = _OF_A_GROUP.fullmatch(name)
    group = (int(found[1]), int(found[2])) if found else None
    return group if group and name == group_receipt_name(*group) else None


def process_state_name(process: int) -> str:
    return f"{PROCESS}{process:05d}.bin"


def process_of(name: str) -> int:
    """The process index in the name of a receipt or of a process's state. Raises UnsafeKey for anything else."""
    found = _OF_A_PROCESS.fullmatch(name)
    process = int(found[1] or found[2]) if found else -1
    if process < 0 or name not in (receipt_name(process), process_state_name(process)):
        raise UnsafeKey(
            f"{name!r}: expected receipts/PPPPP.json or process/PPPPP.bin; the record that holds it is damaged"
        )
    return process


# Control characters, a backslash, and halves of surrogates (what Python makes of names that are not UTF-8).
_NEVER_A_PART = frozenset(("", ".", ".."))
_NEVER_IN_KEYS = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


def check_key(key: str, where: str) -> str:
    """`key` itself if it is safe to join to a prefix. Raises UnsafeKey naming the record `where` it was found."""
    if _NEVER_IN_KEYS.search(key) or not _NEVER_A_PART.isdisjoint(key.split("/")):
        raise UnsafeKey(
            f"{where}: key {key!r} is not a plain relative path; the record is damaged or hostile, not used"
        )
    return key
