"""Moving small arrays between host and device without making the host wait."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on the device, same dtype. A copy that the host does not wait for; on a host device a view of `array`."""
    array = np.ascontiguousarray(array)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_columns(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """One-dimensional arrays as int64 device tensors, in one transfer."""
    flat = upload(np.concatenate([np.asarray(a, np.int64) for a in arrays.values()]), device)
    return dict(zip(arrays, flat.split([len(a) for a in arrays.values()]), strict=True))


class Download:
    """Device tensors on their way to the host; `arrays()` waits for them. Host tensors arrive at once."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._event: torch.Event | None = None
        if device.type == "cpu":
            self._tensors = dict(tensors)
            return
        self._tensors = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor, non_blocking=True)
        self._event = torch.Event(device)
        self._event.record()

    def arrived(self) -> bool:
        """Would `arrays` not wait?"""
        return self._event is None or self._event.query()

    def arrays(self) -> dict[str, np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}
