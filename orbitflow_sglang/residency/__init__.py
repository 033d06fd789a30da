"""Where the bytes of a logical KV page are, per layer: device arena or host store.

Knows torch, not sglang. ``store.ResidencyStore`` is the one owner of a page's
state; everything else here serves it.
"""

from __future__ import annotations


class ResidencyError(RuntimeError):
    """The store was asked for something its invariants forbid, or ran out of pages."""
