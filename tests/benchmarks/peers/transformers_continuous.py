"""transformers: its continuous batching over a paged cache (`generate_batch`)."""

from __future__ import annotations

from measured import Run, serve


def start(checkpoint: str, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    batching = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=2048)

    @torch.inference_mode()
    def run(requests: list[tuple[list[int], int]]) -> tuple[int, float | None]:
        new = max(count for _, count in requests)
        config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
        out = model.generate_batch(
            [ids for ids, _ in requests], generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
        made = sum(min(len(o.generated_tokens), count) for o, (_, count) in zip(out.values(), requests))
        return made, None

    return run


if __name__ == "__main__":
    serve(start)
