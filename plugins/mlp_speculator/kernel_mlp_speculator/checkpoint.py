"""What an MLP speculator's config.json says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernel_core.api import ConfigError, ModelInfo

MODEL_TYPE = "mlp_speculator"


@dataclass(frozen=True, slots=True)
class SpeculatorConfig:
    """`emb_dim` is the target's hidden size, `inner_dim` the stages' own. `top_k` candidates are taken after each stage in a
    tree, and `n_candidates` of all that a stage gives are continued by the next one."""

    vocab_size: int
    emb_dim: int
    inner_dim: int
    n_predict: int
    top_k: tuple[int, ...]
    n_candidates: int
    tie_weights: bool
    scale_input: bool

    @property
    def token_scale(self) -> float:
        """How much a token counts against the state it joins: after n_predict stages half of a state's variance is left."""
        state = 0.5 ** (0.5 / self.n_predict)
        return math.sqrt((1 - state**2) * self.inner_dim / 2) / state

    @property
    def tree_size(self) -> int:
        """How many candidates a whole tree has."""
        size, beams = 0, 1
        for width in self.top_k:
            size += beams * width
            beams = min(beams * width, self.n_candidates)
        return size


def read_config(info: ModelInfo) -> SpeculatorConfig:
    """Raises ConfigError when the checkpoint is no MLP speculator, or contradicts itself."""
    config = info.config
    if config.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"{info.path} is a checkpoint of the type {config.get('model_type')!r}, not an {MODEL_TYPE!r}")
    lacking = [name for name in ("vocab_size", "emb_dim", "n_predict") if name not in config]
    if lacking:
        raise ConfigError(f"the config.json of {info.path} does not say {', '.join(lacking)}")
    n_predict = int(config["n_predict"])
    top_k = tuple(config.get("top_k_tokens_per_head") or (1,) * n_predict)
    if len(top_k) != n_predict:
        raise ConfigError(f"the config.json of {info.path} lists top_k_tokens_per_head for {len(top_k)} of {n_predict} stages")
    read = SpeculatorConfig(
        vocab_size=int(config["vocab_size"]),
        emb_dim=int(config["emb_dim"]),
        inner_dim=int(config.get("inner_dim") or config["emb_dim"]),
        n_predict=n_predict,
        top_k=top_k,
        n_candidates=int(config.get("n_candidates") or max(top_k)),
        tie_weights=bool(config.get("tie_weights", False)),
        scale_input=bool(config.get("scale_input", False)),
    )
    if read.tie_weights and n_predict < 2:
        raise ConfigError(f"the config.json of {info.path} ties the weights of a single stage; n_predict must be more than 1")
    return read


def check_target(config: SpeculatorConfig, target: Mapping[str, Any]) -> None:
    """Raises ConfigError when the speculator was made for another target; `target` is its config.json."""
    text = target.get("text_config") or target
    for name, mine in (("hidden_size", config.emb_dim), ("vocab_size", config.vocab_size)):
        if text.get(name) != mine:
            raise ConfigError(f"the speculator was made for a target with {name} {mine}; this one has {text.get(name)}")
