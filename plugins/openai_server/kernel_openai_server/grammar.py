"""What the server uses of the service "grammar/1": the request fields that make an answer follow a `response_format`. Without a
provider, every response_format but {"type": "text"} is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from kernel_openai_server.errors import invalid

PLUGIN = "guided_decoding"


class Grammar(Protocol):
    """The service "grammar/1"."""

    def response_format(self, response_format: Mapping[str, Any]) -> Mapping[str, Any]:
        """OpenAI's `response_format` ({"type": "json_schema", "json_schema": {"name", "schema", "strict"}}, {"type":
        "json_object"}, or any type of the provider's own) → request fields, by the names the provider registered. Raises
        RequestError for what it cannot honour. Rate: request."""
        ...


def format_fields(grammar: Grammar | None, response_format: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Raises ApiError, RequestError."""
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return {}
    if not isinstance(kind, str):
        raise invalid('response_format needs a "type": "text", "json_object" or "json_schema"', "response_format")
    if grammar is None:
        message = f"response_format {kind!r} needs a plugin that provides grammars: enable {PLUGIN} ([plugins.{PLUGIN}])"
        raise invalid(message, "response_format", "plugin_required")
    return grammar.response_format(response_format)
