"""In the last layer only the tokens whose states are read go on after the attention, and nothing changes by it."""

import pytest

from kernel_core import Engine, SamplingParams

PROMPTS = [list(range(1, 121)), [5, 6, 7]]
greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def run(model, params=greedy, **options):
    """→ by request, its finished output; by step, the rows of the first and of the last layer's MLP."""
    seen, outputs = [], {}
    with Engine(model=str(model), device="cpu", dtype="float32", max_model_len=160, max_requests=4, **options) as engine:
        layers = engine.core.executor._worker.model.layers
        layers[0].mlp.register_forward_pre_hook(lambda module, given: seen.append([len(given[0])]))
        layers[-1].mlp.register_forward_pre_hook(lambda module, given: seen[-1].append(len(given[0])))
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), prompt, params)
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
    return outputs, seen


def tokens(outputs):
    return {name: output.outputs[0].token_ids for name, output in outputs.items()}


def test_a_prompt_s_other_tokens_stop_after_the_last_attention(byte_model):
    outputs, seen = run(byte_model)
    assert seen[0] == [123, 2] and all(first == last for first, last in seen[1:])
    small, never = run(byte_model, max_tokens_per_step=32)
    assert all(first == last for first, last in never) and tokens(small) == tokens(outputs)


def test_of_a_chunk_that_samples_nothing_one_token_goes_on(byte_model):
    outputs, seen = run(byte_model, max_tokens_per_step=100)
    assert seen[0][1] <= 2 and tokens(outputs) == tokens(run(byte_model)[0])


def test_where_all_states_are_read_all_are_computed(byte_model):
    asked = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=1)
    outputs, seen = run(byte_model, asked)
    assert seen[0] == [123, 123] and tokens(outputs) == tokens(run(byte_model)[0])


@pytest.mark.parametrize(
    ("plugins", "last"),
    [({"eagle": {"head": "tiny-chat-eagle", "adaptive": False}}, 123), ({"ngram": {"adaptive": False}}, 2)],
    ids=["reads states", "reads tokens"],
)
def test_a_drafter_that_reads_states_gets_all(plugins, last):
    outputs, seen = run("tiny-chat", plugins=plugins)
    assert seen[0] == [123, last] and tokens(outputs) == tokens(run("tiny-chat")[0])
