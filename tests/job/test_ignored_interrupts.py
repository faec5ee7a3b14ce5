"""A Ctrl-C that Python ignores, as it came in a callback, stops the program all the same; other hooks stay in use."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import gc, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in the background
heard = []
sys.unraisablehook = lambda ignored: heard.append(ignored.exc_type.__name__)
import orchestrator as oc
oc.Options

class Dropped:
    def __init__(self, error): self.error = error
    def __del__(self):
        if self.error is KeyboardInterrupt: signal.raise_signal(signal.SIGINT)
        else: raise self.error

def collected(phase, info):
    if phase == "start": signal.raise_signal(signal.SIGINT)

{handler}
try:
    {act}
    end = time.monotonic() + {wait}
    while time.monotonic() < end: time.sleep(0.01)
    print("went on", heard)
except KeyboardInterrupt:
    print("interrupted", heard)
"""

NO_MORE_THREADS = """
import resource
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize(
    ("act", "handler", "said"),
    [
        ("Dropped(KeyboardInterrupt)", "", "interrupted []"),
        ("gc.callbacks.append(collected); gc.collect(); gc.callbacks.clear()", "", "interrupted []"),
        ("Dropped(ValueError)", "", "went on ['ValueError']"),
        ("Dropped(KeyboardInterrupt)", "signal.signal(2, signal.SIG_IGN)", "went on []"),
        ("Dropped(KeyboardInterrupt)", "signal.signal(2, lambda *_: heard.append(2))", "went on [2]"),
        ("Dropped(KeyboardInterrupt)", NO_MORE_THREADS, "went on ['KeyboardInterrupt']"),
    ],
)
def test_a_ctrl_c_in_a_callback_comes_again(act: str, handler: str, said: str) -> None:
    wait = 30 if said.startswith("interrupted") else 0.3
    program = PROGRAM.format(act=act, handler=handler, wait=wait)
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert started.stdout.strip() == said, started.stderr
