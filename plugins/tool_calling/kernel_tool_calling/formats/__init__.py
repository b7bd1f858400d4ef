"""The built-in formats, in the order in which `parser = "auto"` asks them."""

from kernel_tool_calling.formats.json_calls import HERMES, JSON_LIST, LLAMA3_JSON, MISTRAL
from kernel_tool_calling.formats.pythonic import PYTHONIC
from kernel_tool_calling.formats.sections import DEEPSEEK_V3, KIMI_K2
from kernel_tool_calling.formats.xml_calls import QWEN3_CODER

FORMATS = {
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": KIMI_K2,
    "qwen3_coder": QWEN3_CODER,
    "mistral": MISTRAL,
    "hermes": HERMES,
    "pythonic": PYTHONIC,
    "llama3_json": LLAMA3_JSON,
}

__all__ = ["FORMATS", "JSON_LIST"]
