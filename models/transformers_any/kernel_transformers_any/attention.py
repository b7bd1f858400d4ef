"""The way from a model's attention layers to the paged KV: two functions in transformers' attention registry.

`PAGED` runs: it finds the layer's declaration on the module and the step in a keyword that transformers hands through.
`PROBE` is used once, after loading: it runs the model on two tokens and learns from every call what the layer needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kernel_core.api import ConfigError
from kernel_core.nn.api import AttentionBackend, AttentionSpec, Forward

PAGED, PROBE = "kernel_paged", "kernel_probe"
FAR = 2**30  # a position further than any window


class Layer(nn.Module):
    """What the kernel finds in an attention module: its spec, and the backend that was chosen for it."""

    def __init__(self, spec: AttentionSpec, backend: AttentionBackend) -> None:
        super().__init__()
        self.spec, self.backend = spec, backend


@dataclass(slots=True)
class Probe:
    """Learns the attention layers in the order in which they run. `masks`: the windows that the model's masks draw; a mask
    that stands for entry i is filled with i."""

    specs: list[tuple[nn.Module, AttentionSpec]] = field(default_factory=list)
    masks: list[int | None] = field(default_factory=list)


def paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kernel_forward: Forward,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key, value [1, Hkv, T, D] → [1, T, Hq, Dv]. What is unused was checked by the probe."""
    layer = module.kernel_layer
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    spec, fwd = layer.spec, kernel_forward
    return layer.backend.forward(q, k, v, fwd.kv[spec.layer], fwd.attention[spec.layer], spec, s_aux)[None], None


def probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kernel_forward: Probe | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Note what the layer needs; the result is the values of each token itself."""
    name = type(module).__name__
    if kernel_forward is None:
        raise ConfigError(f"{name} does not hand keywords through to its attention, so it cannot run on the paged KV")
    _refuse_unknown(name, module, options)
    if key.shape[2] != query.shape[2]:
        raise ConfigError(f"{name} attends to something else than its own tokens, which is not supported")
    found = kernel_forward
    window = options.get("sliding_window") if attention_mask is None else _window_of(name, attention_mask, found.masks)
    spec = AttentionSpec(
        layer=f"layers.{len(found.specs)}.attention",
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[3],
        v_head_dim=value.shape[3],
        scale=query.shape[3] ** -0.5 if options.get("scaling") is None else float(options["scaling"]),
        kind="full" if window is None else "window",
        window=window,
        soft_cap=options.get("softcap"),
        sinks=options.get("s_aux") is not None,
    )
    found.specs.append((module, spec))
    return value[0].repeat_interleave(query.shape[1] // value.shape[1], 0).transpose(0, 1)[None], None


def _refuse_unknown(name: str, module: nn.Module, options: dict[str, Any]) -> None:
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ConfigError(f"{name} is not causal: only causal language models run on the paged KV")
    known = ("s_aux", "position_ids", "cache_position")
    tensors = sorted(key for key, value in options.items() if isinstance(value, Tensor) and key not in known)
    if tensors:
        raise ConfigError(f"{name} gives its attention {tensors}, which the paged KV does not know")


def _window_of(name: str, mask: Tensor, masks: list[int | None]) -> int | None:
    number = int(mask.flatten()[0])
    if (mask != number).any() or not 0 <= number < len(masks):
        raise ConfigError(f"{name} changes its attention mask (a position bias?), which is not supported")
    return masks[number]


def probe_mask(mask_function: Callable[..., Any], **options: Any) -> Tensor:
    """A mask [1, 1, q, kv] that stands for what the mask function draws. Needs the current `Probe`: see `masks_of`."""
    masks = _current[-1].masks
    masks.append(mask_window(mask_function))
    size = (1, 1, int(options["q_length"]), int(options["kv_length"]))
    return torch.full(size, len(masks) - 1.0, device=options.get("device"))


def mask_window(mask_function: Callable[..., Any]) -> int | None:
    """The window of a mask function; None: causal, without one. Raises ConfigError when it is neither."""
    first = torch.zeros(1, dtype=torch.int64)

    def sees(query: int, key: int) -> bool:
        q, k = (torch.tensor(position) for position in (query, key))
        return bool(torch.as_tensor(mask_function(first[0], first[0], q, k)).flatten()[0])

    window = None if sees(FAR, 0) else _reach(sees, FAR)
    steady = window is None or all(_reach(sees, FAR + shift) == window for shift in (1, window // 2, window))
    if not (steady and sees(FAR, FAR)) or sees(FAR, FAR + 1):
        raise ConfigError("the model's attention mask is neither causal nor a sliding window, which is not supported")
    return window


def _reach(sees: Callable[[int, int], bool], query: int) -> int:
    """How many positions a query sees, itself included."""
    low, high = 0, query  # the distance `low` is seen, `high` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sees(query, query - middle) else (low, middle)
    return low + 1


_current: list[Probe] = []


class masks_of:
    """While it lasts, masks that models make are noted in this probe: their makers are not handed any keyword."""

    def __init__(self, found: Probe) -> None:
        self.found = found

    def __enter__(self) -> None:
        _current.append(self.found)

    def __exit__(self, *error: object) -> None:
        _current.pop()


AttentionInterface.register(PAGED, paged)
AttentionInterface.register(PROBE, probe)
AttentionMaskInterface.register(PROBE, probe_mask)
