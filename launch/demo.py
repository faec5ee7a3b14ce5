"""`python -m launch.demo`, as people type it (and `make demo`). The demo itself is in `launch.example.demo`."""

from __future__ import annotations

from absl import app, flags

from launch.example import demo

if __name__ == "__main__":
    __doc__ = demo.__doc__  # what --help prints
    flags.adopt_module_key_flags(demo)
    app.run(demo.main)
