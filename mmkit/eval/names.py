"""Names of the suites: which exist can be asked without importing one."""

from __future__ import annotations

from importlib.metadata import entry_points

# Other packages add suites by entry points of this group.
GROUP = "mmkit.suites"
# Name -> module in mmkit.eval.suites; its SUITE is the suite.
_SAME_NAME = ("vqav2", "textvqa", "vizwiz", "gqa", "scienceqa", "pope", "mme", "mmbench", "mmmu", "generic")
BUILT_IN = {"coco-caption": "captions", **{name: name for name in _SAME_NAME}}


def suite_names() -> list[str]:
    """All known suites: those of mmkit first, then those of other packages."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=GROUP)} - set(BUILT_IN))]
