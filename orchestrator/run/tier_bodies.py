"""The bodies of copies that arrive at a tier server. A large one is read from the socket itself, by the thread that
writes it: through asyncio and aiohttp's parser, a GiB costs several seconds of a core.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

from aiohttp import web

from orchestrator.run.tier_shelf import Rejected

_SMALL_BYTES = 256 << 10  # read at once
_PIECE_BYTES = 512 << 10  # stays in a core's cache until it is checked and written
_LINGER_S = 2.0


async def small(request: web.BaseRequest, size: int, stall_s: float, slowest_bytes_per_s: int) -> bytes:
    """A body of `size` bytes. Raises Rejected where it does not come."""
    body = b""
    deadline = time.monotonic() + stall_s + size / slowest_bytes_per_s
    try:
        while len(body) < size:
            async with asyncio.timeout(min(stall_s, max(0.0, deadline - time.monotonic()))):
                more = await request.content.read(size - len(body))
            if not more:
                raise ConnectionResetError
            body += more
    except TimeoutError:
        raise _stalled(stall_s) from None
    except (OSError, web.RequestPayloadError) as error:
        raise _broken(error) from None
    return body


def is_small(size: int) -> bool:
    return size <= _SMALL_BYTES


class Taken:
    """A request's body, taken from aiohttp: this connection has no other request, and is closed with the answer.

    Made on the event loop as soon as the request is there, before more of its body has been read than aiohttp's buffer
    holds. `pieces` and `throw_away` are for a thread. What a piece holds is overwritten by the next one.
    """

    def __init__(self, request: web.BaseRequest, size: int, stall_s: float, slowest_bytes_per_s: int) -> None:
        transport = request.transport
        if transport is None:
            raise Rejected("damaged", "the sender is gone")
        self._first = b""
        while more := request.content.read_nowait(-1):
            self._first += more
        request.content.feed_eof()  # of what aiohttp knows of
        transport.pause_reading()  # last: both of the above may resume it
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._left, self._stall_s = size - len(self._first), stall_s
        self._deadline = time.monotonic() + stall_s + size / slowest_bytes_per_s

    def pieces(self) -> Iterator[bytes | memoryview]:
        """All of it. Raises Rejected where it does not come."""
        if self._first:
            yield self._first
        buffer = memoryview(bytearray(min(self._left, _PIECE_BYTES)))
        while self._left > 0:
            filled = self._fill(buffer[: self._left])
            yield filled
            self._left -= len(filled)

    def _fill(self, buffer: memoryview) -> memoryview:
        done = 0
        try:
            while done < len(buffer):
                wait_s = min(self._stall_s, self._deadline - time.monotonic())
                self._socket.settimeout(max(0.001, wait_s))
                if not (got := self._socket.recv_into(buffer[done:])):
                    raise ConnectionResetError
                done += got
        except TimeoutError:
            raise _stalled(self._stall_s) from None
        except OSError as error:
            raise _broken(error) from None
        return buffer

    @property
    def unread(self) -> bool:
        return self._left > 0

    def throw_away(self) -> None:
        """What still comes, for a moment: closing a connection that has unread bytes takes the answer away, too."""
        end, buffer = time.monotonic() + _LINGER_S, bytearray(_PIECE_BYTES)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while (left_s := end - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                if not self._socket.recv_into(buffer):
                    return

    def close(self) -> None:
        self._socket.close()


def _stalled(stall_s: float) -> Rejected:
    return Rejected("damaged", f"no byte came for {stall_s:g} s, or they came too slowly; not taken")


def _broken(error: Exception) -> Rejected:
    return Rejected("damaged", f"the sender broke off ({type(error).__name__}); not taken")
