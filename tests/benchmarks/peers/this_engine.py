"""This engine, driven step by step."""

from __future__ import annotations

import time

from measured import Run, serve


def start(checkpoint: str, threads: int) -> Run:
    from kernel_core.api import Engine, SamplingParams

    engine = Engine(model=checkpoint, threads=threads, dtype="bfloat16", max_model_len=1024)

    def run(requests: list[tuple[list[int], int]]) -> tuple[int, float | None]:
        begin, first = time.monotonic(), None
        for number, (ids, new) in enumerate(requests):
            params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
            engine.add_request(f"{begin}.{number}", ids, params)
        made = 0
        while engine.has_unfinished_requests():
            for tracked in engine.advance():
                first = first or time.monotonic() - begin
                made += len(tracked.output.outputs[0].token_ids) if tracked.output.finished else 0
        return made, first

    return run


if __name__ == "__main__":
    serve(start)
