"""What is at a bucket's name that is not a run's. (Of directories: tests/cli/test_commands.py.)"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.cli.main import main
from orchestrator.run import not_a_run
from orchestrator.storage import open_storage
from orchestrator.storage.port import Entry
from tests.support.gcs import BUCKET, emulator


@pytest.fixture(scope="module")
def above() -> str:
    """A prefix with two runs, a folder of something else, and an object."""
    emulator()
    url = f"gs://{BUCKET}/{uuid.uuid4().hex}/runs"
    storage = open_storage(url)
    for name in (
        "alpha/journal/00000000000000000001.json",
        "alpha/steps/00000001/x",
        "beta/journal/x",
        "other/things/x",
    ):
        storage.create(name, b"x")
    storage.create("notes", b"x")
    return url


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/alpha/steps", "it is inside the run {above}/alpha; give that instead"),
        ("/alpha/nothing/here", "it is inside the run {above}/alpha; give that instead"),
        ("/other", "there are objects, but no journal/"),
        ("/notes", "it is an object, and a run is a name with objects below it"),
        ("", "it is a directory of runs, of which one must be given: alpha, beta"),
        ("/alhpa", "there are no objects below this name; did you mean {above}/alpha?"),
        ("/zzz", "there are no objects below this name"),
    ],
)
def test_what_is_not_a_run_is_called_by_what_it_is_in_a_bucket(
    above: str, place: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["orchestrator", "ls", above + place]) == 3
    assert capsys.readouterr().err.rstrip().endswith(f"not a run: {said.format(above=above)}")


def test_a_name_right_below_the_bucket_asks_nothing_of_the_whole_bucket(capsys: pytest.CaptureFixture[str]) -> None:
    emulator()
    assert main(["orchestrator", "ls", f"gs://{BUCKET}/{uuid.uuid4().hex}"]) == 3
    assert capsys.readouterr().err.rstrip().endswith("not a run: there are no objects below this name")


class ManyObjects:
    """A store with a million objects and no folder."""

    url = "gs://bucket/run"

    def __init__(self) -> None:
        self.asked = 0

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        self.asked += 1
        return iter([Entry(f"{start}x"[-40:], 1)])


def test_however_many_objects_are_beside_it_few_are_asked_for() -> None:
    store: Any = ManyObjects()
    assert not_a_run._folders(store) == [] and store.asked <= 20
