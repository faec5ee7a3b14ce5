"""On which address a host's tier server listens: the one by which this host reaches the others, and on no other."""

from __future__ import annotations

import os
import socket

from orchestrator.arrays import jax_internals
from orchestrator.errors import StorageError
from orchestrator.job import listening
from orchestrator.rules import contract, peer_protocol

_LOOPBACK = "127.0.0.1"


def listen_address(port: int = 0) -> str:
    """address:port. Loopback where JAX's coordination service is there, or where this process is alone. Raises
    StorageError where no address can be found that other hosts could mean."""
    return peer_protocol.show_address(_own(jax_internals.coordinator_address()), port)


def _own(coordinator: str) -> str:
    host = coordinator.rpartition(":")[0].strip("[]")
    if not host:
        return _LOOPBACK
    if listening.is_loopback(host):
        return _LOOPBACK if host == "localhost" else host
    if (known := os.environ.get(contract.HOST_ADDRESS)) and (address := listening.own_address(known)):
        return address
    problem = ""
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)  # sends nothing: it only finds the way there
                address = str(probe.getsockname()[0])
            if not listening.is_loopback(address):
                return address
            problem = f"the way there begins at {address}"
    except OSError as error:
        problem = str(error)
    raise StorageError(
        f"no address of this host is known by which other hosts reach its tier server: JAX's coordinator is at {host}, "
        f"and {problem or 'that name stands for nothing'}; set ORCHESTRATOR_TIER_ADDRESS to one on each host"
    )
