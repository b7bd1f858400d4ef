"""What the routes share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

from kernel_openai_server.answering import Answering
from kernel_openai_server.client import EngineClient
from kernel_openai_server.errors import ApiError, invalid
from kernel_openai_server.fields import RequestModels
from kernel_openai_server.grammar import Grammar
from kernel_openai_server.logprobs import LogprobWriter
from kernel_openai_server.protocol.requests import Sampling
from kernel_openai_server.rendering import Renderer
from kernel_openai_server.response_store import ResponseStore
from kernel_openai_server.section import ServerSection
from kernel_openai_server.tools import Tools


class Api:
    """One per application."""

    def __init__(
        self,
        engine: EngineClient,
        section: ServerSection,
        names: Sequence[str],
        root: str,
        tools: Tools | None,
        grammar: Grammar | None,
    ) -> None:
        self.engine, self.section, self.names, self.root = engine, section, names, root
        self.tools, self.grammar = tools, grammar
        self.models = RequestModels(engine.request_fields)
        self.renderer = Renderer(engine, section)
        self.answering = Answering(engine, section)
        self.store = ResponseStore(section.stored_responses, section.stored_bytes)
        self.created = int(time.time())

    @cached_property
    def fingerprint(self) -> str:
        return f"kernel-{version('kernel-core')}"

    def served(self, model: str | None) -> str:
        """The name to answer with. Raises ApiError for a model that is not served."""
        if model is None or model in self.names:
            return model or self.names[0]
        message = f"the model {model!r} is not served here; served: {', '.join(self.names)}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def check(self, body: Sampling, num_prompts: int = 1, **logprobs: int | None) -> None:
        """Limits of the server. Raises ApiError."""
        choices, limit = num_prompts * (body.n or 1), self.section.max_choices
        if choices > limit:
            raise invalid(f"{choices} choices are more than the {limit} that one request may have", "n")
        self.check_logprobs(**logprobs, prompt_logprobs=body.prompt_logprobs)

    def check_logprobs(self, **asked_for: int | None) -> None:
        """Raises ApiError."""
        most = self.section.max_logprobs
        for name, asked in asked_for.items():
            if asked is not None and most != -1 and (asked == -1 or asked > most):
                raise invalid(f"{name} = {asked}: at most {most} may be asked for", name)

    def logprob_writer(self, body: Sampling, top: int | None) -> LogprobWriter:
        return LogprobWriter(self.engine.codec, top or 0, body.return_tokens_as_token_ids)


def joined_fields(*sources: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sampling fields of several origins. Raises ApiError when two set one field."""
    made: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for source, fields in sources:
        for name, value in fields.items():
            if name in made and owners[name] != source:
                raise invalid(f"{owners[name]} and {source} both set {name!r}: send one of them", name)
            made[name], owners[name] = value, source
    return made
