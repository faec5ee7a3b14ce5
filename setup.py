"""What pyproject.toml cannot say: where the examples are installed, and what an index shows of README.md."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup

# An index has the page alone: links and pictures that lead to other files of the checkout become plain words there.
_RELATIVE = re.compile(r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)")

# setuptools never empties it: a module that has gone since an earlier build would be in the wheel.
shutil.rmtree("build/lib", ignore_errors=True)

setup(
    long_description=_RELATIVE.sub(r"\1", Path("README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
    # Inside our own package: a package `examples` in site-packages could be anyone's.
    packages=[
        *find_packages(include=["orchestrator", "orchestrator.*", "launch", "launch.*"]),
        "orchestrator.examples",
    ],
    package_dir={"orchestrator.examples": "examples"},
)
