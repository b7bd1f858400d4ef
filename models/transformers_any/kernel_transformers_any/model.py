"""A causal language model of transformers as a `Model` of the kernel, its code unchanged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from kernel_core.api import ConfigError
from kernel_core.nn.api import Forward, ModelContext
from kernel_transformers_any.attention import PAGED, PROBE, Layer, Probe, masks_of

#: every tensor goes to the model as a whole: transformers knows its own names, and converts old ones
WEIGHTS = {"**": ""}

PROBE_TOKENS = 2


class TransformersModel(nn.Module):
    """Implements `Model`. Built on the meta device; `finish` hands the collected tensors to transformers' own loading, which
    maps names and takes memory-mapped tensors as they are, and then learns the attention layers from one small forward."""

    tap_points: ClassVar[Mapping[str, str]] = {}

    def __init__(self, ctx: ModelContext) -> None:
        super().__init__()
        if ctx.taps:
            raise ConfigError(f"models that run through transformers have no tap points, asked for {list(ctx.taps)}")
        if ctx.world_size > 1:
            raise ConfigError("models that run through transformers cannot be shared between ranks; use one rank")
        self.ctx, self._tensors = ctx, {}
        self._options = {"dtype": ctx.dtype, "attn_implementation": PROBE, "trust_remote_code": ctx.config.trust_code}
        self.config = _config(ctx)
        with torch.device("meta"):
            self.causal = self._build()

    def _build(self) -> PreTrainedModel:
        try:
            return AutoModelForCausalLM.from_config(self.config, **self._options)
        except (ValueError, KeyError, ImportError, NotImplementedError) as error:
            name = self.ctx.info.architecture
            raise ConfigError(f"transformers cannot build {name} on an attention that others compute: {error}") from error

    # ---- weights

    def load(self, part: str, tensor: Tensor) -> list[str]:
        self._tensors[part] = tensor
        return [part]

    def finish(self) -> None:
        """Raises ConfigError when the tensors do not fit, or the model needs what the paged KV cannot do."""
        if self._tensors:
            tensors, self._tensors = self._tensors, {}
            self.causal = self._from(tensors)
        self.causal = self.causal.to(self.ctx.device).eval().requires_grad_(False)
        self._learn()

    def _from(self, tensors: dict[str, Tensor]) -> PreTrainedModel:
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            made, told = type(self.causal).from_pretrained(
                None, config=self.config, state_dict=tensors, output_loading_info=True, **self._options
            )
        finally:
            if bars:
                logging.enable_progress_bar()
        wrong = {
            kind: sorted(map(str, told[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[kind]
        }
        if wrong:
            listed = "; ".join(f"{kind}: {', '.join(names[:8])}" for kind, names in wrong.items())
            raise ConfigError(f"the checkpoint does not fit its config.json: {listed}")
        return made

    def randomise(self, generator: torch.Generator) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(generator.initial_seed())
            self.causal = self._build()

    # ---- attention layers

    @torch.no_grad()
    def _learn(self) -> None:
        """Run two tokens with the probing attention; afterwards every attention module holds its `Layer`."""
        self.causal.set_attn_implementation(PROBE)
        self._head = (_head(self.causal),)
        ids = torch.arange(PROBE_TOKENS, device=self.ctx.device)
        whole, parts = Probe(), Probe()
        with masks_of(whole):
            expected = self.causal(input_ids=ids[None], **_call(ids, whole)).logits[0]
        self._check(whole)
        with masks_of(parts):
            logits = self.logits(self._hidden({"input_ids": ids[None]}, ids, parts))
        if not torch.allclose(expected, logits, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ConfigError(
                f"{type(self.causal).__name__} does more between its layers and its logits than a head: not supported"
            )
        for module, spec in whole.specs:
            module.kernel_layer = Layer(spec, self.ctx.attention(spec))
        self.causal.set_attn_implementation(PAGED)

    def _check(self, found: Probe) -> None:
        layers = self.config.get_text_config(decoder=True).num_hidden_layers
        name, modules = type(self.causal).__name__, {id(module) for module, _ in found.specs}
        if len(found.specs) != layers:
            raise ConfigError(
                f"{name} has {layers} layers, {len(found.specs)} of them attention that transformers lets others compute;"
                " models with other kinds of layers (state space, recurrent) need a family of their own"
            )
        if len(modules) != layers:
            raise ConfigError(f"{name} uses one attention layer several times, which is not supported")

    # ---- forward

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, H] by the model's embedding module."""
        return self.causal.get_input_embeddings()(token_ids)

    def forward(self, fwd: Forward) -> Tensor:
        """→ hidden states [T, H] after the final norm."""
        if fwd.embeds is None:
            given = {"input_ids": fwd.token_ids[None]}
        else:
            x = self.embed(fwd.token_ids)
            given = {"inputs_embeds": torch.where(fwd.embeds_mask[:, None], fwd.embeds.to(x.dtype), x)[None]}
        return self._hidden(given, fwd.positions, fwd)

    def _hidden(self, given: dict[str, Tensor], positions: Tensor, forward: Forward | Probe) -> Tensor:
        return self.causal.base_model(**given, **_call(positions, forward)).last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] → [N, V], by the model's own code after its layers."""
        (head,) = self._head
        return head(inputs_embeds=hidden[None], use_cache=False).logits[0]


class GivenOutput(BaseModelOutputWithPast):
    """Whatever else a model's head copies from the output of its layers is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class Given(nn.Module):
    """Stands in the place of a model's layers: what it is given is what comes out."""

    @property
    def decoder(self) -> Given:
        return self

    def forward(self, *unused: Any, inputs_embeds: Tensor, **also_unused: Any) -> GivenOutput:
        return GivenOutput(last_hidden_state=inputs_embeds)


def _head(causal: PreTrainedModel) -> PreTrainedModel:
    """The same model without its layers: what it does to hidden states."""
    head = copy.copy(causal)
    head.__dict__["_modules"] = {**causal._modules, causal.base_model_prefix: Given()}
    return head


def _call(positions: Tensor, forward: Forward | Probe) -> dict[str, Any]:
    return {"position_ids": positions[None], "use_cache": False, "kernel_forward": forward}


def _config(ctx: ModelContext) -> Any:
    try:
        return AutoConfig.from_pretrained(ctx.info.path, trust_remote_code=ctx.config.trust_code)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"no installed family knows {ctx.info.architecture}, and transformers cannot read its config.json: {error}"
        ) from error
