"""Where a job's first process listens. JAX's coordination service asks nobody who they are: whoever reaches its port
can join the job in another's place, or end it. So it listens on the address that the job's own processes use, and on no
other.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own: whoever sets it has decided
PORT = "JAX_COORDINATOR_PORT"  # JAX's own, for the clusters that it detects
_SLURM_PORTS = (1 << 16) - (1 << 12)


def is_loopback(host: str) -> bool:
    """Whether `host` means the same machine to everybody who reads it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(host: str) -> str | None:
    """The address of this machine that others mean by `host`. None where that cannot be known from here: the name means
    nothing here, another machine (a load balancer, a NAT), or loopback, as Debian has it for a machine's own name."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return None
    for family, kind, protocol, _, where in found:
        address = str(where[0])
        if "%" in address or (ipaddress.ip_address(address).is_loopback and not is_loopback(host)):
            continue
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
        return address
    return None


def bind_address(coordinator: str, known_address: str | None = None) -> str | None:
    """`address:port` for process 0 to listen on, which others know as `coordinator` (host:port). `known_address`:
    the one that a launcher knows this machine to have. None: all interfaces, because no better is known."""
    host, _, port = coordinator.rpartition(":")
    address = own_address(known_address or host.strip("[]"))
    if address is None:
        return None
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def slurm_port(job_id: str) -> str:
    """A port for the job, the same on all its nodes, and another one for most other jobs on them. JAX's own choice."""
    return str(_SLURM_PORTS + int(job_id) % (1 << 12))


def gke_slice_host(environ: Mapping[str, str]) -> str | None:
    """The name of process 0 of a TPU job on GKE, on its own pod; None on any other."""
    if environ.get("TPU_WORKER_ID", "0") != "0" or environ.get("MEGASCALE_SLICE_ID", "0") != "0":
        return None
    named = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or environ.get("TPU_WORKER_HOSTNAMES", "").partition(",")[0]
    return named.partition(":")[0] or None
