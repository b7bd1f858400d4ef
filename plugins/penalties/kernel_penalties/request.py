"""The request fields, and what of them crosses to the worker."""

from __future__ import annotations

from pydantic import BaseModel, Field

from kernel_core.api import Prepared, encode


class PenaltyFields(BaseModel):
    """Neutral by default. Positive penalties discourage repetition, negative ones (and repetition below 1) encourage it."""

    presence_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted once from every token already in the output")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted for each occurrence in the output")
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="tokens in prompt or output: positive logits are divided by it, others multiplied",
    )


NEUTRAL = PenaltyFields().model_dump()


class Preparer:
    """Sends the numbers of requests that ask for any."""

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin

    def prepare(self, request: Prepared) -> None:
        numbers = {**NEUTRAL, **request.fields}
        if numbers != NEUTRAL:
            request.payloads[self.plugin] = encode(numbers)
