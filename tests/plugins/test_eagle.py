"""What EAGLE heads draft in a running engine against their formulas in plain torch, on random weights with published names."""

import json
from functools import cache
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from kernel_core import LLM, Engine, SamplingParams
from kernel_core.errors import ConfigError

VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, INNER, LAYERS, EPS, THETA = 61, 32, 4, 2, 8, 48, 5, 1e-5, 500.0
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    intermediate_size=INNER,
    rms_norm_eps=EPS,
    rope_theta=THETA,
    hidden_act="silu",
    max_position_embeddings=128,
)
PROMPTS = [list(range(3, 25)), [7, 7, 9, 11], [40, 2, 33, 8, 40, 2, 33, 8, 40]]
NEW = 9


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("target"))


def random_llama(folder, **sizes):
    """(folder, transformers model)."""
    torch.manual_seed(1)
    sizes = SIZES | dict(num_hidden_layers=LAYERS, head_dim=DIM, initializer_range=0.2) | sizes
    model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=0, bos_token_id=None)).eval()
    model.save_pretrained(folder)
    return folder, model


# ---- the published formats


def layer(draw, width, norms):
    """One Llama layer whose attention reads `width` numbers, by its published names."""
    shapes = {
        "self_attn.q_proj": (HEADS * DIM, width),
        "self_attn.k_proj": (KV_HEADS * DIM, width),
        "self_attn.v_proj": (KV_HEADS * DIM, width),
        "self_attn.o_proj": (HIDDEN, HEADS * DIM),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    shapes |= {name: (HIDDEN,) for name in ("post_attention_layernorm", *norms)}
    return {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}


def drawing(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.25 + (1.0 if len(shape) == 1 else 0.0)


def eagle1(bias="", norms=False, vocab=VOCAB, layers=1, **config):
    draw, rows = drawing(2), {}
    rows["fc.weight"] = draw(HIDDEN, 2 * HIDDEN)
    if bias:
        rows["fc.bias"], config[bias] = draw(HIDDEN) - 1, True
    if norms:
        rows |= {"enorm.weight": draw(HIDDEN), "hnorm.weight": draw(HIDDEN)}
    for i in range(layers):
        rows |= {f"layers.{i}.{n}": t for n, t in layer(draw, HIDDEN, ["input_layernorm"] if i else []).items()}
    if vocab < VOCAB:
        rows["token_map"] = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:vocab]
        rows["lm_head.weight"] = draw(vocab, HIDDEN)
        config["truncated_vocab_size"] = vocab
    return SIZES | dict(num_hidden_layers=layers, **config), rows


def eagle3(name="midlayer", vocab=VOCAB, aux=(2, LAYERS // 2, LAYERS - 3), own_embedding=False, layers=1, **config):
    draw, size = drawing(3), config.get("target_hidden_size", HIDDEN)
    rows = {f"{name}.{n}": t for n, t in layer(draw, 2 * HIDDEN, ["input_layernorm", "hidden_norm"]).items()}
    for i in range(1, layers):
        rows |= {f"layers.{i}.{n}": t for n, t in layer(draw, HIDDEN, ["input_layernorm"]).items()}
    rows |= {"fc.weight": draw(HIDDEN, len(aux) * size), "norm.weight": draw(HIDDEN), "lm_head.weight": draw(vocab, HIDDEN)}
    if vocab < VOCAB:
        kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:vocab].sort().values
        rows["d2t"] = kept - torch.arange(vocab)
        rows["t2d"] = torch.isin(torch.arange(VOCAB), kept)
    if own_embedding:
        rows["embed_tokens.weight"] = draw(VOCAB, HIDDEN)
    if config.get("norm_before_fc"):
        rows["input_norm.weight"] = draw(len(aux) * HIDDEN)
    if config.get("fc_norm"):
        rows |= {f"fc_norm.{i}.weight": draw(HIDDEN) for i in range(len(aux))}
    return SIZES | dict(
        num_hidden_layers=layers, draft_vocab_size=vocab, architectures=["LlamaForCausalLMEagle3"], **config
    ), rows


def write(folder, config, rows, prefix=""):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file({prefix + name: tensor.contiguous() for name, tensor in rows.items()}, folder / "model.safetensors")
    return str(folder)


# ---- the formulas


def norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def rotated(x, positions):
    """x [n, heads, DIM]."""
    angle = positions[:, None].float() * THETA ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(rows, at, x):
    """Causal attention of all pairs, x [n, width], at positions 0 .. n - 1."""
    n = len(x)
    q, k, v = ((x @ rows[f"{at}.self_attn.{p}_proj.weight"].T).view(n, -1, DIM) for p in "qkv")
    q, k = (rotated(t, torch.arange(n)) for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    out = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
    return out.transpose(0, 1).reshape(n, -1) @ rows[f"{at}.self_attn.o_proj.weight"].T


def mlp(rows, at, x):
    gate, up = (x @ rows[f"{at}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return (F.silu(gate) * up) @ rows[f"{at}.mlp.down_proj.weight"].T


def rest(rows, at, x, residual):
    """What follows attention in a layer."""
    x = x + residual
    return x + mlp(rows, at, norm(x, rows[f"{at}.post_attention_layernorm.weight"]))


class Eagle1:
    """Output and next state are one: an estimate of the target's final state."""

    def __init__(self, config, rows, model):
        self.config, self.rows, self.model = config, rows, model

    def given(self, hidden):
        return hidden[-1]  # transformers' last one is after the final norm

    def run(self, tokens, states):
        rows, e = self.rows, self.model.model.embed_tokens(tokens)
        if "enorm.weight" in rows:
            e, states = norm(e, rows["enorm.weight"]), norm(states, rows["hnorm.weight"])
        x = torch.cat([e, states], -1) @ rows["fc.weight"].T + rows.get("fc.bias", 0)
        for i in range(self.config["num_hidden_layers"]):
            at = f"layers.{i}"
            x = rest(rows, at, attention(rows, at, norm(x, rows[f"{at}.input_layernorm.weight"]) if i else x), x)
        return x, x

    def logits(self, output):
        if "token_map" not in self.rows:
            return self.model.lm_head(output)
        return torch.full((VOCAB,), -torch.inf).index_copy(0, self.rows["token_map"], self.rows["lm_head.weight"] @ output)


class Eagle3:
    def __init__(self, config, rows, model):
        self.config, self.rows, self.model = config, rows, model
        self.at = next(name.split(".self_attn")[0] for name in rows if "q_proj" in name)

    def given(self, hidden):
        aux = self.config.get("eagle_aux_hidden_state_layer_ids") or (2, LAYERS // 2, LAYERS - 3)
        read = [hidden[i] for i in aux]
        if "fc_norm.0.weight" in self.rows:
            read = [norm(x, self.rows[f"fc_norm.{i}.weight"]) for i, x in enumerate(read)]
        x = torch.cat(read, -1)
        if "input_norm.weight" in self.rows:
            x = norm(x, self.rows["input_norm.weight"])
        return x @ self.rows["fc.weight"].T

    def run(self, tokens, states):
        rows, at = self.rows, self.at
        e = (
            F.embedding(tokens, rows["embed_tokens.weight"])
            if "embed_tokens.weight" in rows
            else self.model.model.embed_tokens(tokens)
        )
        normed = norm(states, rows[f"{at}.hidden_norm.weight"])
        x = attention(rows, at, torch.cat([norm(e, rows[f"{at}.input_layernorm.weight"]), normed], -1))
        x = rest(rows, at, x, normed if self.config.get("norm_before_residual") else states)
        for i in range(1, self.config["num_hidden_layers"]):
            at = f"layers.{i}"
            x = rest(rows, at, attention(rows, at, norm(x, rows[f"{at}.input_layernorm.weight"])), x)
        output = norm(x, rows["norm.weight"])
        return output, output if self.config.get("norm_output") else x

    def logits(self, output):
        own = self.rows["lm_head.weight"] @ output
        ids = torch.arange(len(own)) + self.rows.get("d2t", 0)
        return torch.full((VOCAB,), -torch.inf).index_copy(0, ids, own)


@cache
def hidden_states(model, known):
    return [state[0] for state in model(torch.tensor([known]), output_hidden_states=True).hidden_states]


@torch.no_grad()
def after(head, known, path=()):
    """Logits of the head for the token after `known` and the drafts in `path`."""
    states, tokens = head.given(hidden_states(head.model, tuple(known)))[:-1], list(known[1:])
    for draft in (*path, None):
        output, state = head.run(torch.tensor(tokens), states)
        if draft is not None:
            tokens, states = [*tokens, draft], torch.cat([states, state[-1:]])
    return head.logits(output[-1])


def chain(head, known, number):
    path = ()
    for _ in range(number):
        path += (int(after(head, known, path).argmax()),)
    return path


def tree(head, known, top_k, depth, number):
    """EAGLE-2: the best `top_k` nodes of a level are continued, and the best `number` of all are drafted; as a set of paths."""
    level, paths = [((), 0.0)], {}
    for _ in range(depth):
        made = []
        for path, score in level:
            values, ids = after(head, known, path).log_softmax(-1).topk(top_k)
            made += [((*path, token), score + value) for token, value in zip(ids.tolist(), values.tolist())]
        paths |= dict(made)
        level = sorted(made, key=lambda one: -one[1])[:top_k]
    return set(sorted(paths, key=lambda path: -paths[path])[:number])


# ---- a running engine


def watched(folder, head, prompts=PROMPTS, **options):
    """Outputs; what was proposed for which number of known tokens: [(prompt number, known, tokens, parents)]; how many requests
    were preempted and prompt tokens cached."""
    section = {"head": head, "adaptive": False} | options.pop("section", {})
    plugins = {"safetensors": {}, "eagle": section} | options.pop("plugins", {})
    common = dict(profile="none", dtype="float32", max_model_len=64, max_requests=4, kv_memory="8MiB", threads=1, device="cpu")
    seen = []
    with Engine(model=str(folder), plugins=plugins, **common | options) as engine:
        worker = engine.core.executor._worker
        propose = worker.drafter.propose

        def proposing(view):
            tokens, parents, count = propose(view)
            for row, slot in enumerate(view.host_slots.tolist()):
                if view.host_sampled[row]:
                    name = engine.core.scheduler.slots.entries[slot].request.id
                    n = int(count[row])
                    seen.append((int(name), int(view.known[row]), tokens[row, :n].tolist(), parents[row, :n].tolist()))
            return tokens, parents, count

        worker.drafter.propose = proposing
        for number, ids in enumerate(prompts):
            engine.add_request(str(number), ids, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False))
        outputs, cached = {}, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    cached += output.num_cached_tokens
                    outputs[int(output.request_id)] = list(output.outputs[0].token_ids)
        counts = {"preempted": engine.core.scheduler.preemptions, "cached": cached}
    return [outputs[n] for n in range(len(prompts))], seen, counts


@torch.no_grad()
def greedy(model, ids):
    out = list(ids)
    for _ in range(NEW):
        out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(ids) :]


VARIANTS = {
    "eagle": (Eagle1, eagle1, ""),
    "eagle, fc bias": (Eagle1, lambda: eagle1("eagle_fc_bias"), "model."),
    "eagle, bias by its older name": (Eagle1, lambda: eagle1("bias"), ""),
    "eagle, norms": (Eagle1, lambda: eagle1(norms=True, add_para_norm=True), ""),
    "eagle, truncated vocabulary": (Eagle1, lambda: eagle1(vocab=40), ""),
    "eagle, two layers": (Eagle1, lambda: eagle1(layers=2), ""),
    "eagle3": (Eagle3, eagle3, ""),
    "eagle3, own vocabulary": (Eagle3, lambda: eagle3(vocab=37), ""),
    "eagle3, layers.0, norm before residual": (Eagle3, lambda: eagle3("layers.0", norm_before_residual=True), "model."),
    "eagle3, other states": (
        Eagle3,
        lambda: eagle3(aux=(0, 1, 4), eagle_aux_hidden_state_layer_ids=[0, 1, 4], own_embedding=True),
        "",
    ),
    "eagle3, two layers": (Eagle3, lambda: eagle3("layers.0", layers=2), ""),
    "eagle3, norms": (Eagle3, lambda: eagle3(norm_before_fc=True, norm_output=True), ""),
    "eagle3, norm of each state": (Eagle3, lambda: eagle3(fc_norm=True), ""),
}


FAST = ("eagle, fc bias", "eagle, truncated vocabulary", "eagle3, own vocabulary", "eagle3, layers.0, norm before residual")


@pytest.fixture(params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in VARIANTS])
def published(request, target, tmp_path):
    formula, make, prefix = VARIANTS[request.param]
    config, rows = make()
    return write(tmp_path / "head", config, rows, prefix), formula(config, rows, target[1])


def test_chains_follow_the_formula(target, published):
    folder, head = published
    outputs, seen, _ = watched(target[0], folder)
    assert outputs == [greedy(target[1], ids) for ids in PROMPTS]
    assert len({number for number, *_ in seen}) == 3 and len(seen) > 12
    for number, known, tokens, parents in seen:
        text = [*PROMPTS[number], *outputs[number]][:known]
        if known == len(text):
            assert tokens == list(chain(head, text, len(tokens))) and parents == [-1, 0, 1][: len(tokens)]


@pytest.mark.parametrize("name", ["eagle", "eagle3, own vocabulary"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_step": 5},
        {"kv_blocks": 5, "block_size": 16, "max_model_len": 40},
        {"overlap": True},
        {"block_size": 16, "plugins": {"prefix_caching": {}}, "max_requests": 1},
        {"attention": "torch:reference"},
    ],
    ids=["chunks", "preemption", "overlap", "prefix hits", "reference attention"],
)
def test_nothing_else_changes_a_draft(target, tmp_path, monkeypatch, name, options):
    formula, make, prefix = VARIANTS[name]
    config, rows = make()
    head = formula(config, rows, target[1])
    prompts = [*PROMPTS, PROMPTS[0], [*PROMPTS[0][:18], 5]] if "plugins" in options else PROMPTS
    if options.get("attention"):
        monkeypatch.setattr("kernel_cpu.backend.PagedAttention.supports", lambda *given: False)
        options = {}
    outputs, seen, counts = watched(target[0], write(tmp_path / "head", config, rows, prefix), prompts, **options)
    assert outputs == [greedy(target[1], ids) for ids in prompts]
    assert bool(counts["preempted"]) == ("kv_blocks" in options) and bool(counts["cached"]) == ("plugins" in options)
    for number, known, tokens, _ in seen:
        text = [*prompts[number], *outputs[number]][:known]
        if known == len(text):
            assert tokens == list(chain(head, text, len(tokens)))


@pytest.mark.parametrize("name", ["eagle", "eagle, norms", "eagle3, own vocabulary"])
def test_trees_are_those_of_eagle_2(target, tmp_path, name):
    formula, make, prefix = VARIANTS[name]
    config, rows = make()
    head = formula(config, rows, target[1])
    section = {"tree": True, "tree_top_k": 3, "tree_depth": 3, "draft_tokens": 8}
    outputs, seen, _ = watched(target[0], write(tmp_path / "head", config, rows, prefix), section=section)
    assert outputs == [greedy(target[1], ids) for ids in PROMPTS]
    for number, known, tokens, parents in seen[::3]:
        text = [*PROMPTS[number], *outputs[number]][:known]
        if known == len(text):
            paths = []
            for token, parent in zip(tokens, parents):
                assert parent < len(paths)
                paths.append((*(paths[parent] if parent >= 0 else ()), token))
            assert set(paths) == tree(head, text, 3, 3, 8)


def test_a_head_narrower_than_its_target(tmp_path):
    """`target_hidden_size`: fc takes the target's size, embedding and logits are the head's own."""
    folder, model = random_llama(tmp_path / "target", hidden_size=HIDDEN + 8)
    config, rows = eagle3(own_embedding=True, target_hidden_size=HIDDEN + 8)
    outputs, seen, _ = watched(folder, write(tmp_path / "head", config, rows))
    head = Eagle3(config, rows, model)
    for number, known, tokens, _ in seen:
        text = [*PROMPTS[number], *outputs[number]][:known]
        if known == len(text):
            assert tokens == list(chain(head, text, len(tokens)))


# ---- acceptance


def rigged(folder, noise=0.0):
    """A target in which a token alone decides the next, and an EAGLE-1 head that says so too (but for the noise)."""
    target, model = random_llama(folder / "target")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        table = model.model.embed_tokens.weight
        table.div_(table.pow(2).mean(-1, keepdim=True).sqrt())  # so that the final norm changes nothing
    model.save_pretrained(target)
    config, rows = eagle1()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        rows[f"layers.0.{name}.weight"].zero_()
    rows["fc.weight"] = torch.cat([torch.eye(HIDDEN), noise * drawing(5)(HIDDEN, HIDDEN)], -1)
    return str(target), write(folder / "head", config, rows), Eagle1(config, rows, model)


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_head_that_is_always_right_is_always_accepted(tmp_path, temperature, overlap):
    """Up to the last position that the engine has, greedy or drawn."""
    target, head, _ = rigged(tmp_path)
    common = dict(profile="none", dtype="float32", max_model_len=32, max_requests=4, kv_memory="8MiB", threads=1, device="cpu")
    section, params = (
        {"head": head, "draft_tokens": 4, "adaptive": False},
        dict(temperature=temperature, max_tokens=40, ignore_eos=True),
    )
    got = []
    for plugins in ({}, {"eagle": section}):
        with LLM(model=target, **common, overlap=overlap, plugins={"safetensors": {}} | plugins) as llm:
            asked = [SamplingParams(**params, seed=number, detokenize=False) for number in range(3)]
            got.append([output.outputs[0] for output in llm.generate(PROMPTS, asked)])
    plain, drafted = got
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert [len(ids) + len(one.token_ids) for ids, one in zip(PROMPTS, drafted)] == [32] * 3
    for one in drafted:
        assert one.num_accepted == one.num_drafted >= 0.6 * (len(one.token_ids) - 1)


def test_drafts_are_accepted_as_far_as_they_are_right(tmp_path):
    target, path, head = rigged(tmp_path, noise=0.15)
    outputs, seen, _ = watched(target, path)
    verified, right = 0, 0
    for number, ids in enumerate(PROMPTS):
        text, mine = [*ids, *outputs[number]], [one for one in seen if one[0] == number]
        assert outputs[number] == greedy(head.model, ids)
        for (_, known, tokens, _), (_, after, _, _) in pairwise(mine):
            assert tokens == list(chain(head, text[:known], len(tokens)))
            room = tokens[: len(text) - known - 1]
            agreed = next((j for j, token in enumerate(room) if token != text[known + j]), len(room))
            assert after == known + 1 + agreed
            verified, right = verified + len(room), right + agreed
    assert 0.1 * verified < right < 0.9 * verified


def renamed(rows, names):
    """The tensors with the beginnings of their names replaced."""
    return {
        next((new + name[len(old) :] for old, new in names.items() if name.startswith(old)), name): t for name, t in rows.items()
    }


WRAPPED = {
    "eagle": lambda: ({"model_type": "eagle", "model": eagle1()[0] | {"model_type": "llama"}}, eagle1()[1]),
    "speculators eagle": lambda: (
        {
            "speculators_model_type": "eagle",
            "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
            "layernorms": False,
            "fusion_bias": True,
            "transformer_layer_config": SIZES | {"num_hidden_layers": 1, "model_type": "llama"},
        },
        renamed(eagle1("eagle_fc_bias")[1], {"fc.": "fusion_fc.", "layers.0.": "transformer."}),
    ),
    "speculators": lambda: (
        {
            "speculators_model_type": "eagle3",
            "draft_vocab_size": VOCAB,
            "norm_before_residual": True,
            "transformer_layer_config": SIZES | {"num_hidden_layers": 1, "model_type": "llama"},
        },
        eagle3("layers.0")[1],
    ),
    "eagle_config": lambda: (
        {**eagle3("midlayer")[0], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True}},
        eagle3()[1],
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_configs_are_read(target, tmp_path, name):
    config, rows = WRAPPED[name]()
    formula = Eagle3 if name in ("speculators", "eagle_config") else Eagle1
    flat = {"num_hidden_layers": 1, "norm_before_residual": name == "speculators"}
    if name == "eagle_config":
        flat["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    head = formula(flat, renamed(rows, {"fusion_fc.": "fc.", "transformer.": "layers.0."}), target[1])
    outputs, seen, _ = watched(target[0], write(tmp_path / "head", config, rows), PROMPTS[:1])
    for _, known, tokens, _ in seen:
        text = [*PROMPTS[0], *outputs[0]][:known]
        if known == len(text):
            assert tokens == list(chain(head, text, len(tokens)))


@pytest.mark.parametrize(
    "changes, section, message",
    [
        ({"vocab_size": 99}, {}, "made for a target with vocab_size 99; this one has 61"),
        ({"hidden_size": 64}, {}, "hidden_size 64; this one has 32"),
        ({"parallel_drafting": True}, {}, "parallel_drafting = True"),
        ({"speculators_model_type": "hydra"}, {}, "of the type 'hydra'"),
        ({"speculators_model_type": "eagle", "layernorms": True}, {}, "layernorms = True"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 30]}, {}, "is it the head of another model"),
        ({}, {"method": "eagle3"}, "read as 'eagle3'"),
        ({}, {"tree": True, "tree_top_k": 2, "tree_depth": 2, "draft_tokens": 9}, "more than the 6 candidates"),
        ({}, {"tree_depth": 3}, "set tree = true"),
        ({}, {"head": "/nowhere/at/all"}, "plugins.eagle.head = '/nowhere/at/all'"),
    ],
)
def test_what_cannot_work_is_refused(target, tmp_path, changes, section, message):
    config, rows = eagle1()
    with pytest.raises(ConfigError, match=message):
        watched(target[0], write(tmp_path / "head", config | changes, rows), PROMPTS[:1], section=section)
