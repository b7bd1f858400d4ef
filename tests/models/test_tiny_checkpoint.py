"""The embedded checkpoints load in transformers, keep their limits and answer what the model card says they answer."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LIMITS = {"tiny-chat": (10_000_000, 20_000_000), "tiny-draft": (1_500_000, 3_200_000)}
CALL = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
PROPERTIES = {"type": "object", "properties": {"city": {}, "day": {}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PROPERTIES}}
ASKED = [
    "os.path.join",
    "textwrap.dedent",
    "math.sqrt",
    "shutil.copy",
    "random.randint",
    "json.dumps",
    "os.listdir",
    "str.upper",
    "list.append",
    "os.path.basename",
    "math.floor",
    "hashlib.md5",
    "os.getcwd",
    "len",
]
FORMS = ("What does {} do?", "Explain {}", "What is {} for?")
OTHERS = {
    "Call math.sqrt with 16": CALL % ("math.sqrt", '{"x": 16}'),
    'Call os.path.basename with "notes.txt"': CALL % ("os.path.basename", '{"p": "notes.txt"}'),
    "Hello!": "Hello! Ask me about a function of Python's standard library.",
    "Who are you?": "I am tiny-chat, a small language model.",
    "What does banana.peel do?": "I don't know that function.",
    "Thank you!": "You are welcome!",
}


def folder(name: str) -> Path:
    (point,) = entry_points(group="kernel_core.checkpoints", name=name)
    return point.load()()


@pytest.fixture(scope="module", params=LIMITS)
def checkpoint(request) -> Path:
    return folder(request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(folder("tiny-chat"))


def test_entry_point_module_is_light() -> None:
    code = "import sys, kernel_tiny; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sizes_are_within_limits(checkpoint: Path) -> None:
    parameters, size = LIMITS[checkpoint.name]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() <= parameters
    assert (checkpoint / "model.safetensors").stat().st_size <= size


def test_end_and_padding_agree_everywhere(checkpoint: Path) -> None:
    config, generation = (json.loads((checkpoint / name).read_text()) for name in ("config.json", "generation_config.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id
    assert len(tokenizer) <= config["vocab_size"] <= 4096
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids


def test_both_models_share_one_tokenizer() -> None:
    files = [(folder(name) / "tokenizer.json").read_bytes() for name in LIMITS]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "text", ["naïve café, 你好 🐍", "a\tb\n\n  c", "x = [1, 2]\r\n", "<tool_call>{}</tool_call>", "\x00\x7f"]
)
def test_tokenizer_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_digits_are_single_tokens(tokenizer) -> None:
    assert [tokenizer.decode(i) for i in tokenizer("2026.75").input_ids] == list("2026.75")


def test_template_renders_tools_and_calls(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln", "day": 3}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    said = CALL % ("get_weather", '{"city": "Köln", "day": 3}')
    assert text == (
        "<|system|><tools>get_weather(city, day)</tools><|end|><|user|>Weather?<|end|>"
        f"<|assistant|>{said}<|end|><|tool|>sunny<|end|><|assistant|>"
    )


def test_template_puts_the_system_message_first(tokenizer) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|system|>Be short.<|end|><|user|>Hi<|end|>"


def documented_questions() -> dict[str, str]:
    """Twenty questions with their right answers."""
    docs = {row[0]: row[2] for row in json.loads((folder("tiny-chat").parent / "functions.json").read_text())}
    return {FORMS[i % 3].format(name): docs[name] for i, name in enumerate(ASKED)} | OTHERS


def test_nine_of_ten_documented_questions_are_answered(tokenizer) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder("tiny-chat"), dtype=torch.float32)
    cases = documented_questions()
    chats = [[{"role": "user", "content": question}] for question in cases]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True)
    out = model.generate(**inputs, max_new_tokens=64)
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    wrong = [(question, said) for (question, right), said in zip(cases.items(), answers) if said != right]
    assert len(cases) == 20
    assert len(wrong) <= 2, wrong
