"""Small arrays on their way to where the model computes."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """``values`` on ``device``, queued on the current stream; the array must stay as it is."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    # From pinned memory, which PyTorch keeps until the copy is over, nobody waits for it.
    return tensor.pin_memory().to(device, non_blocking=True)
