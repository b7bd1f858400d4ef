"""`kernel generate`: prompts in, answers out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kernel_core.api import LLM, ConfigError, RequestError, RequestOutput, config_from_arguments, sampling_from_arguments
from kernel_generate.stats import describe

DEFAULT_MAX_TOKENS = 256  # where neither the user nor the model says anything


def run(arguments: argparse.Namespace) -> int:
    """0: every prompt has its answer; 1: some failed while they ran. Invalid input raises before anything runs."""
    prompts, given = read_prompts(arguments), sampling_from_arguments(arguments)
    with LLM(config=config_from_arguments(arguments)) as llm:
        sys.stderr.write(llm.engine.summary + "\n")
        sampling = {"max_tokens": llm.engine.intake.defaults.get("max_tokens", DEFAULT_MAX_TOKENS), **given}
        requests = [_request(llm, arguments, prompt) for prompt in prompts]
        if len(requests) == 1 and not arguments.json and sampling.get("n", 1) == 1:
            outputs = [_stream(llm, requests[0], sampling)]
        else:
            outputs = llm.generate(requests, **sampling)
            for prompt, output in zip(prompts, outputs):
                sys.stdout.write(json_lines(prompt, output) if arguments.json else _text(prompt, output, len(prompts) > 1))
        for output in outputs:
            if output.error:
                sys.stderr.write(f"error: {output.error}\n")
        if arguments.stats:
            sys.stderr.write(describe(outputs, llm.engine.start_seconds, llm.draft_counts) + "\n")
    return 1 if any(output.error for output in outputs) else 0


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """From the arguments, or a file, or standard input. Raises RequestError when there are none."""
    if arguments.prompts and arguments.file:
        raise RequestError("give prompts or --file, not both")
    if (arguments.system or arguments.chat_template) and not arguments.chat:
        raise RequestError("--system and --chat-template need --chat")
    if arguments.prompts not in ([], ["-"]):
        return arguments.prompts
    if not (arguments.file or arguments.prompts) and sys.stdin.isatty():
        raise RequestError('no prompt: kernel generate "Hello", or --file FILE, or text on standard input (see --help)')
    text = sys.stdin.read() if arguments.file in (None, "-") else _read(arguments.file)
    prompts = [text] if arguments.whole else [line for line in text.splitlines() if line.strip()]
    if not prompts or not prompts[0].strip():
        raise RequestError(f"{arguments.file or 'standard input'} has no prompt")
    return prompts


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error


def _request(llm: LLM, arguments: argparse.Namespace, prompt: str) -> Any:
    if not arguments.chat:
        return prompt
    codec = llm.engine.codec
    if codec is None:
        raise ConfigError("--chat needs the text plugin, which the configuration leaves out")
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    template = _read(arguments.chat_template) if arguments.chat_template else None
    ids = codec.apply_chat_template([*messages, {"role": "user", "content": prompt}], template=template)
    return {"prompt_token_ids": ids, "prompt": prompt}


def _stream(llm: LLM, request: Any, sampling: dict[str, Any]) -> RequestOutput:
    """Write the text as it comes; → the last output."""
    shown = ""
    for output in llm.stream(request, **sampling):
        text = output.outputs[0].text
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
    sys.stdout.write("\n")
    return output


def _text(prompt: str, output: RequestOutput, several: bool) -> str:
    heading = f"> {prompt}\n" if several else ""
    return heading + "".join(f"{completion.text}\n" for completion in output.outputs) + ("\n" if several else "")


def json_lines(prompt: str, output: RequestOutput) -> str:
    """One object a completion. Timings are seconds since the request arrived."""
    timings = {name: getattr(output.timings, name) for name in ("queued", "first_token", "finished")}
    lines = []
    for completion in output.outputs:
        line = {
            "prompt": prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "num_prompt_tokens": len(output.prompt_token_ids),
            "num_cached_tokens": output.num_cached_tokens,
            "timings": timings,
        }
        line |= {"index": completion.index} if len(output.outputs) > 1 else {}
        drafts = {"num_drafted_tokens": completion.num_drafted, "num_accepted_tokens": completion.num_accepted}
        line |= drafts if completion.num_drafted else {}
        line |= {"logprobs": _logprobs(completion.logprobs)} if completion.logprobs is not None else {}
        line |= {"prompt_logprobs": _logprobs(output.prompt_logprobs)} if output.prompt_logprobs is not None else {}
        line |= {"error": output.error} if output.error else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _logprobs(entries: list[Any]) -> list[dict[str, float] | None]:
    return [entry and {str(token): value.logprob for token, value in entry.items()} for entry in entries]
