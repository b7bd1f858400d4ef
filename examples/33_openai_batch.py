"""A file of requests in the OpenAI batch format, answered without a server: what `kernel run-batch` does.

python examples/33_openai_batch.py [--model NAME] [--folder FOLDER]

It writes FOLDER/requests.jsonl and FOLDER/answers.jsonl. One line of the requests is broken on purpose: it gets an error in its
place, and the others their answers. Run it again: nothing is computed twice.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

QUESTIONS = ["What does os.path.join do?", "What does os.getcwd do?", "Hello!"]


def requests():
    for number, question in enumerate(QUESTIONS):
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 60}
        yield json.dumps({"custom_id": f"chat-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    body = {"prompt": "def join(", "temperature": 0, "max_tokens": 10}
    yield json.dumps({"custom_id": "completion", "method": "POST", "url": "/v1/completions", "body": body})
    yield '{"custom_id": "broken", "url": '


def text_of(answer):
    if answer["error"] is not None:
        return f"error: {answer['error']['message']}"
    choice = answer["response"]["body"]["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--folder", default="build/batch")
    given = parser.parse_args()
    folder = Path(given.folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "requests.jsonl", folder / "answers.jsonl"
    source.write_text("\n".join(requests()) + "\n")
    command = [sys.executable, "-m", "kernel_core", "run-batch", "-i", str(source), "-o", str(target), "-m", given.model]
    code = subprocess.run(command, check=False).returncode
    for line in target.read_text().splitlines():
        answer = json.loads(line)
        print(f"{answer['custom_id']}: {text_of(answer)!r}")
    print("Exit code of kernel run-batch:", code)


if __name__ == "__main__":
    main()
