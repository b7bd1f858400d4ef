"""The request field `structured_outputs`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class Structure(BaseModel):
    """A part of a structural tag: after `begin`, text that follows `schema`, then `end`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    begin: str = Field(min_length=1)
    schema_: dict[str, Any] = Field(alias="schema")
    end: str = ""


class StructuralTag(BaseModel):
    """Free text in which every `trigger` begins one of the `structures`."""

    model_config = ConfigDict(extra="forbid")

    structures: list[Structure] = Field(min_length=1)
    triggers: list[str] = Field(min_length=1)


class StructuredOutputs(BaseModel):
    """Exactly one of these."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_: dict[str, Any] | bool | str | None = Field(None, alias="json", description="a JSON schema, or its text")
    json_object: bool | None = Field(None, description="any JSON object")
    regex: str | None = Field(None, description="a regular expression that the whole output matches")
    choice: list[str] | None = Field(None, min_length=1, description="one of these texts")
    grammar: str | None = Field(None, description="a context-free grammar: Lark (start: ...) or EBNF (root ::= ...)")
    structural_tag: StructuralTag | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are set, by their public names."""
        named = {kind: self.schema_ if kind == "json" else getattr(self, kind) for kind in KINDS}
        return {kind: value for kind, value in named.items() if value is not None and (value is not False or kind == "json")}


class StructuredFields(BaseModel):
    structured_outputs: StructuredOutputs | None = Field(None, description="what the output must be")
