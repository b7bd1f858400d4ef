"""A conversation with an engine: what was said, and the next answer as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kernel_core.api import AsyncEngine, ConfigError, RequestError, RequestOutput


class Conversation:
    """Messages in order. An answer that was stopped is kept as far as it came; a question that was refused is not kept."""

    def __init__(self, engine: AsyncEngine, system: str | None, sampling: dict[str, Any]) -> None:
        self._engine, self._sampling = engine, sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []

    def clear(self) -> None:
        self.messages.clear()

    async def ask(self, text: str) -> AsyncIterator[RequestOutput]:
        """The answer's output whenever there is more of it. Raises RequestError when the conversation does not fit."""
        codec = self._engine.codec
        if codec is None:
            raise ConfigError("a chat needs the text plugin, which the configuration leaves out")
        question = {"role": "user", "content": text}
        ids = codec.apply_chat_template([*self._system, *self.messages, question])
        if len(ids) >= self._engine.max_model_len:
            raise RequestError(
                f"the conversation has {len(ids)} tokens, max_model_len is {self._engine.max_model_len}: /clear starts a new one"
            )
        answer = {"role": "assistant", "content": ""}
        async for output in self._engine.generate({"prompt_token_ids": ids}, **self._sampling):
            if not answer["content"] and output.outputs[0].text:
                self.messages += [question, answer]
            answer["content"] = output.outputs[0].text
            yield output
