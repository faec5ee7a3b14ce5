"""What is compared with Orbax's v1 API needs one: from Orbax 0.12 on."""

from __future__ import annotations

import orbax.checkpoint as ocp

collect_ignore = [] if hasattr(ocp.v1, "save") else ["test_v1.py"]
