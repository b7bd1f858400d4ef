"""Structured outputs: tokens that would break a request's choice, regular expression, JSON schema or grammar are masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kernel_core.api import BuildContext, Manifest, RequestPreparer, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import LogitsTransform, WorkerContext
    from kernel_guided_decoding.request import Grammars


class GuidedSection(Section):
    """`[plugins.guided_decoding]`."""

    backend: Literal["llguidance", "xgrammar"] = Field(
        default="llguidance",
        description="the library that makes masks; xgrammar needs the extra kernel-guided-decoding[xgrammar]",
    )
    whitespace: Literal["spaced", "compact", "flexible"] = Field(
        default="spaced",
        description='of JSON where a request does not say: {"a": 1} (spaced), {"a":1} (compact), or any (flexible)',
    )
    max_bytes: int = Field(default=1 << 18, gt=0, description="the longest grammar or schema that a request may send, in bytes")
    compile_seconds: float = Field(default=10.0, gt=0, description="a request whose grammar takes longer to compile is refused")
    cached: int = Field(default=256, gt=0, description="how many compiled grammars are kept")
    threads: int = Field(default=2, gt=0, description="threads that fill masks; as many compile")


manifest = Manifest(
    name="guided_decoding",
    summary="structured outputs: choice, regex, JSON schema, grammar, structural tags",
    requires=("text/1",),
    provides=("grammar/1",),
    section=GuidedSection,
)


@hookimpl
def register_fields() -> Mapping[str, type]:
    from kernel_guided_decoding.request import GuidedFields

    return {"request": GuidedFields}


@hookimpl
def make_service(context: BuildContext, name: str) -> Grammars:
    from kernel_guided_decoding.request import Grammars

    return Grammars(context.section, context.service("text/1"))


@hookimpl
def prepare_request(context: BuildContext) -> RequestPreparer:
    from kernel_guided_decoding.request import Preparer

    return Preparer(context)


@hookimpl
def register_calls(context: BuildContext) -> Mapping[str, Callable[[bytes], object]]:
    if context.part != "worker":
        return {}

    def job(data: bytes) -> object:
        """Compile a grammar, on the rank that samples."""
        compiler = context.shared.get("compiler")
        return None if compiler is None else compiler.start(data)

    return {"job": job}


@hookimpl
def make_logits_transform(context: WorkerContext) -> Sequence[LogitsTransform]:
    from kernel_guided_decoding.compiler import Compiler
    from kernel_guided_decoding.masks import GrammarMasks

    compiler = context.shared["compiler"] = Compiler(context.section, context.model, context.vocab_size)
    return [GrammarMasks(context.plugin, compiler, context.section.threads)]
