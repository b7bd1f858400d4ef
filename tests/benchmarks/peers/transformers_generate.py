"""transformers: `generate` for one request, padded batches of it for many."""

from __future__ import annotations

import time

from measured import Run, serve


class FirstToken:
    """A stopping criterion that never stops, and notes when it was first asked."""

    def __init__(self, torch) -> None:
        self.torch, self.at = torch, None

    def __call__(self, input_ids, scores, **options):
        self.at = self.at or time.monotonic()
        return self.torch.zeros(input_ids.shape[0], dtype=self.torch.bool)


def start(checkpoint: str, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(requests: list[tuple[list[int], int]]) -> tuple[int, float | None]:
        begin, first, width = time.monotonic(), FirstToken(torch), max(len(ids) for ids, _ in requests)
        tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in requests])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in requests])
        new = max(count for _, count in requests)
        model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([first]),
        )
        return sum(count for _, count in requests), first.at - begin

    return run


if __name__ == "__main__":
    serve(start)
