"""The request field, its checks, and the grammar as it crosses to the worker. Service "grammar/1"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from kernel_core.api import BuildContext, Job, Prepared, RequestError, TextCodec, encode
from kernel_guided_decoding import GuidedSection
from kernel_guided_decoding.backends import Library, load
from kernel_guided_decoding.sources import source

KINDS = ("choice", "regex", "json_schema", "json_object", "grammar", "structural_tag")


class StructuredOutputs(BaseModel):
    """Exactly one of the first six."""

    model_config = ConfigDict(extra="forbid")

    choice: list[str] | None = Field(None, min_length=1, description="one of these texts")
    regex: str | None = Field(None, min_length=1, description="all of the output matches it")
    json_schema: dict[str, Any] | bool | str | None = Field(
        None, validation_alias=AliasChoices("json", "json_schema"), description="a JSON schema, or its text"
    )
    json_object: Literal[True] | None = Field(None, description="any JSON object")
    grammar: str | None = Field(None, min_length=1, description="an EBNF grammar (rules with ::=, from root) or a Lark grammar")
    structural_tag: dict[str, Any] | None = Field(
        None, description='{"structures": [{"begin", "schema", "end"}], "triggers": [...]}: free text with structured parts'
    )
    whitespace: Literal["spaced", "compact", "flexible"] | None = Field(None, description="of JSON; None: as configured")

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)} is needed, got {given or 'none'}")
        return self


class GuidedFields(BaseModel):
    """Free text by default."""

    structured_outputs: StructuredOutputs | None = Field(None, description="what the output has to follow")


@dataclass(frozen=True, slots=True)
class Guide:
    """What crosses: the grammar in the back end's form, the model's end tokens, and all tokens that end this request."""

    source: str
    eos: list[int]
    ends: list[int]


def grammar_source(given: Mapping[str, Any], section: GuidedSection, library: Library, text: TextCodec) -> str:
    """The grammar of a validated `StructuredOutputs` (dumped), checked. Raises RequestError naming what cannot be honoured."""
    kind = next(name for name in KINDS if given[name] is not None)

    def mark(written: str) -> Literal["text", "token", "special"]:
        ids = text.encode(written, add_special_tokens=False)
        if len(ids) != 1:
            return "text"
        return "token" if written in text.decode(ids, skip_special_tokens=True) else "special"

    return source(library, kind, given[kind], given["whitespace"] or section.whitespace, section.max_bytes, mark)


class Preparer:
    """Checks a request's grammar, sends it to the workers to compile, and holds the request until that is done."""

    def __init__(self, context: BuildContext) -> None:
        self.plugin, self.section = context.plugin, context.section
        self.library = load(self.section.backend)
        self.text: TextCodec = context.service("text/1")

    def prepare(self, request: Prepared) -> None:
        given = request.fields["structured_outputs"]
        if given is None:
            return
        params = request.params
        if params.ignore_eos:
            raise RequestError("structured_outputs ends where its grammar does, and ignore_eos would go on: leave one out")
        ends = set(self.text.eos_ids) | set(params.stop_token_ids or ())
        if not self.text.eos_ids:
            raise RequestError("structured_outputs needs a model with an end token; this checkpoint names none")
        data = encode(
            Guide(grammar_source(given, self.section, self.library, self.text), sorted(self.text.eos_ids), sorted(ends))
        )
        key = sha256(data).hexdigest()
        request.payloads[self.plugin] = data
        request.jobs.append(Job(self.plugin, key, data))
        request.gates.append(f"{self.plugin}:{key}")


class Grammars:
    """Implements the service "grammar/1": what makes an answer follow a format, as request fields. Face part, any thread."""

    def __init__(self, section: GuidedSection, text: TextCodec) -> None:
        self.section, self.text, self.library = section, text, load(section.backend)

    def response_format(self, response_format: Mapping[str, Any]) -> Mapping[str, Any]:
        """OpenAI's `response_format` → request fields: {"type": "json_schema", "json_schema": {"schema": ...}}, {"type":
        "json_object"}, {"type": "text"}, and {"type": "structural_tag" | "regex" | "grammar" | "choice"} as in
        `structured_outputs`. JSON has one fixed spacing, unless the section says flexible. Raises RequestError for what cannot be
        honoured exactly. Rate: request."""
        kind = response_format.get("type")
        if kind == "text":
            return {}
        fields = {"structured_outputs": self._field(kind, response_format)}
        try:
            checked = GuidedFields.model_validate(fields).structured_outputs
        except ValueError as error:
            raise RequestError(f"response_format: {error}") from error
        assert checked is not None
        grammar_source(checked.model_dump(), self.section, self.library, self.text)
        return fields

    @staticmethod
    def _field(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        if kind == "json_object":
            return {"json_object": True}
        if kind == "json_schema":
            wrapped = given.get("json_schema")
            if not isinstance(wrapped, Mapping) or wrapped.get("schema") is None:
                raise RequestError('response_format of type "json_schema" needs {"json_schema": {"name": ..., "schema": {...}}}')
            return {"json": wrapped["schema"]}
        if kind == "structural_tag":
            return {"structural_tag": {name: value for name, value in given.items() if name != "type"}}
        if kind in ("regex", "grammar", "choice") and kind in given:
            return {kind: given[kind]}
        known = "text, json_object, json_schema, structural_tag, regex, grammar, choice"
        raise RequestError(f"response_format of type {kind!r} is not known or lacks its value; known are {known}")
