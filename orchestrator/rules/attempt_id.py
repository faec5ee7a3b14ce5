"""What one try at saving a step is called, and where it is stored.

An attempt is a step, the epoch of the incarnation that makes it, and the number of the try: `step 100 e0003-a02`. The
name `e0003-a02` has one spelling, and a directory of that name is never used again. Pure: no I/O.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from orchestrator.errors import UnsafeKey
from orchestrator.rules import keys

# ASCII digits only, and each name in one spelling: what is parsed must be what would be built.
_NAME = re.compile(r"e([0-9]{4,})-a([0-9]{2,})")
_KEY = re.compile(r"steps/([0-9]{8,19})/(e([0-9]{4,18})-a([0-9]{2,18}))/(.+)", re.DOTALL)


class AttemptId(NamedTuple):
    """One attempt at saving `step`. Ordered by step, then by name. `name` is as it is stored, and may come from a
    record: whatever is built of it raises UnsafeKey if it is no attempt's name."""

    step: int
    name: str

    @classmethod
    def of(cls, step: int, epoch: int, number: int) -> AttemptId:
        """The attempt `number`, counted from 1, of incarnation `epoch` at `step`."""
        return cls(step, name_of(epoch, number))

    @classmethod
    def in_key(cls, key: str) -> tuple[AttemptId, str] | None:
        """The attempt that `key` is below, and the rest of it; None for any other key."""
        found = _KEY.fullmatch(key)
        if not found or not key.startswith(keys.step_prefix(int(found[1]))):
            return None
        if found[2] != name_of(int(found[3]), int(found[4])):
            return None
        return cls(int(found[1]), found[2]), found[5]

    @property
    def label(self) -> str:
        """How an attempt is named in messages: `step 100 e0003-a02`."""
        return f"step {self.step} {self.name}"

    @property
    def epoch(self) -> int:
        return parse_name(self.name)[0]

    @property
    def number(self) -> int:
        return parse_name(self.name)[1]

    @property
    def prefix(self) -> str:
        """Of the attempt's keys, ending in `/`."""
        parse_name(self.name)
        return f"{keys.step_prefix(self.step)}{self.name}/"

    @property
    def intent_key(self) -> str:
        return self.prefix + keys.INTENT

    @property
    def manifest_key(self) -> str:
        return self.prefix + keys.MANIFEST

    @property
    def state_prefix(self) -> str:
        """Of the files of the arrays."""
        return self.prefix + keys.STATE

    @property
    def receipts_prefix(self) -> str:
        return self.prefix + keys.RECEIPTS

    def receipt_key(self, process: int) -> str:
        return self.prefix + keys.receipt_name(process)

    def process_state_key(self, process: int) -> str:
        return self.prefix + keys.process_state_name(process)

    def key(self, name: str) -> str:
        """Key of the attempt's file `name`, which may come from its manifest. Raises UnsafeKey if it could leave the
        attempt."""
        return self.prefix + keys.check_key(name, self.manifest_key)


def name_of(epoch: int, number: int) -> str:
    return f"e{epoch:04d}-a{number:02d}"


@functools.lru_cache(maxsize=256)  # the receipts of a job say the same one thousands of times
def parse_name(name: str) -> tuple[int, int]:
    """(epoch, number) of an attempt's name. Raises UnsafeKey for anything else."""
    found = _NAME.fullmatch(name)
    if not found or name != name_of(int(found[1]), int(found[2])):
        raise UnsafeKey(f"attempt name {name!r}: expected eEEEE-aNN; the record that holds it is damaged")
    return int(found[1]), int(found[2])


def receipt_file(key: str) -> tuple[int, str] | None:
    """Who stored the receipt, or the receipts of a group, at `key`, and its name in the attempt; None for any other
    key, a stray file's too."""
    found = AttemptId.in_key(key)
    if not found or not found[1].startswith(keys.RECEIPTS):
        return None
    name = found[1]
    if group := keys.group_of(name):
        return group[0], name
    try:
        return keys.process_of(name), name
    except UnsafeKey:
        return None
