"""`python -m launch.train`, as people type it. The example job itself is in `launch.example.train`."""

from __future__ import annotations

from absl import app, flags

from launch.example import train

if __name__ == "__main__":
    __doc__ = train.__doc__  # what --help prints
    flags.adopt_module_key_flags(train)
    app.run(train.main, flags_parser=train.parse_flags)
