"""The light side: the plugin's name, the field that a request may carry, and how it reaches the worker."""

from pydantic import BaseModel, Field

from kernel_core.api import Manifest, hookimpl

manifest = Manifest(name="no_repeat", summary="The last n tokens of a text may not come again")


class NoRepeatFields(BaseModel):
    no_repeat: int = Field(0, ge=0, le=1024, description="how many of the last tokens may not come again; 0: off")


class SendWindow:
    def prepare(self, request):
        request.payloads["no_repeat"] = request.fields["no_repeat"].to_bytes(4, "little")


@hookimpl
def register_fields():
    return {"request": NoRepeatFields}


@hookimpl
def prepare_request(context):
    return SendWindow()


@hookimpl
def make_logits_transform(context):
    from no_repeat.transform import NoRepeat  # torch is imported in the worker only

    return [NoRepeat(context.max_slots, context.device)]
