"""Answers of /v1/responses: items, the events that make them, and the response as it is at any time."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from kernel_core.api import CompletionOutput, RequestOutput
from kernel_openai_server import tools as service
from kernel_openai_server.chat import Split
from kernel_openai_server.errors import ApiError
from kernel_openai_server.logprobs import LogprobWriter
from kernel_openai_server.protocol.objects import json_bytes, usage_of
from kernel_openai_server.protocol.requests import ChatMessage, FunctionCallPart, ToolCallPart
from kernel_openai_server.protocol.responses import (
    Event,
    FunctionCallItem,
    Incomplete,
    InputDetails,
    Item,
    OutputDetails,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponseUsage,
)

TEXT, REASONING = "response.output_text", "response.reasoning_text"
ENDS = {"length": ("incomplete", "incomplete"), "abort": ("cancelled", "failed")}  # finish reason → status, event


@dataclass
class ResponseWriter:
    """Implements `Writer`. `response` grows with the output."""

    response: ResponseObject
    split: Split
    logprobs: LogprobWriter | None
    streams: bool
    events: list[bytes] = field(default_factory=list)
    number: int = 0

    # ---- Writer

    def first(self) -> bytes:
        self.response.status = "in_progress"
        self._emit("response.created", response=self.response)
        self._emit("response.in_progress", response=self.response)
        return self._flush()

    def chunk(self, place: int, output: RequestOutput) -> bytes:
        (one,) = output.outputs
        if not self.split.ended:
            for delta in self.split.advance(one):
                self._feed(delta, one)
            if self.split.ended:
                self._close("incomplete" if one.finish_reason in ENDS else "completed")
                self._end(output, one)
        return self._flush()

    def last(self, outputs: list[RequestOutput]) -> bytes:
        return self._flush()

    def failed(self, error: ApiError) -> bytes:
        self.fail(error)
        details = error.body.error
        self._emit("response.failed", response=self.response)
        self._emit("error", code=details.code or details.type, message=details.message, param=None)
        return self._flush()

    def whole(self, outputs: list[RequestOutput]) -> ResponseObject:
        self.chunk(0, outputs[0])
        return self.response

    def fail(self, error: ApiError) -> None:
        """Nothing more will come."""
        details = error.body.error
        self.response.status = "failed"
        self.response.error = ResponseError(details.code or details.type, details.message)

    def cancel(self, outputs: list[RequestOutput]) -> None:
        """It keeps what it has."""
        if outputs:
            self.chunk(0, outputs[0])
            self._close("incomplete")
        self.response.status = "cancelled"

    # ---- items

    def _feed(self, delta: service.Delta, one: CompletionOutput) -> None:
        if "reasoning" in delta:
            self._reason(delta["reasoning"])
        if "content" in delta:
            self._say(delta["content"], one)
        if "tool_call" in delta:
            self._call(delta["tool_call"])

    def _say(self, text: str, one: CompletionOutput) -> None:
        item = self._last(OutputMessage)
        if item is None:
            item = OutputMessage(_name("msg"), "in_progress", [])
            self._open(item)
            item.content.append(OutputText("", [], []))
            self._emit("response.content_part.added", **self._where(item), content_index=0, part=item.content[0])
        new = self._new_logprobs(one)
        item.content[0].text += text
        item.content[0].logprobs += new
        self._emit(f"{TEXT}.delta", **self._where(item), content_index=0, delta=text, logprobs=new)

    def _new_logprobs(self, one: CompletionOutput) -> list[Any]:
        if self.logprobs is None or one.logprobs is None:
            return []
        start, until = self.split.logprobs, min(len(one.logprobs), len(one.token_ids))
        self.split.logprobs = until
        return self.logprobs.chat(one.token_ids[start:until], one.logprobs[start:until]).content

    def _reason(self, text: str) -> None:
        item = self._last(ReasoningItem)
        if item is None:
            item = ReasoningItem(_name("rs"), "in_progress", [])
            self._open(item)
            item.content.append(ReasoningText(""))
            self._emit("response.content_part.added", **self._where(item), content_index=0, part=item.content[0])
        item.content[0].text += text
        self._emit(f"{REASONING}.delta", **self._where(item), content_index=0, delta=text)

    def _call(self, piece: service.ToolCallDelta) -> None:
        item = self._last(FunctionCallItem)
        if item is None or "id" in piece:
            item = FunctionCallItem(_name("fc"), piece.get("id", ""), piece.get("name", ""), "", "in_progress")
            self._open(item)
        arguments = piece.get("arguments", "")
        if arguments:
            item.arguments += arguments
            self._emit("response.function_call_arguments.delta", **self._where(item), delta=arguments)

    def _last(self, kind: type[Any]) -> Any:
        """The open item, if it is of this kind."""
        item = self.response.output[-1] if self.response.output else None
        return item if isinstance(item, kind) and item.status == "in_progress" else None

    def _where(self, item: Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self.response.output) - 1}

    def _open(self, item: Item) -> None:
        self._close("completed")
        self.response.output.append(item)
        self._emit("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _close(self, status: str) -> None:
        """The last item is complete, or as complete as it gets."""
        item = self.response.output[-1] if self.response.output else None
        if item is None or item.status != "in_progress":
            return
        item.status = status
        where = self._where(item)
        if isinstance(item, FunctionCallItem):
            self._emit("response.function_call_arguments.done", **where, name=item.name, arguments=item.arguments)
        else:
            part = item.content[0]
            kind = TEXT if isinstance(part, OutputText) else REASONING
            more = {"logprobs": part.logprobs} if isinstance(part, OutputText) else {}
            self._emit(f"{kind}.done", **where, content_index=0, text=part.text, **more)
            self._emit("response.content_part.done", **where, content_index=0, part=part)
        self._emit("response.output_item.done", output_index=where["output_index"], item=item)

    def _end(self, output: RequestOutput, one: CompletionOutput) -> None:
        usage = usage_of([output])
        self.response.usage = ResponseUsage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            InputDetails(usage.prompt_tokens_details.cached_tokens),
            OutputDetails(),
        )
        status, name = ENDS.get(one.finish_reason or "", ("completed", "completed"))
        self.response.status = status  # type: ignore[assignment]
        if one.finish_reason == "length":
            self.response.incomplete_details = Incomplete("max_output_tokens")
        self._emit(f"response.{name}", response=self.response)

    # ---- events

    def _emit(self, kind: str, **values: Any) -> None:
        """Encoded at once, because what it refers to goes on changing."""
        if self.streams:
            data = json_bytes(Event(type=kind, sequence_number=self.number, **values))
            self.events.append(b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n")
            self.number += 1

    def _flush(self) -> bytes:
        data, self.events = b"".join(self.events), []
        return data


def _name(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def as_messages(items: list[Item]) -> list[ChatMessage]:
    """The answer as a part of the conversation; reasoning is not told again."""
    calls = [
        ToolCallPart(id=i.call_id, function=FunctionCallPart(name=i.name, arguments=i.arguments))
        for i in items
        if isinstance(i, FunctionCallItem)
    ]
    text = "".join(part.text for item in items if isinstance(item, OutputMessage) for part in item.content)
    return [ChatMessage(role="assistant", content=text, tool_calls=calls or None)] if text or calls else []
