"""A request's grammar on its way to the worker: checked here, compiled there, and until then the request waits at a gate."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kernel_core.api import BuildContext, Job, Prepared, RequestError, TextCodec, encode
from kernel_guided_decoding.fields import StructuredFields
from kernel_guided_decoding.grammars import make_grammar


@dataclass(frozen=True, slots=True)
class Guide:
    """What the worker compiles. `key`: of the grammar; `ends`: the tokens that may end the output, once it is complete."""

    key: str
    grammar: str
    ends: tuple[int, ...]


class Preparer:
    """Face part."""

    def __init__(self, context: BuildContext) -> None:
        self.plugin, self.section = context.plugin, context.section
        text: TextCodec = context.service("text/1")
        self.ends = tuple(sorted(text.eos_ids))

    def prepare(self, request: Prepared) -> None:
        wanted = StructuredFields(**request.fields).structured_outputs
        if wanted is None:
            return
        if request.params.ignore_eos:
            raise RequestError("structured_outputs and ignore_eos contradict each other: a complete output can only end")
        if not self.ends:
            raise RequestError("structured_outputs needs a model with an end token, and this one states none")
        grammar = make_grammar(wanted, self.section.spacing, self.section.max_bytes)
        key = hashlib.sha256(grammar.encode()).hexdigest()[:32]
        data = encode(Guide(key, grammar, self.ends))
        request.payloads[self.plugin] = data
        request.jobs.append(Job(self.plugin, key, data))
        request.gates.append(f"{self.plugin}:{key}")
