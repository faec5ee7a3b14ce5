"""A process of a job by the contract: joins the others, trains nothing, saves once, writes down where it listens, and
waits for a file `go`.

usage: listening_job.py DIRECTORY"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil

import orchestrator as oc
from launch import contract


def main() -> None:
    folder = Path(sys.argv[1])
    job = contract.from_environment(os.environ)
    assert job is not None
    contract.initialize(job)
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("all are here")  # a collective: Gloo has its sockets now
    options = oc.Options(async_save=False, on_save_failure="raise", metrics_port=0)
    with oc.Agent(folder / "run", options=options) as agent:
        agent.save(0, {"w": jnp.zeros(4)})
        sockets = [
            [connection.laddr.ip, connection.laddr.port]
            for connection in psutil.Process().net_connections("all")
            if connection.status == psutil.CONN_LISTEN
        ]
        there = folder / f"{jax.process_index()}.json"
        there.with_suffix(".part").write_text(json.dumps(sockets))
        there.with_suffix(".part").rename(there)
        give_up = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < give_up:
            time.sleep(0.05)
    multihost_utils.sync_global_devices("all are done")


if __name__ == "__main__":
    main()
