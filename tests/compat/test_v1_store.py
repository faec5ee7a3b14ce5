"""`orchestrator.compat.v1` at `gs://`: the same programs as on a file system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath
from orbax.checkpoint import v1 as theirs

import orchestrator as oc
from orchestrator.cli.main import main
from orchestrator.compat import v1
from orchestrator.storage import open_storage
from tests.compat.test_compat import assert_equal
from tests.compat.test_v1 import moved
from tests.support import gcs
from tests.support.jobs import orbax_v1_loops

pytestmark = pytest.mark.skipif(not hasattr(theirs, "save"), reason="names that Orbax 0.12 has brought")


# In a store there are no directories of steps to list; what loads them by path is below.
LOOPS = [loop for loop in orbax_v1_loops.LOOPS if loop is not orbax_v1_loops.by_the_path_of_a_step]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_program_does_in_a_store_what_it_does_with_orbax_on_a_file_system(loop: Any, tmp_path: Path) -> None:
    gcs.server()
    expected = loop(tmp_path)
    assert_equal(moved()[loop.__name__](epath.Path(gcs.new_root())), expected)


def test_a_step_is_loaded_by_the_path_that_orbax_would_give_it() -> None:
    root = gcs.new_root()
    names = v1.path.step.standard_name_format(step_prefix="ckpt")
    with v1.training.Checkpointer(root, step_name_format=names) as checkpointer:
        checkpointer.save(7, {"w": jnp.ones(2)})
    for name in ("7", "ckpt_7", "ckpt_00000007"):
        assert v1.load(f"{root}/{name}")["w"].tolist() == [1.0, 1.0]
    for name in ("8", "ckpt_8", "ckpt", "state"):
        with pytest.raises(v1.errors.InvalidLayoutError):
            v1.load(f"{root}/{name}")


def test_what_orbax_has_written_into_a_store_is_rejected_with_the_way_out() -> None:
    url = f"{gcs.new_root()}/7"
    theirs.save(url, {"w": jnp.ones(2)})
    before = [entry.key for entry in open_storage(url).list("")]
    assert not v1.is_orbax_checkpoint(url)
    with pytest.raises(oc.UsageError, match="was written by Orbax itself"):
        v1.load(url)
    with pytest.raises(oc.UsageError, match="no checkpoint of ours; delete it"):
        v1.save(url, {"w": jnp.ones(2)}, overwrite=True)
    assert [entry.key for entry in open_storage(url).list("")] == before
    root = gcs.new_root()
    assert main(["orchestrator", "adopt", root, f"--from={url}"]) == 0
    assert v1.load(f"{root}/7")["w"].tolist() == [1.0, 1.0]
