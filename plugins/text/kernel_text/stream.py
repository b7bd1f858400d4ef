"""The incremental text of one completion: a detokeniser, then stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_core.api import SamplingParams
from kernel_text.detokenise import Detokeniser


class StopStrings:
    """Ends a text at the first stop string that is complete in it. Text that may be the beginning of one is held back, so the
    answer depends on the text only, not on how it was cut."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops, self._include = stops, include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is final, the stop string that ended it or None)."""
        text = self._held + text
        found = min(((at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            end, at, stop = found
            self._held = ""
            return text[: end if self._include else at], stop
        keep = max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        longest = min(len(stop) - 1, len(text))
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class Stream:
    """Implements `TextStream`. A request field `min_tokens`, where a plugin registers one, delays stop strings too."""

    def __init__(self, detokeniser: Detokeniser, params: SamplingParams) -> None:
        self._detokeniser = detokeniser
        self._stops = StopStrings(params.stop or (), params.include_stop_str_in_output) if params.stop else None
        self._exempt = params.fields.get("min_tokens") or 0

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None, int]:
        if self._stops is None:
            return self._detokeniser.push(token_ids), None, len(token_ids)
        texts = []
        for i, token in enumerate(token_ids):
            text, stop = self._filter(self._stops, self._detokeniser.push((token,)))
            texts.append(text)
            if stop is not None:
                return "".join(texts), stop, i + 1
        return "".join(texts), None, len(token_ids)

    def _filter(self, stops: StopStrings, text: str) -> tuple[str, str | None]:
        if self._exempt > 0:
            self._exempt -= 1
            return text, None
        return stops.push(text)

    def flush(self) -> str:
        held = self._stops.flush() if self._stops is not None else ""
        return held + self._detokeniser.flush()
