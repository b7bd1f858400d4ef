"""Structured outputs: what a request generates follows its JSON schema, regular expression, choice, grammar or structural tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kernel_core.api import BuildContext, Manifest, RequestPreparer, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import LogitsTransform, WorkerContext


class GuidedSection(Section):
    """`[plugins.guided_decoding]`. spacing of JSON: "fixed" writes `{"a": 1, "b": 2}` and nothing else; "flexible" lets the model
    choose, which may be space without end."""

    spacing: Literal["fixed", "flexible"] = "fixed"
    compile_seconds: float = Field(30.0, gt=0, description="a grammar that takes longer to compile fails its requests")
    max_bytes: int = Field(256 << 10, ge=64, description="the largest schema or grammar, in bytes")
    cached: int = Field(64, ge=1, description="compiled grammars that are kept")


manifest = Manifest(
    name="guided_decoding",
    summary="structured outputs: JSON schema, regex, choice, grammar, structural tags",
    requires=("text/1",),
    provides=("grammar/1",),
    section=GuidedSection,
)


@hookimpl
def register_fields() -> Mapping[str, type]:
    from kernel_guided_decoding.fields import StructuredFields

    return {"request": StructuredFields}


@hookimpl
def prepare_request(context: BuildContext) -> RequestPreparer:
    from kernel_guided_decoding.request import Preparer

    return Preparer(context)


@hookimpl
def make_service(context: BuildContext, name: str) -> Any:
    from kernel_guided_decoding.service import ResponseFormats

    return ResponseFormats()


@hookimpl
def register_calls(context: BuildContext) -> Mapping[str, Callable[[bytes], Any]]:
    """Of the worker part: "guided_decoding.job" compiles a grammar."""
    if context.part != "worker":
        return {}
    from kernel_guided_decoding.compiled import grammars_of

    return {"job": grammars_of(context).job}


@hookimpl
def make_logits_transform(context: WorkerContext) -> Sequence[LogitsTransform]:
    from kernel_guided_decoding.compiled import grammars_of
    from kernel_guided_decoding.transform import GrammarMask

    return [GrammarMask(context.plugin, grammars_of(context))]
