"""`orchestrator launch health`: is the job in this container alive? Exit code 0 or 1, for probes and health checks.

Judged as the launcher judges its hosts (`orchestrator.rules.stalls`), by the heartbeat files of the agent: the main
thread's and, beside it, its pulse's. Alive while there is none yet (it is starting). No pulse: hung, once the main
thread has reported nothing for `--max_age_s`. With a pulse it may wait for another host, which is ended first: half as
long again; in its first step, which compiles, four times as long. `--started` asks whether there is a heartbeat.
Imports little: a probe runs every few seconds beside the job.
"""

import argparse
import os
import sys
import time

from launch.heartbeats import read_sign
from orchestrator.environment import HEARTBEAT_FILE
from orchestrator.rules.stalls import Sign, hung_alone


def main() -> int:
    parser = argparse.ArgumentParser(prog="orchestrator launch health")
    parser.add_argument("--max_age_s", type=float, default=900.0, help="older than this is hung (default 900)")
    parser.add_argument("--started", action="store_true", help="no heartbeat yet is a failure")
    flags = parser.parse_args()
    path = os.environ.get(HEARTBEAT_FILE)
    if path is None:
        print(f"health: {HEARTBEAT_FILE} is not set: nothing to judge by")
        return 0
    try:
        sign = read_sign(path, time.time())
    except FileNotFoundError:
        print("health: no heartbeat yet")
        return 1 if flags.started else 0
    except OSError as error:  # a file that cannot be read is no proof of a hang
        print(f"health: {path} cannot be read: {error.strerror}")
        return 1 if flags.started else 0
    print(f"health: {describe(sign)}")
    return int(hung_alone(sign, flags.max_age_s))


def describe(sign: Sign) -> str:
    text = f"last heartbeat {sign.idle_s:.0f} s ago"
    if sign.pulse_age_s is None:
        return text
    waits = f", the main thread waits at `{sign.barrier}`" if sign.barrier else ""
    return f"{text}, last pulse {sign.pulse_age_s:.0f} s ago{', in the first step' if sign.starting else ''}{waits}"


if __name__ == "__main__":
    sys.exit(main())
