"""OrbitFlow for SGLang: decode with part of the KV cache on the host.

Importing this package loads neither torch nor sglang: the planner's worker
process and SGLang's plugin discovery both start here.
"""

from __future__ import annotations

__version__ = "0.1.0"

SUPPORTED_SGLANG = "0.5.23"
