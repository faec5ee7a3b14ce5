"""Small files that somebody else writes while we supervise: read so that nothing put in their place can hold us up."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_BYTES = 1 << 20


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of an ordinary file. Never blocks: opening a FIFO would wait for its writer.

    Raises: OSError if it cannot be read, is a directory, a FIFO or a device, or holds more than `most_bytes`;
    UnicodeDecodeError if it is not UTF-8.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not an ordinary file", str(path))
        body = file.read(most_bytes + 1)
    if len(body) > most_bytes:
        raise OSError(errno.EFBIG, f"holds more than {most_bytes} bytes", str(path))
    return body.decode()
