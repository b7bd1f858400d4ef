"""`LLM`: all prompts in, all outputs out, in order."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import FrameType
from typing import Any

import numpy as np

from kernel_core.config import KernelConfig
from kernel_core.engine import Engine, find_verb
from kernel_core.errors import EngineDeadError, RequestError
from kernel_core.intake import Accepted, Prompt
from kernel_core.progress import Progress
from kernel_core.request import DraftCounts, RequestOutput, SamplingParams

Message = Mapping[str, Any]


class LLM:
    """Offline generation. Takes what `Engine` takes; use it as a context manager or call `close`.

    llm = LLM(model="tiny-chat")
    outputs = llm.generate(["Hello, my name is", "The capital of France is"], temperature=0, max_tokens=32)
    """

    def __init__(self, model: str | None = None, config: KernelConfig | Mapping[str, Any] | None = None, **keys: Any) -> None:
        self.engine = Engine(config, **(keys if model is None else {**keys, "model": model}))
        self._ids = count()

    def get_default_sampling_params(self) -> SamplingParams:
        """The kernel's defaults with what the model's generation_config.json says."""
        return self.engine.get_default_sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. `params`: one for all, or one per prompt; or give its fields as keywords, on top of
        the model's defaults. `progress` None: a bar on a terminal.

        Raises RequestError for an invalid prompt or parameter before anything starts. A request that fails later does not
        disturb the others: its output says so in `error`. Raises EngineDeadError when the engine itself fails."""
        listed = _as_list(prompts)
        each = self._params(len(listed), params, sampling)
        accepted = [self.engine.intake.accept(str(next(self._ids)), prompt, p) for prompt, p in zip(listed, each)]
        return self._run(accepted, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Iterator[RequestOutput]:
        """One prompt: its output whenever there is more of it, the whole each time. Closing the iterator aborts it."""
        (params,) = self._params(1, params, sampling)
        name, finished, error = str(next(self._ids)), False, None
        self.engine.add_request(name, prompt, params)
        try:
            with _interruptible() as interrupted:
                while not finished:
                    for output in self.engine.step():
                        finished, error = output.finished, output.error
                        yield output
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            if not finished:
                self._abandon([name])
        if self.engine.dead and error:
            raise EngineDeadError(self.engine.dead)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them, rendered by the model's chat template or by `template` (Jinja
        text). `template_args` are further names that the template knows."""
        codec = self.engine.codec
        if codec is None:
            raise RequestError("chats need the text plugin, which is left out")
        if not isinstance(messages, Sequence):
            raise RequestError(f"a chat is a list of messages; got {type(messages).__name__}")
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = []
        for chat in chats:
            ids = codec.apply_chat_template(
                chat,  # type: ignore[arg-type]
                tools=tools,
                template=template,
                add_generation_prompt=add_generation_prompt,
                template_args=template_args,
            )
            prompts.append({"prompt_token_ids": ids, "prompt": codec.decode(ids, skip_special_tokens=False)})
        return self.generate(prompts, params, progress=progress, **sampling)

    def _params(
        self, number: int, params: SamplingParams | Sequence[SamplingParams] | None, sampling: Mapping[str, Any]
    ) -> Sequence[SamplingParams]:
        if params is not None and sampling:
            raise RequestError(f"give SamplingParams or keywords, not both (got {sorted(sampling)})")
        if params is None:
            return [self.engine.intake.params(**sampling)] * number
        if isinstance(params, SamplingParams):
            return [params] * number
        if len(params) != number:
            raise RequestError(f"{number} prompts but {len(params)} sampling params; give one for all, or one for each")
        return params

    def _run(self, accepted: Sequence[Accepted], progress: bool | None) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        names = [request.request_id for request in accepted]
        shown = sys.stderr.isatty() if progress is None else progress
        try:
            for request in accepted:
                self.engine.add(request)
            with Progress(len(names), shown) as bar, _interruptible() as interrupted:
                while len(outputs) < len(names):
                    changed = self.engine.advance()
                    outputs.update((t.output.request_id, t.output) for t in changed if t.output.finished)
                    bar.update([tracked.output for tracked in changed])
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        except BaseException:
            self._abandon(names)
            raise
        if self.engine.dead and any(output.error for output in outputs.values()):
            raise EngineDeadError(self.engine.dead)
        return [outputs[name] for name in names]

    def _abandon(self, names: Sequence[str]) -> None:
        self.engine.abort(names)
        if not self.engine.dead:
            self.engine.advance()

    def __getattr__(self, name: str) -> Any:
        """The verbs that plugins registered."""
        engine = self.__dict__.get("engine")
        if engine is None or name.startswith("_"):
            raise AttributeError(name)
        return partial(find_verb(engine.verbs, name), engine.call)

    @property
    def draft_counts(self) -> DraftCounts:
        """How speculation did so far; zeros without a drafter."""
        return self.engine.outputs.drafts

    def reset_cache(self) -> None:
        """Forget the KV of earlier prompts (prefix caching)."""
        self.engine.reset_cache()

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A single text, mapping or list of ids is one prompt."""
    if isinstance(prompts, str | Mapping) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1):
        return [prompts]  # type: ignore[list-item]
    if isinstance(prompts, Sequence) and prompts and all(isinstance(token, int | np.integer) for token in prompts):
        return [prompts]  # type: ignore[list-item]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise RequestError(f"prompts are texts, lists of token ids or mappings, or a list of them; got {type(prompts).__name__}")
    return prompts  # type: ignore[return-value]


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never cut in two; a second one raises at once."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
