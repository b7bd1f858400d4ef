"""Rules about single tokens: which are allowed, which words are not, how long before the end, and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kernel_core.api import BuildContext, Manifest, RequestPreparer, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import LogitsTransform, OpRegistry, WorkerContext

manifest = Manifest(
    name="logit_rules",
    summary="allowed_token_ids, bad_words, min_tokens and logit_bias",
    requires=("text/1",),
)


@hookimpl
def register_fields() -> Mapping[str, type]:
    from kernel_logit_rules.request import RuleFields

    return {"request": RuleFields}


@hookimpl
def prepare_request(context: BuildContext) -> RequestPreparer:
    from kernel_logit_rules.request import Preparer

    return Preparer(context)


@hookimpl
def register_ops(context: WorkerContext, ops: OpRegistry) -> None:
    from kernel_logit_rules.ban import ban

    ops.register("ban", ban, owner=context.plugin, priority=-1)


@hookimpl
def make_logits_transform(context: WorkerContext) -> Sequence[LogitsTransform]:
    from kernel_logit_rules.transform import BiasRule, MaskRule

    ban = context.ops.resolve("ban", vocab_size=context.vocab_size)
    return [MaskRule(context.plugin, context.vocab_size, context.device, ban), BiasRule(context.plugin)]
