"""`orchestrator launch health`: is the job in this container alive? Exit code 0 or 1, for probes and health checks.

Judged by the heartbeat file that the agent's own calls write (`orchestrator.observe.heartbeat`): alive while there is
none yet (it is starting) or while it is younger than `--max_age_s`; `--started` asks whether there is one. Imports
nothing but the standard library: a probe runs every few seconds beside the job.
"""

import argparse
import os
import sys
import time

VARIABLE = "ORCHESTRATOR_HEARTBEAT_FILE"  # as in `orchestrator.environment`, which a probe does without


def main() -> int:
    parser = argparse.ArgumentParser(prog="orchestrator launch health")
    parser.add_argument("--max_age_s", type=float, default=900.0, help="older than this is hung (default 900)")
    parser.add_argument("--started", action="store_true", help="no heartbeat yet is a failure")
    flags = parser.parse_args()
    path = os.environ.get(VARIABLE)
    if path is None:
        print(f"health: {VARIABLE} is not set: nothing to judge by")
        return 0
    try:
        age_s = time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        print("health: no heartbeat yet")
        return 1 if flags.started else 0
    except OSError as error:  # a file that cannot be read is no proof of a hang
        print(f"health: {path} cannot be read: {error.strerror}")
        return 1 if flags.started else 0
    print(f"health: last heartbeat {age_s:.0f} s ago")
    return 0 if age_s <= flags.max_age_s else 1


if __name__ == "__main__":
    sys.exit(main())
