"""NVRx's state dict for CPU tensors; in a module of its own, as it is pickled by its name."""

from __future__ import annotations

from typing import Any

from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import (  # type: ignore[import-not-found, unused-ignore]
    BasicTensorAwareStateDict,
)


class OnCpu(BasicTensorAwareStateDict):  # type: ignore[misc, unused-ignore]
    """Its own constructor asserts that all tensors are on CUDA devices."""

    def __init__(self, state_dict: dict[str, Any]) -> None:
        self.state_dict, self._is_hollow = state_dict, False
