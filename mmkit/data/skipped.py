"""What was left out, and why: nothing is skipped in silence."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A sample that is not used.

    Attributes:
        source: File or shard it comes from.
        key: Its key in there (line, member, id).
        reason: Why, in words a user can act on.
    """

    source: str
    key: str
    reason: str


# Apart from InputError, which ends the command: one bad picture in a million must not.
class SampleError(ValueError):
    """One sample cannot be used; the loader replaces it and counts it."""
