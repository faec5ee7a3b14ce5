"""What a host fetches for a job that is about to come back, so that every byte leaves the store once. Pure."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence

from orchestrator.rules.records import FileEntry

_UNEVEN = 1.25  # a host may have so much more than an even share, of what it has written itself
_WRITER = re.compile(r"(?:state/(?:.*/)?ocdbt\.process_|receipts/|process/)([0-9]{1,9})[./]")


def writer(name: str) -> int:
    """The process that wrote a file of an attempt, as far as its name tells; -1 if it does not."""
    found = _WRITER.match(name)
    return int(found[1]) if found else -1


def shares(files: Sequence[FileEntry], hosts: int) -> list[int]:
    """Which of `hosts` fetches each file: the same answer on all of them, whatever each has already. A host needs most
    of what it has written itself, if there are as many as before: that is its own, unless it is far more than the
    others have."""
    found, load = [0] * len(files), [0] * hosts
    least = [(0, host) for host in range(hosts)]  # a heap; `load` tells what of it is out of date
    even = sum(entry.bytes for entry in files) / hosts
    for number in sorted(range(len(files)), key=lambda number: (-files[number].bytes, files[number].path)):
        while least[0][0] != load[least[0][1]]:
            heapq.heapreplace(least, (load[least[0][1]], least[0][1]))
        host, own = least[0][1], writer(files[number].path)
        if 0 <= own < hosts and load[own] + files[number].bytes <= _UNEVEN * even:
            host = own
        found[number] = host
        load[host] += files[number].bytes
    return found
