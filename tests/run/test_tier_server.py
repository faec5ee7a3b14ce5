"""The tier server as a program: how it starts and ends, what it says to strangers, and what it does to this machine."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.support.tier_servers import host


def test_a_server_takes_a_socket_that_was_bound_before_so_that_its_address_outlives_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        for _ in range(2):
            with host(tmp_path / "a", sock=bound) as one:
                assert one.address == f"127.0.0.1:{bound.getsockname()[1]}"
                assert one.peer.parts() == {}
