"""The kernel's own configuration: one file, one model, at most 25 keys. Plugins own their sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class EngineConfig(_Frozen):
    """`[engine]`. Sizes are tokens unless said."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's, where the device has it"
    )
    max_model_len: int | Literal["auto"] = Field(
        default="auto", description="prompt + output of one request; auto: what the model allows and memory fits"
    )
    max_tokens_per_step: int = Field(default=2048, ge=1, description="token budget of a step")
    max_requests: int = Field(default=256, ge=1, description="requests running at once (slots)")
    max_prompt_chunk: int | None = Field(default=None, ge=1, description="longest prefill chunk of one request in a step")
    block_size: int | None = Field(default=None, description="tokens per KV block; None: the device's first choice")
    kv_memory: str | None = Field(default=None, description="bytes for KV, as 2GiB; None: what the device has left")
    kv_blocks: int | None = Field(default=None, ge=2, description="blocks of the largest group, overrides kv_memory")
    memory_fraction: float = Field(default=0.85, gt=0, le=1, description="share of device memory the engine may use")
    overlap: bool | Literal["auto"] = Field(default="auto", description="plan the next step while the last one runs")
    seed: int | None = Field(default=None, description="key of requests that carry none; None: random")
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"] = "raw_logprobs"
    max_logprobs: int = Field(default=20, ge=-1, description="largest logprobs a request may ask; -1: no limit")
    policy_passes: int = Field(
        default=64, ge=1, description="how often admission may pass a request over before it is first in line"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of one worker; None: the cores available")
    random_weights: bool = Field(default=False, description="build the model with random weights (benchmarks)")
    sampling_defaults: Literal["model", "kernel"] = Field(default="model", description="model: honour generation_config.json")


class KernelConfig(_Frozen):
    """The whole of `kernel.toml`. `plugins` maps a plugin's name to its section, `{}` for its defaults, or false to leave
    a plugin of the default profile out (a device: "auto" passes it over). `executor`: a plugin's name, "in_process", or None
    (the only one enabled, else in this process). `profile`: "default" or "none"."""

    model: str = "tiny-chat"
    tokenizer: str | None = None
    device: str = "auto"
    executor: str | None = None
    trust_code: bool = False
    engine: EngineConfig = EngineConfig()
    plugins: dict[str, dict[str, Any] | bool] = {}
    profile: str = "default"
