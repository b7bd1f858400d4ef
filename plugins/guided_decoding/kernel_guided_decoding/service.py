"""The service "grammar/1": OpenAI's `response_format` as request fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernel_core.api import RequestError

OWN = {"regex": "pattern", "choice": "choice", "grammar": "grammar"}


class ResponseFormats:
    """Takes OpenAI's types, {"type": "structural_tag", "structures", "triggers"}, and {"type": "regex", "pattern"},
    {"type": "choice", "choice"}, {"type": "grammar", "grammar"}."""

    def response_format(self, response_format: Mapping[str, Any]) -> Mapping[str, Any]:
        """→ {"structured_outputs": ...}, whose content is checked with the request. Raises RequestError. Rate: request."""
        return {"structured_outputs": self._structure(dict(response_format))}

    def _structure(self, given: dict[str, Any]) -> Mapping[str, Any]:
        kind = given.pop("type", None)
        if kind == "json_object":
            return {"json_object": True}
        if kind == "json_schema":
            schema = given.get("json_schema")
            if not isinstance(schema, Mapping) or "schema" not in schema:
                raise RequestError('response_format "json_schema" needs {"json_schema": {"name": ..., "schema": {...}}}')
            return {"json": schema["schema"]}
        if kind == "structural_tag":
            return {"structural_tag": given}
        if kind in OWN and OWN[kind] in given:
            return {kind: given[OWN[kind]]}
        own = ", ".join(f"{name} (with {key!r})" for name, key in OWN.items())
        raise RequestError(
            f"response_format {kind!r} is not known, or lacks its content:"
            f" there are text, json_object, json_schema, structural_tag, {own}"
        )
