"""What the config.json of a published head says, in its several spellings.

EAGLE-1      a Llama config; older ones with the keys `eagle_fc_bias` or `bias`, `add_para_norm`, `truncated_vocab_size`,
             perhaps wrapped: {"model_type": "eagle", "model": {...}}
EAGLE-3      a Llama config with `draft_vocab_size`; options beside it or in `eagle_config`
speculators  {"speculators_model_type": "eagle" or "eagle3", "transformer_layer_config": {...}, options}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kernel_core.api import ConfigError, ModelInfo
from kernel_core.nn.api import DecoderConfig, layer_types, layer_windows, read_decoder

Method = Literal["eagle", "eagle3"]
EAGLE3_KEYS = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids", "norm_before_residual")


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """`layers` describes the head's own layers, `draft_vocab` its vocabulary. `aux` are the target's layers whose inputs EAGLE-3
    reads (none: the target's final state, as EAGLE-1), `target_hidden` their size."""

    method: Method
    layers: DecoderConfig
    draft_vocab: int
    target_hidden: int
    aux: tuple[int, ...] = ()
    fc_bias: bool = False
    para_norm: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    logit_scale: float = 1.0

    @property
    def taps(self) -> tuple[str, ...]:
        """The tap points of the target that `aux` names: the input of layer i is the state after layer i - 1."""
        return tuple(f"layers.{index - 1}" if index else "embedding" for index in self.aux)


def read_head(info: ModelInfo, method: str, target: Mapping[str, Any]) -> HeadConfig:
    """`method` "auto": by the head's config. `target` is the target's config.json. Raises ConfigError when the head is of another
    kind, or made for another target."""
    config = _flat(info)
    kind = _method(config) if method == "auto" else method
    _refuse(info.path, config)
    text = target.get("text_config") or target
    read = (_eagle if kind == "eagle" else _eagle3)(config, _layers(config), text)
    _check(info.path, read, text)
    return read


def _flat(info: ModelInfo) -> Mapping[str, Any]:
    """The config without its wrappers, outer keys last. Raises ConfigError for another kind of speculator."""
    outer, kind = _stated(info.config), info.config.get("speculators_model_type")
    if kind not in (None, "eagle", "eagle3"):
        raise ConfigError(
            f"the head {info.path} is a speculators checkpoint of the type {kind!r}; plugins.eagle runs 'eagle' and 'eagle3'"
        )
    inner = outer.get("model") or {}
    if kind is not None:
        inner = {"method": kind, **outer.get("transformer_layer_config", {})}
        inner |= {"norm_before_residual": True} if kind == "eagle3" else {"bias": outer.get("fusion_bias", False)}
    layer_type = inner.get("model_type", outer.get("model_type"))
    return {**inner, **outer, **outer.get("eagle_config", {}), "model_type": layer_type}


def _refuse(path: str, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for what changes a head's formula and is not supported."""
    asks = {
        "parallel_drafting": bool(config.get("parallel_drafting")),
        "pard_token": config.get("pard_token") is not None,
        "skip_prenorm": not config.get("skip_prenorm", True),
        "skip_output_norm": not config.get("skip_output_norm", True),
        "layernorms": bool(config.get("layernorms")),
    }
    for key in (key for key, asked in asks.items() if asked):
        raise ConfigError(
            f"the head {path} sets {key} = {config[key]!r} in its config.json, which is no EAGLE-1 or EAGLE-3 head: "
            "plugins.eagle cannot run it"
        )


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


def _method(config: Mapping[str, Any]) -> Method:
    names = [config.get("method", ""), *(config.get("architectures") or ())]
    named = any("eagle3" in name.lower() for name in names)
    return "eagle3" if named or any(config.get(key) is not None for key in EAGLE3_KEYS) else "eagle"


def _layers(config: Mapping[str, Any]) -> DecoderConfig:
    """The layers are Llama's, with head norms where the config says Qwen3."""
    bias = bool(config.get("attention_bias", False))
    config = {"max_position_embeddings": 2048, **config}
    count = int(config.get("num_hidden_layers") or 1)
    settings: dict[str, Any] = {}
    if config.get("layer_types") and config.get("use_sliding_window", True):
        settings["windows"] = layer_windows(config, layer_types(config, ())[:count])
    return read_decoder(
        config,
        qkv_bias=bool(config.get("qkv_bias", bias)),
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=config.get("model_type") == "qwen3",
        **settings,
    )


def _eagle(config: Mapping[str, Any], layers: DecoderConfig, target: Mapping[str, Any]) -> HeadConfig:
    return HeadConfig(
        "eagle",
        layers,
        draft_vocab=int(config.get("truncated_vocab_size") or layers.vocab_size),
        target_hidden=layers.hidden_size,
        fc_bias=bool(config.get("eagle_fc_bias", config.get("bias", False))),
        para_norm=bool(config.get("add_para_norm", False)),
        logit_scale=float(config.get("logit_scale", 1.0)),
    )


def _eagle3(config: Mapping[str, Any], layers: DecoderConfig, target: Mapping[str, Any]) -> HeadConfig:
    depth = int(target["num_hidden_layers"])
    aux = config.get("eagle_aux_hidden_state_layer_ids") or (2, depth // 2, depth - 3)
    if not config.get("use_aux_hidden_state", True):
        aux = ()
    switches = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return HeadConfig(
        "eagle3",
        layers,
        draft_vocab=int(config.get("draft_vocab_size") or layers.vocab_size),
        target_hidden=int(config.get("target_hidden_size") or layers.hidden_size),
        aux=tuple(int(index) for index in aux),
        logit_scale=float(config.get("logit_scale", 1.0)),
        **{name: bool(config.get(name, False)) for name in switches},
    )


def _check(path: str, head: HeadConfig, target: Mapping[str, Any]) -> None:
    made = {"vocab_size": head.layers.vocab_size, "hidden_size": head.target_hidden}
    for name, mine in made.items():
        if target.get(name) != mine:
            raise ConfigError(f"the head {path} was made for a target with {name} {mine}; this one has {target.get(name)}")
    wrong = [index for index in head.aux if not 0 <= index <= int(target["num_hidden_layers"])]
    if wrong:
        raise ConfigError(
            f"the head {path} reads the inputs of the target's layers {list(head.aux)}; the target has layers 0 to "
            f"{int(target['num_hidden_layers']) - 1}: is it the head of another model?"
        )
    if head.draft_vocab > head.layers.vocab_size:
        raise ConfigError(f"the head {path} drafts {head.draft_vocab} tokens of a vocabulary of {head.layers.vocab_size}")
