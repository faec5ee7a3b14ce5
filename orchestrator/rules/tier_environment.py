"""What a launcher, or the user, says about the tier servers of a job. Pure; the names are in `environment`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.environment import TIER_ADDRESS, TIER_PEERS, TIER_SECRET, TIER_SERVER
from orchestrator.errors import UsageError
from orchestrator.rules import peer_protocol


@dataclass(frozen=True)
class TierEnvironment:
    """secret: None where the job is to make one. server: this host's, where it is kept by a supervisor; '' if it is
    not. peers: of each process's host, by index, '' where there is none; those after the last are of hosts without a
    process. listen: where this host's server is to listen; '' if that is to be found out."""

    secret: bytes | None = None
    server: str = ""
    peers: tuple[str, ...] = ()
    listen: str = ""

    def __repr__(self) -> str:
        return f"TierEnvironment(server={self.server!r}, peers={self.peers!r}, listen={self.listen!r})"


def tier_environment(environ: Mapping[str, str]) -> TierEnvironment:
    """Raises UsageError naming the variable that says what cannot be used; a secret is not shown."""
    text = environ.get(TIER_SECRET, "")
    server, listen = environ.get(TIER_SERVER, ""), environ.get(TIER_ADDRESS, "")
    peers = tuple(part.strip() for part in environ.get(TIER_PEERS, "").split(",")) if TIER_PEERS in environ else ()
    for peer in peers:
        if peer:
            peer_protocol.parse_address(peer, TIER_PEERS)
    if server:
        peer_protocol.parse_address(server, TIER_SERVER)
        if not text:
            raise UsageError(f"{TIER_SERVER} is set and {TIER_SECRET} is not: nobody could ask that server anything")
    return TierEnvironment(
        peer_protocol.secret_of(text, TIER_SECRET) if text else None, server, peers, _listen(listen) if listen else ""
    )


def _listen(text: str) -> str:
    """`text` as address and port; port 0 where it names none."""
    for each in (text, f"[{text}]:0" if text.count(":") > 1 else f"{text}:0"):
        try:
            host, port = peer_protocol.parse_address(each, TIER_ADDRESS)
        except UsageError:
            continue
        return peer_protocol.show_address(host, port)
    raise UsageError(f"{TIER_ADDRESS}={text[:200]!r}: expected an address of this host, or address:port")
