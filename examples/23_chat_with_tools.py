"""A chat in two turns: the model calls a tool, the script runs it, and the model answers from what it gave.

python examples/23_chat_with_tools.py [--model tiny-chat] [--question "Call math.sqrt with 16"]

`read_answer` is a method that the plugin tool_calling adds to `LLM`. Ids of calls have nine letters or digits, which every chat
template takes.
"""

import argparse
import math

from kernel_core import LLM


def square_root(x: float) -> float:
    return math.sqrt(x)


def power(x: float, y: float) -> float:
    return math.pow(x, y)


FUNCTIONS = {"math.sqrt": square_root, "math.pow": power}


def tool(name: str, description: str, *parameters: str) -> dict:
    schema = {"type": "object", "properties": {key: {"type": "number"} for key in parameters}, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [tool("math.sqrt", "The square root of x", "x"), tool("math.pow", "x to the power y", "x", "y")]


def run(call: dict) -> str:
    """What the function gives, or what went wrong: the model has to know either."""
    try:
        return str(FUNCTIONS[call["name"]](**call["arguments"]))
    except (ValueError, TypeError, KeyError) as error:
        return f"error: {error!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--question", default="Call math.sqrt with 16")
    given = parser.parse_args()
    messages = [{"role": "user", "content": given.question}]
    with LLM(given.model, config={"plugins": {"tool_calling": {}}}) as llm:
        (output,) = llm.chat(messages, tools=TOOLS, temperature=0, max_tokens=128)
        answer = llm.read_answer(output, TOOLS)
        print(f"written: {output.outputs[0].text}")
        messages.append(answer)
        for call in answer.get("tool_calls", ()):
            result = run(call["function"])
            print(f"call {call['id']}: {call['function']['name']}({call['function']['arguments']}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        (output,) = llm.chat(messages, tools=TOOLS, temperature=0, max_tokens=128)
        print(f"answer: {llm.read_answer(output, TOOLS)['content']}")


if __name__ == "__main__":
    main()
