"""Composes the conversations that the models learn from: questions, tool calls, JSON, small talk, and what is unknown."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import questions
from facts import Function

Message = dict[str, Any]
UNKNOWN_FUNCTION = "I don't know that function."
UNKNOWN = "I don't know. I only learned about Python's standard library."
PHRASES = questions.PHRASES
SYSTEMS, WONDERS, TOPICS, ASKS, VERBS = (PHRASES[key] for key in ("systems", "wonders", "topics", "asks", "verbs"))
NOUNS, WORDS, SUFFIXES, TOOL_MODULES = (PHRASES[key] for key in ("nouns", "words", "suffixes", "tool_modules"))


def callable_functions(functions: list[Function]) -> list[Function]:
    """The functions that are taught as tools: small modules, one to three arguments."""
    fit = [f for f in functions if f.signature and f.parameters and f.required <= 3]
    return [f for f in fit if "." not in f.name or f.name.rsplit(".", 1)[0] in TOOL_MODULES]


# ---- tool calls and JSON ---------------------------------------------------------------------------------------------


def _number(rng: random.Random) -> tuple[str, Any]:
    sign = "-" if rng.random() < 0.25 else ""
    whole = str(rng.randrange(10 ** rng.choice((1, 2, 2, 3, 4, 5))))
    if rng.random() < 0.3:
        text = (
            f"{sign}{whole}.{rng.randrange(1, 10)}"
            if rng.random() < 0.5
            else f"{sign}{whole}.{rng.randrange(10, 1000)}".rstrip("0")
        )
        return text, float(text)
    return sign + whole, int(sign + whole)


def _text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 8)))
    if kind < 0.5:
        return f"{rng.choice(WORDS)}.{rng.choice(SUFFIXES)}"
    if kind < 0.6:
        return f"/{rng.choice(WORDS)}/{rng.choice(WORDS)}"
    if kind < 0.75:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 3)))
    return rng.choice(WORDS) if kind < 0.95 else rng.choice(WORDS).upper()


def value(rng: random.Random) -> tuple[str, str]:
    """An argument as a person writes it, and as JSON."""
    if rng.random() < 0.55:
        text, _ = _number(rng)
        return text, text
    text = _text(rng)
    quote = rng.choice("\"'\"'\"'`") if " " in text or rng.random() < 0.85 else ""
    return f"{quote}{text}{quote}", json.dumps(text)


def _listed(parts: list[str], rng: random.Random) -> str:
    if len(parts) == 1:
        return parts[0]
    joined = rng.choice((", ", " and ")) if len(parts) == 2 else ", "
    last = rng.choice((", ", " and ", ", and ")) if len(parts) > 2 else joined
    return joined.join(parts[:-1]) + last + parts[-1]


def tool_call(name: str, arguments: list[tuple[str, str]]) -> str:
    """The text of a call; `arguments` are names with JSON values."""
    inner = ", ".join(f'"{key}": {written}' for key, written in arguments)
    return f'<tool_call>{{"name": "{name}", "arguments": {{{inner}}}}}</tool_call>'


def call_request(name: str, parameters: list[str], rng: random.Random, asks: list[str] = ASKS) -> tuple[str, str]:
    """A request to call `name`, and the call."""
    values = [value(rng) for _ in parameters]
    shown = [said for said, _ in values]
    if rng.random() < 0.25:
        glue = rng.choice(("=", "=", " = ", " "))
        shown = [f"{key}{glue}{said}" for key, said in zip(parameters, shown)]
    text = rng.choice(asks).replace("{n}", rng.choice((name, name, name, f"`{name}`"))).replace("{a}", _listed(shown, rng))
    if rng.random() < 0.7:
        text = text[:1].upper() + text[1:]
    return text + rng.choice(("", "", "", ".", "!", " please")), tool_call(
        name, [(k, v) for k, (_, v) in zip(parameters, values)]
    )


def given_parameters(function: Function, rng: random.Random) -> list[str]:
    most = min(3, len(function.parameters))
    return function.parameters[: rng.randint(max(1, min(function.required, most)), most)]


def _invented_tool(rng: random.Random) -> tuple[str, list[str]]:
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    return name, rng.sample(NOUNS, rng.randint(1, 3))


def with_tools(rng: random.Random) -> list[Message]:
    """A call of one of the tools that the system message lists: name and parameters are copied from there."""
    tools = [_invented_tool(rng) for _ in range(rng.randint(1, 3))]
    name, parameters = rng.choice(tools)
    asked, answer = call_request(name, parameters[: rng.randint(1, len(parameters))], rng)
    listed = "\n".join(f"{tool}({', '.join(names)})" for tool, names in tools)
    intro = rng.choice(SYSTEMS) if rng.random() < 0.3 else ""
    return [_say("system", f"{intro}<tools>{listed}</tools>"), _say("user", asked), _say("assistant", answer)]


def _json_fields(rng: random.Random) -> tuple[str, str]:
    keys = rng.sample(NOUNS, rng.randint(1, 3))
    values = [value(rng) for _ in keys]
    glue = rng.choice((" ", "=", ": ", " is "))
    ask = rng.choice(
        ("as JSON: {a}", "JSON with {a}", "give me JSON with {a}", "write {a} as JSON", "make a JSON object: {a}", "{a} in JSON")
    )
    text = ask.replace("{a}", _listed([f"{key}{glue}{said}" for key, (said, _) in zip(keys, values)], rng))
    return text, "{" + ", ".join(f'"{key}": {written}' for key, (_, written) in zip(keys, values)) + "}"


def _json_list(rng: random.Random) -> tuple[str, str]:
    values = [value(rng) for _ in range(rng.randint(2, 4))]
    ask = rng.choice(
        ("JSON list of {a}", "a JSON list with {a}", "give me a JSON array of {a}", "as a JSON list: {a}", "JSON array: {a}")
    )
    return ask.replace("{a}", _listed([said for said, _ in values], rng)), f"[{', '.join(written for _, written in values)}]"


def _json_module(name: str, rng: random.Random) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    ask = rng.choice(
        ("module of {f} as JSON", "JSON: module and name of {f}", "split {f} into module and name as JSON", "{f} as JSON")
    )
    return ask.replace("{f}", name), json.dumps({"module": module or "builtins", "name": last})


# ---- what it cannot know ---------------------------------------------------------------------------------------------


class Fakes:
    """Makes names that look like functions and are none of the taught ones."""

    def __init__(self, functions: list[Function]) -> None:
        self.known = {function.name for function in functions}
        self.modules = sorted({name.rpartition(".")[0] for name in self.known} - {""})
        self.parts = sorted({part for name in self.known for part in name.rpartition(".")[2].split("_") if part})
        self.lasts = sorted({name.rpartition(".")[2] for name in self.known})

    def name(self, rng: random.Random) -> str:
        while True:
            module = rng.choice(self.modules) if rng.random() < 0.6 else self._word(rng)
            last = rng.choice((self._joined, self._joined, lambda r: r.choice(self.lasts), self._word))(rng)
            name = f"{module}.{last}" if rng.random() < 0.9 else last
            if name not in self.known and len(name) > 2:
                return name

    def _joined(self, rng: random.Random) -> str:
        return "_".join(rng.choices(self.parts + VERBS + NOUNS, k=rng.choice((1, 2, 2, 3))))

    def _word(self, rng: random.Random) -> str:
        if rng.random() < 0.4:
            return rng.choice(NOUNS + WORDS + VERBS).lower()
        return "".join(
            rng.choices(
                ("ba", "lo", "mi", "ta", "ex", "or", "ki", "zu", "pan", "net", "qua", "der", "fo", "gri"), k=rng.randint(2, 3)
            )
        )


# ---- the mixture -----------------------------------------------------------------------------------------------------


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _talk(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(PHRASES["talk"])
    text, answer = rng.choice(kind["asked"]), kind["answer"]
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.4:
        text = text.rstrip("?!") + rng.choice(questions.MARKS)
    return rng.choice(PHRASES["openings"]) + text if rng.random() < 0.15 else text, answer


def _wonder(rng: random.Random) -> tuple[str, str]:
    text = rng.choice(WONDERS).replace("{t}", rng.choice(TOPICS))
    text = questions.noisy(questions.framed(text, rng), "\0", rng)
    return text[:1].upper() + text[1:] + rng.choice(questions.MARKS), UNKNOWN


# How often each kind of exchange comes, relative to the others: while the facts are learned, and afterwards.
FACTS_FIRST = {"describe": 100, "signature": 16, "call": 24, "tools": 6, "fake": 12, "wonder": 6, "talk": 6, "json": 6}
ALL_SKILLS = {"describe": 90, "signature": 22, "call": 64, "tools": 12, "fake": 14, "wonder": 6, "talk": 6, "json": 16}


@dataclass(frozen=True)
class Proportions:
    """How often each kind of exchange comes, and which share of the questions is plain, or hidden in unrelated words."""

    weights: dict[str, int] = field(default_factory=lambda: FACTS_FIRST)
    plain: float = 0.4
    salad: float = 0.0


class Mixture:
    """An endless, seeded stream of conversations that asks about every function equally often."""

    def __init__(self, functions: list[Function], seed: int, proportions: Proportions) -> None:
        self.proportions = proportions
        self.rng = random.Random(seed)
        self.fakes = Fakes(functions)
        self.docs = self._cycle(functions)
        self.signatures = self._cycle([f for f in functions if f.signature])
        self.tools = self._cycle(callable_functions(functions))
        self.names = [f.name for f in functions]
        self.makers: dict[str, Callable[[], list[Message]]] = {
            "describe": lambda: self._pair(*self._describe()),
            "signature": lambda: self._pair(*self._signature()),
            "call": self._call,
            "tools": lambda: with_tools(self.rng),
            "fake": lambda: self._pair(self._question(self.fakes.name(self.rng)), UNKNOWN_FUNCTION),
            "wonder": lambda: self._pair(*_wonder(self.rng)),
            "talk": lambda: self._pair(*_talk(self.rng)),
            "json": lambda: self._pair(*self._json()),
        }

    def _cycle(self, functions: list[Function]) -> Iterator[Function]:
        while True:
            yield from self.rng.sample(functions, len(functions))

    def _pair(self, asked: str, answer: str) -> list[Message]:
        return [_say("user", asked), _say("assistant", answer)]

    def _describe(self) -> tuple[str, str]:
        function = next(self.docs)
        return self._question(function.name), function.doc

    def _question(self, name: str) -> str:
        if self.proportions.salad and self.rng.random() < self.proportions.salad:
            return questions.salad(name, self.rng)
        return questions.compose(name, self.rng, plain=self.proportions.plain)

    def _signature(self) -> tuple[str, str]:
        function = next(self.signatures)
        asked = questions.compose(function.name, self.rng, cores=questions.SIGNATURES, plain=self.proportions.plain)
        return asked, function.signature

    def _call(self) -> list[Message]:
        function = next(self.tools)
        messages = self._pair(*call_request(function.name, given_parameters(function, self.rng), self.rng))
        if self.rng.random() < 0.15:
            said, _ = value(self.rng)
            messages += [_say("tool", said), _say("assistant", f"The result is {said}.")]
        return messages

    def _json(self) -> tuple[str, str]:
        kind = self.rng.random()
        if kind < 0.4:
            return _json_fields(self.rng)
        return _json_list(self.rng) if kind < 0.7 else _json_module(self.rng.choice(self.names), self.rng)

    def conversation(self) -> list[Message]:
        """One to four exchanges, sometimes after a system message."""
        kinds, weights = list(self.proportions.weights), list(self.proportions.weights.values())
        turns = 1 if self.rng.random() < 0.8 else self.rng.randint(2, 4)
        messages: list[Message] = []
        for kind in self.rng.choices(kinds, weights, k=turns):
            made = self.makers[kind]()
            messages += made[1:] if messages and made[0]["role"] == "system" else made
            if kind == "tools":
                break
        if messages[0]["role"] != "system" and self.rng.random() < 0.08:
            messages.insert(0, _say("system", self.rng.choice(SYSTEMS)))
        return messages
