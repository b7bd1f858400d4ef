"""What a user asks, made into what the scheduler takes: prompt forms, tokens, limits, plugins' fields, seeds, n completions."""

from __future__ import annotations

import difflib
import logging
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from kernel_core.errors import RequestError
from kernel_core.plan import PROMPT_LOGPROBS
from kernel_core.protocols import Prepared, RequestPreparer, TextCodec
from kernel_core.request import Request, SamplingParams
from kernel_core.wire import encode

#: what users may give as a prompt: text, token ids, or a mapping with "prompt" or "prompt_token_ids" and plugins' keys
Prompt = str | Sequence[int] | Mapping[str, Any]
#: settings of generation_config.json that are honoured elsewhere or say nothing about sampling, and values that change nothing
NO_SAMPLING = {"do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "transformers_version"}
RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop"}
NEUTRAL = (None, False, True, 1, [], {})
_MASK = 2**64 - 1
logger = logging.getLogger("kernel_core")


@dataclass(frozen=True, slots=True)
class Accepted:
    """A valid user request: `requests` are its n sequences, which share prompt and family."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    requests: tuple[Request, ...]
    arrival: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of this engine. `max_tokens`: the model's own cap on output, from its generation config."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    max_tokens: int | None = None
    priorities: bool = False  # does the policy read them?
    seed: int | None = None  # of requests that carry none


@dataclass(frozen=True, slots=True)
class FieldSet:
    """The request fields of one plugin, and what reads them."""

    plugin: str
    model: type[BaseModel] | None
    preparer: RequestPreparer | None


class Intake:
    """Turns prompts into `Accepted`. Raises RequestError, and nothing of an invalid request remains. Rate: request."""

    def __init__(self, limits: Limits, codec: TextCodec | None, fields: Sequence[FieldSet], defaults: Mapping[str, Any]) -> None:
        self.limits, self.codec, self.defaults = limits, codec, defaults
        self._fields = fields
        self._arrivals = 0

    def params(self, **given: Any) -> SamplingParams:
        """Sampling parameters with the model's defaults for what is not given."""
        return SamplingParams.of(**{**self.defaults, **given})

    @property
    def fields(self) -> dict[str, type[BaseModel]]:
        """The request fields that plugins registered, by plugin."""
        return {fields.plugin: fields.model for fields in self._fields if fields.model is not None}

    def accept(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> Accepted:
        arrival = time.monotonic()
        params = self.params() if params is None else params
        params.validate()
        self._check_params(params)
        values = self._validate_fields(params)
        text, token_ids = self._tokenise(prompt)
        prepared = Prepared(request_id, prompt, params, {}, np.asarray(token_ids, np.int32))
        for fields in self._fields:
            if fields.preparer is not None:
                prepared.fields = values[fields.plugin]
                fields.preparer.prepare(prepared)
        self._check_prompt(prepared.token_ids)
        self._arrivals += 1
        key = request_key(params.seed, self.limits.seed, self._arrivals)
        requests = tuple(self._request(prepared, params, key, index) for index in range(params.n))
        return Accepted(request_id, text, prepared.token_ids.tolist(), params, requests, arrival)

    # ---- prompt

    def _tokenise(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, str):
            return prompt, self._encode(prompt)
        if isinstance(prompt, Mapping):
            return self._from_mapping(prompt)
        return None, _ids(prompt)

    def _from_mapping(self, prompt: Mapping[str, Any]) -> tuple[str | None, Sequence[int]]:
        known = {"prompt", "prompt_token_ids"}.union(*(getattr(f.preparer, "prompt_keys", ()) for f in self._fields))
        unknown = sorted(set(prompt) - known)
        if unknown:
            raise RequestError(f"the prompt has the keys {unknown}, which no enabled plugin reads; known are {sorted(known)}")
        text = prompt.get("prompt")
        if "prompt_token_ids" in prompt:
            return text, _ids(prompt["prompt_token_ids"])
        if not isinstance(text, str):
            raise RequestError('a prompt given as a mapping needs "prompt" (text) or "prompt_token_ids" (a list of ids)')
        return text, self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if self.codec is None:
            raise RequestError("text prompts need the text plugin, which is left out; send token ids")
        return self.codec.encode(text)

    def _check_prompt(self, token_ids: np.ndarray) -> None:
        length, limit, vocab = len(token_ids), self.limits.max_model_len, self.limits.vocab_size
        if length == 0:
            raise RequestError("the prompt is empty; send at least one token")
        bad = token_ids[(token_ids < 0) | (token_ids >= vocab)]
        if bad.size:
            raise RequestError(f"the prompt has token id {int(bad[0])}, the model knows the ids 0 to {vocab - 1}")
        if length >= limit:
            raise RequestError(
                f"the prompt has {length} tokens; max_model_len is {limit} for prompt and output together, so at most"
                f" {limit - 1} fit: shorten the prompt or raise engine.max_model_len"
            )

    # ---- parameters

    def _check_params(self, params: SamplingParams) -> None:
        limit, vocab = self.limits.max_logprobs, self.limits.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and limit != -1 and (vocab if asked == -1 else asked) > limit:
                raise RequestError(f"{name} = {asked} is more than engine.max_logprobs = {limit}; ask for fewer or raise that")
        if params.priority and not self.limits.priorities:
            raise RequestError("priority needs a policy that reads it; enable one (`kernel plugins` lists what is installed)")
        if params.detokenize and self.codec is None:
            raise RequestError("the text plugin is left out; set detokenize=False")
        bad = [token for token in params.stop_token_ids or () if not 0 <= token < vocab]
        if bad:
            raise RequestError(f"stop_token_ids has {bad[0]}, the model knows the ids 0 to {vocab - 1}")

    def _validate_fields(self, params: SamplingParams) -> dict[str, dict[str, Any]]:
        """The plugins' own fields, validated by their models, by plugin."""
        unknown = set(params.fields)
        values: dict[str, dict[str, Any]] = {}
        for fields in self._fields:
            own = {} if fields.model is None else {k: v for k, v in params.fields.items() if k in fields.model.model_fields}
            unknown -= own.keys()
            values[fields.plugin] = _validated(fields.model, own)
        if unknown:
            raise RequestError(self._unknown_field(min(unknown)))
        return values

    def _unknown_field(self, name: str) -> str:
        models = [fields.model.model_fields for fields in self._fields if fields.model is not None]
        known = {*SamplingParams.__dataclass_fields__, *(field for model in models for field in model)} - {"fields"}
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; a plugin that reads it may have to be enabled"
        return f"unknown sampling field {name!r}{hint}"

    # ---- sequences

    def _request(self, prepared: Prepared, params: SamplingParams, key: int, index: int) -> Request:
        first, length = index == 0, len(prepared.token_ids)
        sampling = params if first else replace(params, prompt_logprobs=None)
        caps = [cap for cap in (params.max_tokens, self.limits.max_tokens) if cap is not None]
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos and self.codec is not None:
            stop_ids |= self.codec.eos_ids
        return Request(
            id=prepared.request_id if params.n == 1 else f"{prepared.request_id}#{index}",
            token_ids=prepared.token_ids,
            sampling=sampling.row(length, self.limits.vocab_size),
            key=(key + index) & _MASK,
            max_len=min([length + cap for cap in caps] + [self.limits.max_model_len]),
            stop_ids=stop_ids,
            priority=params.priority,
            family=prepared.request_id if params.n > 1 else None,
            payloads=dict(prepared.payloads),
            spans=tuple(prepared.spans),
            identity=encode(prepared.identity) if prepared.identity else b"",
            jobs=tuple(prepared.jobs) if first else (),
            gates=tuple(prepared.gates),
            resources=dict(prepared.resources),
            flags=prepared.flags | (PROMPT_LOGPROBS if sampling.prompt_logprobs is not None else 0),
        )


def request_key(seed: int | None, engine_seed: int | None, arrival: int) -> int:
    """The 64-bit key of a request's draws: its seed; or, made from the engine's seed, another one for each arrival; or random."""
    if seed is not None:
        return seed
    if engine_seed is None:
        return secrets.randbits(64)
    x = (engine_seed + arrival * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _ids(prompt: Any) -> Sequence[int]:
    try:
        array = np.asarray(prompt)
    except (ValueError, TypeError, OverflowError):  # ragged, or numbers beyond 64 bits
        array = np.array(None)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise RequestError("a prompt is text, a flat list of token ids, or a mapping with one of them")
    if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise RequestError("the prompt has token ids beyond 32 bits")
    return array.tolist()


def _validated(model: type[BaseModel] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    if model is None:
        return {}
    try:
        return model.model_validate(dict(given)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(f"{where}: {first['msg']} (got {first['input']!r})") from error


def sampling_defaults(generation: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What generation_config.json says about sampling; `known` are the names of the fields that this engine has. A warning
    names the settings that are none of them."""
    named = {RENAMED.get(name, name): value for name, value in generation.items()}
    defaults = {name: named[name] for name in known if named.get(name) is not None}
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    stated = {name for name, value in generation.items() if value not in NEUTRAL and not name.startswith("_")}
    unread = {name for name in stated - NO_SAMPLING if RENAMED.get(name, name) not in known}
    if unread:
        logger.warning("generation_config.json: no enabled plugin reads %s; ignored", ", ".join(sorted(unread)))
    return defaults
