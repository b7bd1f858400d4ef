"""Composes questions about a function: a core, a way to write the name, an opening, an ending, and noise words."""

from __future__ import annotations

import random
import zlib

CORES = """what does {f} do|what is {f}|what is {f} for|what's {f}|explain {f}|tell me about {f}|tell me what {f} does|describe {f}
|can you explain {f}|could you describe {f} for me|what is the purpose of {f}|what's the point of {f}|how would you describe {f}
|what happens when I call {f}|why would I use {f}|when do I use {f}|I saw {f} in some code, what does it do|docs of {f}
|documentation for {f}|what do the docs say about {f}|docstring of {f}|show the docstring of {f}|summarise {f}|summary of {f}
|{f}|{f}: what does it do|{f}: what is that|help({f})|help with {f}|what does the call {f} do|what can {f} do|what is {f} used for
|define {f}|I want to know what {f} does|do you know what {f} does|do you know {f}|give me the first line of the docs of {f}
|give a short description of {f}|I need help with {f}|I don't understand {f}|meaning of {f}|what's the use of {f}
|someone told me to use {f}, why|my code has {f} in it. what is it|remind me what {f} does|any idea what {f} does
|what job does {f} have|what will {f} do for me|describe the behaviour of {f}|how does {f} work|what does calling {f} achieve
|I came across {f}. explain it|say what {f} is|in short, what is {f}|is there an explanation of {f}|read me the docs of {f}
|{f} does what|{f} is for what|{f} - explain|what's {f} good for|which task does {f} solve|what effect does {f} have
|teach me {f}|inform me about {f}|look up {f}|what should I know about {f}""".replace("\n", "").split("|")
SIGNATURES = """what is the signature of {f}|signature of {f}|show me the signature of {f}|what arguments does {f} take
|which parameters does {f} have|arguments of {f}|parameters of {f}|what arguments can I give to {f}|list the parameters of {f}
|what are the arguments for {f}|which arguments does {f} accept|give me the signature of {f}|{f}: signature
|what parameters do I pass to {f}|tell me the arguments of {f}|{f} arguments|{f} parameters""".replace("\n", "").split("|")
NAMES = """{n}|{n}|{n}|{n}|{n}|{n}()|`{n}`|`{n}()`|"{n}"|'{n}'|the function {n}|the {n} function|the {n} method|Python's {n}
|the call {n}()|({n})|the function `{n}`""".replace("\n", "").split("|")
OPENINGS = """Hi, |Hello, |Hey, |Hello! |Please, |Please |Quick question: |So, |Well, |Ok, |In Python, |Um, |I wonder: |Question: |Hey there, 
|Sorry, |Now |And |Next: |Also, |Good morning. |One more thing: |Let me ask: |I'm new to Python. |I am reading code. """
ENDINGS = """ please| in Python| in one line| in one sentence| briefly| thanks|, thanks| exactly|, I forgot| for a beginner
| again|, please| in the standard library| in simple words| here| now| actually| really| for me| at all|, friend"""
OPENING_LIST = OPENINGS.replace("\n", "").split("|")
ENDING_LIST = ENDINGS.replace("\n", "").split("|")
NOISE = """the a my of in code so just maybe really about this that some line file program today it is you me I know think want
need see read use using well like good very with from and or but then there here now one thing way work please kindly guess
what how why when where which who could would should can do does did was were have has had if not only also team friend boss
wrote found reading looking trying exactly short quickly simply basically actually python function module call name question
answer script project colleague yesterday sometimes often always never before after at on for to by as""".split()
# A fact is learned by being answered, whatever the question: these cost few tokens.
PLAIN = ("{f}", "{f}?", "What does {f} do?", "what does {f} do", "What is {f}?", "Explain {f}", "`{f}`", "{f}()")
MARKS = ("?", "?", "?", "?", ".", "", "", "!", " ?")


def _noisy(text: str, name: str, rng: random.Random) -> str:
    """Drops, doubles and inserts words; the function's name stays."""
    strength = rng.choice((0.0, 0.0, 0.05, 0.12, 0.3))
    words = []
    for word in text.split(" "):
        if rng.random() < strength:
            words.append(rng.choice(NOISE))
        if name in word or rng.random() > strength * 0.6:
            words.append(word)
    return " ".join(words)


def _framed(core: str, rng: random.Random) -> str:
    opening = rng.choice(OPENING_LIST) if rng.random() < 0.35 else ""
    ending = rng.choice(ENDING_LIST) if rng.random() < 0.3 else ""
    return f"{opening}{core}{ending}"


def _cased(text: str, name: str, rng: random.Random) -> str:
    if rng.random() < 0.6 and not text.startswith((name, "help(")):
        text = text[:1].upper() + text[1:]
    return text


def is_heldout(core: str, written: str, opening: str = "") -> bool:
    """True for one in ten combinations of core and way of writing: those are asked in the evaluation only."""
    return zlib.crc32(f"{core}|{written}|{opening}".encode()) % 10 == 0


def compose(name: str, rng: random.Random, heldout: bool = False, cores: list[str] = CORES) -> str:
    """A question about `name`. Held-out questions use combinations that the other ones never do."""
    if not heldout and rng.random() < 0.4 and cores is CORES:
        return rng.choice(PLAIN).replace("{f}", name)
    while True:
        core, written = rng.choice(cores), rng.choice(NAMES)
        if is_heldout(core, written) == heldout:
            break
    text = _framed(core.replace("{f}", written.replace("{n}", name)), rng)
    if not heldout or rng.random() < 0.5:
        text = _noisy(text, name, rng)
    return _cased(text, name, rng) + rng.choice(MARKS)
