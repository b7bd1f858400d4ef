"""The service "text/1" of one model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from kernel_core.api import ConfigError, ModelInfo, RequestError, SamplingParams
from kernel_text.detokenise import ByteDetokeniser, TokenBytes, WindowDetokeniser
from kernel_text.eos import find_eos_ids
from kernel_text.stream import Stream

logger = logging.getLogger("kernel_text")
#: one of these makes a folder one with a tokenizer
FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken*.json")


BYTE = re.compile("<0x([0-9A-F]{2})>")  # how tokenizers that fall back to bytes write one


class Codec:
    """Implements `TextCodec`. transformers is imported when the first chat is rendered, or when the checkpoint has no
    tokenizer.json; both need seconds."""

    def __init__(self, model: ModelInfo, trust_code: bool = False) -> None:
        self._path = Path(model.tokenizer_path or model.path)
        self._trust_code = trust_code
        self._missing = not any(match for pattern in FILES for match in self._path.glob(pattern))
        self.tokenizer = self._load()
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._bytes = TokenBytes(self.tokenizer) if isinstance(self.tokenizer.decoder, ByteLevel) else None
        self.eos_ids = find_eos_ids(model, self._path, self.tokenizer)

    def _load(self) -> Tokenizer:
        file = self._path / "tokenizer.json"
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if not self._missing:
            return self._converted()
        logger.warning("%s; prompts must be token ids, and outputs have no text", self._no_tokenizer)
        return Tokenizer(BPE())

    @property
    def _no_tokenizer(self) -> str:
        return f"{self._path} has no tokenizer"

    def _converted(self) -> Tokenizer:
        backend = getattr(self._transformers, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{self._path} has no tokenizer.json and transformers cannot convert its tokenizer: save a fast tokenizer"
                " there (AutoTokenizer.from_pretrained(...).save_pretrained(...)) or set `tokenizer` to a model that has one"
            )
        return backend

    @cached_property
    def _transformers(self) -> Any:
        """What renders chat templates. The plain fast class where it is enough: AutoTokenizer imports seconds of other things."""
        try:
            if (self._path / "tokenizer.json").is_file() and not self._trust_code:
                from transformers import PreTrainedTokenizerFast

                return PreTrainedTokenizerFast.from_pretrained(str(self._path))
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(self._path), trust_remote_code=self._trust_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no tokenizer can be loaded from {self._path}: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self._missing:
            raise RequestError(f"{self._no_tokenizer}: send token ids, or set `tokenizer` to a model that has one")
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError(f"the prompt is no valid Unicode text: {text[:40]!r}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        if self._bytes is not None:
            return self._bytes.join((token_id,), False)
        found = BYTE.fullmatch(self.tokenizer.id_to_token(token_id) or "")
        return bytes([int(found[1], 16)]) if found else self.token(token_id).encode()

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Stream:
        skip = params.skip_special_tokens
        if self._bytes is not None:
            return Stream(ByteDetokeniser(self._bytes, prompt_ids, skip), params)
        return Stream(WindowDetokeniser(self.tokenizer, prompt_ids, skip), params)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render a conversation with the model's chat template, or `template` (Jinja text), and encode it. Raises RequestError
        for messages that the template refuses, ConfigError when there is no template."""
        text = self._render(messages, tools, template, add_generation_prompt, template_args or {})
        return self.encode(text, add_special_tokens=False)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        template: str | None,
        add_generation_prompt: bool,
        template_args: Mapping[str, Any],
    ) -> str:
        from jinja2 import TemplateError

        well_formed = isinstance(messages, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in messages)
        if not messages or not well_formed:
            raise RequestError('a chat is a non-empty list of messages like {"role": "user", "content": "..."}')
        if self._missing:
            raise RequestError(f"{self._no_tokenizer} and no chat template: set `tokenizer` to a model that has them")
        if template is None and not self._transformers.chat_template:
            raise ConfigError(f"{self._path} has no chat template: pass `template`, or send the prompt to generate instead")
        try:
            return self._transformers.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_args,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refused these messages: {error}") from error
