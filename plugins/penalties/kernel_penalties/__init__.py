"""Penalties on tokens that already occurred: presence, frequency, repetition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kernel_core.api import BuildContext, Manifest, RequestPreparer, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import LogitsTransform, OpRegistry, WorkerContext

manifest = Manifest(name="penalties", summary="presence, frequency and repetition penalties")


@hookimpl
def register_fields() -> Mapping[str, type]:
    from kernel_penalties.request import PenaltyFields

    return {"request": PenaltyFields}


@hookimpl
def prepare_request(context: BuildContext) -> RequestPreparer:
    from kernel_penalties.request import Preparer

    return Preparer(context.plugin)


@hookimpl
def register_ops(context: WorkerContext, ops: OpRegistry) -> None:
    from kernel_penalties.penalise import Penalise

    ops.register("penalise", Penalise(), owner=context.plugin, priority=-1)


@hookimpl
def make_logits_transform(context: WorkerContext) -> Sequence[LogitsTransform]:
    from kernel_penalties.transform import Penalties

    penalise = context.ops.resolve("penalise", vocab_size=context.vocab_size)
    return [Penalties(context.plugin, context.max_slots, context.device, penalise)]
