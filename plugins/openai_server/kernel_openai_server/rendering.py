"""Prompts and conversations to token ids, in a thread of its own: templates and long texts take milliseconds, and the first chat
imports what renders templates."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kernel_core.api import ConfigError, KernelError, TextCodec
from kernel_openai_server.client import EngineClient
from kernel_openai_server.errors import ApiError, invalid
from kernel_openai_server.protocol.requests import ChatMessage, Templated
from kernel_openai_server.section import ServerSection

T = TypeVar("T")
logger = logging.getLogger("kernel_openai_server")


@dataclass(frozen=True, slots=True)
class PromptInput:
    """One prompt. `text` is None when it came as token ids."""

    token_ids: list[int]
    text: str | None = None

    def given(self) -> Mapping[str, Any]:
        """As the engine takes it."""
        ids: dict[str, Any] = {"prompt_token_ids": self.token_ids}
        return ids if self.text is None else {**ids, "prompt": self.text}


class Renderer:
    """One per application."""

    def __init__(self, engine: EngineClient, section: ServerSection) -> None:
        self._engine, self._section = engine, section
        self._template = _template(section.chat_template)
        self._thread = ThreadPoolExecutor(1, "kernel-render")

    def warm(self) -> None:
        """Render something, so that the first chat does not pay for imports. Returns at once."""
        if self._engine.codec is not None:
            self._thread.submit(self._warm, self._engine.codec)

    def _warm(self, codec: TextCodec) -> None:
        try:
            codec.apply_chat_template([{"role": "user", "content": "."}], template=self._template)
        except KernelError as error:  # the first chat gets the same error as its answer
            logger.info("no chats: %s", error)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    @property
    def codec(self) -> TextCodec:
        """Raises ApiError."""
        if self._engine.codec is None:
            raise invalid("text needs the text plugin, which is left out: send token ids")
        return self._engine.codec

    async def prompts(self, prompt: Any, special: bool, truncate: int | None) -> list[PromptInput]:
        """The forms of `CompletionRequest.prompt`. Raises ApiError."""
        many = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if any(isinstance(one, str) for one in many):
            codec = self.codec
            made = await self._run(lambda: [PromptInput(codec.encode(one, special), one) for one in many])
        else:
            made = [PromptInput(one) for one in many]
        return [self._fitting(one, truncate) for one in made]

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        body: Templated,
        template_args: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
        truncate: int | None = None,
    ) -> PromptInput:
        """Raises ApiError, RequestError."""
        return self._fitting(PromptInput(await self.chat_ids(messages, body, template_args, tools)), truncate)

    async def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        body: Templated,
        template_args: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        """Of any length. Raises ApiError, RequestError."""
        if body.chat_template is not None and not self._section.allow_chat_template:
            message = (
                "templates in requests are not allowed; the operator may allow them: plugins.openai_server.allow_chat_template"
            )
            raise invalid(message, "chat_template")
        if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
            raise invalid("continue_final_message and add_generation_prompt exclude each other", "continue_final_message")
        continued = {"continue_final_message": True} if body.continue_final_message else {}
        codec = self.codec
        return await self._run(
            lambda: codec.apply_chat_template(
                messages,
                tools=tools,
                template=body.chat_template or self._template,
                add_generation_prompt=body.add_generation_prompt and not continued,
                template_args={**template_args, **continued},
            )
        )

    async def encode(self, text: str, special: bool) -> list[int]:
        codec = self.codec
        return await self._run(lambda: codec.encode(text, special))

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        codec = self.codec
        return await self._run(lambda: codec.decode(ids, skip_special_tokens))

    async def tokens(self, ids: Sequence[int]) -> list[str]:
        codec = self.codec
        return await self._run(lambda: [codec.token(token) for token in ids])

    def _fitting(self, prompt: PromptInput, truncate: int | None) -> PromptInput:
        """Cut at the beginning if asked for. Raises ApiError when it leaves no room for an answer."""
        limit, length = self._engine.max_model_len, len(prompt.token_ids)
        keep = limit - 1 if truncate == -1 else truncate
        if keep is not None and length > keep:
            if keep == 0:
                raise invalid("truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens")
            return PromptInput(prompt.token_ids[-keep:])
        if length >= limit:
            raise too_long(length, limit)
        return prompt


def too_long(length: int, limit: int) -> ApiError:
    return invalid(
        f"the prompt has {length} tokens, and prompt and answer together may have {limit}: send a shorter one",
        None,
        "context_length_exceeded",
    )


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plugins.openai_server.chat_template = {path!r} cannot be read: {error}") from error


# ---- messages


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As templates know them: text contents are strings, arguments of calls are objects, "developer" is "system". Raises
    ApiError for contents that are no text."""
    return [_message(message, place) for place, message in enumerate(messages)]


def _message(message: ChatMessage, place: int) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    made["content"] = _content(message.content, f"messages.{place}.content")
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    optional |= {"reasoning": reasoning, "reasoning_content": reasoning}
    made |= {name: value for name, value in optional.items() if value is not None}
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments_object(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return made


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            message = f"content of the type {part.type!r} is not supported: no enabled plugin reads it; send text"
            raise invalid(message, f"{where}.{number}.type", "unsupported_content")
    return "\n".join(part.text for part in content)


def arguments_object(arguments: str | Mapping[str, Any]) -> Any:
    """Arguments of a call travel as JSON text; templates want the object. What is no object stays text."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments
