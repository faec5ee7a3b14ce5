"""`orchestrator launch gcs-emulator [flags] [-- command ...]`: serve, or run a command that finds the emulator.

For tests and laptops only: objects are kept in memory, there is no authentication, and it listens on loopback unless
it is asked for more. With a command, it ends with the command and with its exit code.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Sequence

from absl import app, flags
from aiohttp import web

from launch.gcs_emulator.faults import Faults
from launch.gcs_emulator.process import environ
from launch.gcs_emulator.server import Emulator

FLAGS = flags.FLAGS
flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
flags.DEFINE_integer("port", 9023, "port to listen on; 0: any free one", lower_bound=0, upper_bound=65535)
flags.DEFINE_list("buckets", ["demo"], "buckets that there are from the start")
flags.DEFINE_string(
    "faults", "", "such as lost=0.3,too_many=0.05,slow=0.1,slow_s=2,seed=7; later: PUT /_emulator/faults"
)
flags.DEFINE_bool("until_stdin_closes", False, "end when standard input does: with the process that holds it")
flags.DEFINE_integer(
    "links", 0, "as many more ports, one for each simulated host; their speed: PUT /_emulator/links", lower_bound=0
)
flags.DEFINE_float("max_gib", 4.0, "how much each bucket holds at most", lower_bound=0.0)


def _stop_at_end_of_input(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


async def serve(emulator: Emulator, command: Sequence[str]) -> int:
    runner = web.AppRunner(emulator.application(), access_log=None, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, FLAGS.host, FLAGS.port)
    await site.start()
    port = runner.addresses[0][1]
    url = f"http://{FLAGS.host}:{port}"
    for _ in range(FLAGS.links):
        await web.TCPSite(runner, FLAGS.host, 0).start()
        linked = runner.addresses[-1][1]
        emulator.links.add(linked, f"http://{FLAGS.host}:{linked}")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if FLAGS.until_stdin_closes:
        threading.Thread(target=_stop_at_end_of_input, args=(loop, stop), daemon=True).start()
    try:
        if not command:
            print(f"serving {', '.join(FLAGS.buckets)} at {url}", flush=True)
            print("".join(f"export {name}={value}\n" for name, value in environ(url).items()), end="", flush=True)
            await stop.wait()
            return 0
        child = await asyncio.create_subprocess_exec(*command, env={**os.environ, **environ(url)})
        await asyncio.wait(
            [asyncio.ensure_future(child.wait()), asyncio.ensure_future(stop.wait())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        if child.returncode is None:
            child.terminate()
            await child.wait()
        return 0 if child.returncode is None else child.returncode
    finally:
        await runner.cleanup()


def main(argv: Sequence[str]) -> int:
    try:
        faults = Faults.parse(FLAGS.faults)
        emulator = Emulator(tuple(FLAGS.buckets), faults, int(FLAGS.max_gib * (1 << 30)))
        return asyncio.run(serve(emulator, argv[1:]))
    except (ValueError, OSError) as error:
        print(f"gcs_emulator: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    app.run(main)
