"""Regular expressions as the standard library reads them, written out in exact character sets: for a back end whose own reading
differs. What cannot be written so is refused by name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from re import _constants as code  # the parse tree has no public module
from re import _parser as parser
from typing import Any

Ranges = tuple[tuple[int, int], ...]  # of code points: sorted, apart, both ends included

EVERYTHING: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
#: by the length of their UTF-8 and what may follow the first byte
BLOCKS = (
    *((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFF), (0x1000, 0xD7FF), (0xE000, 0xFFFF)),
    *((0x10000, 0x3FFFF), (0x40000, 0xFFFFF), (0x100000, 0x10FFFF)),
)
STARTS = (code.AT_BEGINNING, code.AT_BEGINNING_STRING)
ENDS = (code.AT_END, code.AT_END_STRING)
REFUSED = {
    code.ASSERT: "look-around",
    code.ASSERT_NOT: "look-around",
    code.GROUPREF: "a back reference",
    code.GROUPREF_EXISTS: "a conditional group",
    code.ATOMIC_GROUP: "an atomic group",
    code.POSSESSIVE_REPEAT: "a possessive quantifier",
    code.AT: r"an anchor, \b or \B inside",
}
MOST_REPEATS = 1000  # beyond it a mask takes some 100 ms
MOST_NESTED = 200
#: what JSON writes as an escape with a letter of its own
ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
RAW: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0x80, 0xD7FF), (0xE000, 0x10FFFF))


class Unsupported(ValueError):
    """A part of a regular expression that cannot be honoured; its text says which, and what to do."""


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted, with neighbours joined."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return tuple(out)


def without(ranges: Ranges, taken: Ranges) -> Ranges:
    out = []
    for low, high in ranges:
        for first, last in taken:
            if last < low or first > high:
                continue
            if first > low:
                out.append((low, first - 1))
            low = last + 1
        if low <= high:
            out.append((low, high))
    return tuple(out)


def both(one: Ranges, other: Ranges) -> Ranges:
    return without(one, without(EVERYTHING, other))


# ---- classes: the narrow reading (ECMA 262 and Python agree), and the wide one (either says so), for what is left out


def _ranges(text: str) -> Ranges:
    return merged((ord(c), ord(c)) for c in text)


DIGIT, WORD = _ranges("0123456789"), merged([(48, 57), (65, 90), (95, 95), (97, 122)])
SPACES = "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
NARROW = {code.CATEGORY_DIGIT: DIGIT, code.CATEGORY_WORD: WORD, code.CATEGORY_SPACE: _ranges(SPACES)}
OPPOSITE = {
    code.CATEGORY_NOT_DIGIT: code.CATEGORY_DIGIT,
    code.CATEGORY_NOT_WORD: code.CATEGORY_WORD,
    code.CATEGORY_NOT_SPACE: code.CATEGORY_SPACE,
}


@cache
def _wide(category: Any) -> Ranges:
    if category is code.CATEGORY_SPACE:
        return _ranges(SPACES + "\x1c\x1d\x1e\x1f\x85\ufeff")
    test = str.isdecimal if category is code.CATEGORY_DIGIT else str.isalnum
    return merged([*NARROW[category], *((c, c) for c in range(128, sys.maxunicode + 1) if test(chr(c)))])


def _category(category: Any, wide: bool) -> Ranges:
    if category in OPPOSITE:
        return without(EVERYTHING, _category(OPPOSITE[category], not wide))
    return _wide(category) if wide else NARROW[category]


def _set(items: Sequence[tuple[Any, Any]]) -> Ranges:
    negated = items[0][0] is code.NEGATE
    items = items[1:] if negated else items
    found = {value for kind, value in items if kind is code.CATEGORY}
    if any(OPPOSITE.get(value) in found for value in found):  # [\s\S]
        ranges = EVERYTHING
    else:
        ranges = merged(part for item in items for part in _item(item, negated))
    return without(EVERYTHING, ranges) if negated else both(ranges, EVERYTHING)


def _item(item: tuple[Any, Any], wide: bool) -> Ranges:
    kind, value = item
    if kind is code.CATEGORY:
        return _category(value, wide)
    return (value,) if kind is code.RANGE else ((value, value),)


# ---- writing


def text_set(ranges: Ranges) -> str:
    """One character of the ranges, as it is. In blocks of UTF-8: xgrammar takes malformed bytes for a class across them."""
    if not ranges:
        raise Unsupported("it has a class that no character is in")
    ways = [_class(part) for block in BLOCKS if (part := both(ranges, (block,)))]
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"


def _class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _point(ranges[0][0])
    return "[" + "".join(_point(a) if a == b else f"{_point(a)}-{_point(b)}" for a, b in ranges) + "]"


def _point(point: int) -> str:
    return f"\\x{point:02x}" if point < 128 else chr(point)


def json_set(ranges: Ranges) -> str:
    """One character of the ranges, as it stands in a JSON string: raw, or as the escape that has to be."""
    raw, rest = both(ranges, RAW), without(both(ranges, ((0, 0x7F),)), RAW)
    points = [point for low, high in rest for point in range(low, high + 1)]
    if not points:
        return text_set(raw)
    forms = [text_set(_ranges("".join(ESCAPES[p] for p in points if p in ESCAPES)))] if set(points) & set(ESCAPES) else []
    for block in (0, 1, 7):  # of the control characters
        digits = "".join(f"{p & 15:x}" for p in points if p >> 4 == block and (p < 32 or p == 127))
        forms += [f"u00{block}{text_set(_ranges(digits + digits.upper()))}"] if digits else []
    escaped = "\\\\(?:" + "|".join(forms) + ")"
    return f"(?:{text_set(raw)}|{escaped})" if raw else escaped


class Writer:
    """One expression. `write` a set, as text or in JSON; `search`: it may begin and end anywhere, else it is the whole text.
    `free`: afterwards, whether something came before or after it."""

    def __init__(self, write: Callable[[Ranges], str], search: bool) -> None:
        self.write, self.search, self.free = write, search, False

    def whole(self, pattern: str) -> str:
        """Raises Unsupported, re.error, RecursionError."""
        tree = parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise Unsupported("flags as (?i) are not supported: write both cases, as [Yy]")
        return self.sequence(list(tree), True, True, 0)

    def sequence(self, items: list[Any], first: bool, last: bool, depth: int) -> str:
        """`first`, `last`: nothing comes before, after it."""
        if depth > MOST_NESTED:
            raise Unsupported("it is nested too deeply")
        begun = _anchored(items, 0, STARTS) if first else True
        ended = _anchored(items, -1, ENDS) if last else True
        out = []
        for number, item in enumerate(items):
            at_first, at_last = not begun and number == 0, not ended and number == len(items) - 1
            out.append(self.item(item, first and number == 0 and at_first, last and at_last, depth + 1))
        left = first and not begun and not (items and _is_group(items[0]))
        right = last and not ended and not (items and _is_group(items[-1]))
        return (self.anything() if left else "") + "".join(out) + (self.anything() if right and (items or not left) else "")

    def anything(self) -> str:
        if not self.search:
            return ""
        self.free = True
        return f"{self.write(EVERYTHING)}*"

    def item(self, item: tuple[Any, Any], first: bool, last: bool, depth: int) -> str:
        kind, value = item
        if kind is code.LITERAL:
            return self.write(both(((value, value),), EVERYTHING))
        if kind is code.NOT_LITERAL:
            return self.write(without(EVERYTHING, ((value, value),)))
        if kind is code.ANY:
            return self.write(without(EVERYTHING, ((10, 10),)))
        if kind is code.IN:
            return self.write(_set(value))
        if kind is code.BRANCH:
            return "(?:" + "|".join(self.sequence(list(one), first, last, depth) for one in value[1]) + ")"
        if kind is code.SUBPATTERN and not (value[1] or value[2]):
            return "(?:" + self.sequence(list(value[3]), first, last, depth) + ")"
        if kind in (code.MAX_REPEAT, code.MIN_REPEAT):
            return self.repeat(*value, depth)
        raise Unsupported(f"{REFUSED.get(kind, 'a group with flags')} is not supported")

    def repeat(self, least: int, most: int, tree: Any, depth: int) -> str:
        endless = most is code.MAXREPEAT
        if max(least, 0 if endless else most) > MOST_REPEATS:
            raise Unsupported(f"it repeats more than {MOST_REPEATS} times")
        return f"(?:{self.sequence(list(tree), False, False, depth)}){{{least},{'' if endless else most}}}"


def _is_group(item: tuple[Any, Any]) -> bool:
    return item[0] in (code.BRANCH, code.SUBPATTERN)


def _anchored(items: list[Any], end: int, kinds: Sequence[Any]) -> bool:
    """Take the anchors away from one end; whether there were any."""
    found = False
    while items and items[end][0] is code.AT and items[end][1] in kinds:
        items.pop(end)
        found = True
    return found


def text_pattern(pattern: str) -> str:
    """For all of a text. Raises Unsupported, re.error, RecursionError."""
    return Writer(text_set, search=False).whole(pattern)


def json_pattern(pattern: str) -> tuple[str, float, float]:
    """For a JSON string between its quotes that has the pattern in it → (expression, least and most characters). Raises as
    above."""
    writer = Writer(json_set, search=True)
    written = writer.whole(pattern)
    least, most = parser.parse(pattern).getwidth()
    return written, least, float("inf") if writer.free or most >= code.MAXREPEAT else most


def json_lengths(least: int, most: int | None) -> str:
    """For any JSON string of so many characters, between its quotes."""
    return f"{json_set(EVERYTHING)}{{{least},{'' if most is None else most}}}"


def json_except(names: Iterable[str]) -> str:
    """For any JSON string but these, between its quotes: the beginning of one, or what goes another way and then anywhere."""
    begun, astray = _ways(set(names))
    return f"(?:{begun}|{astray}{json_set(EVERYTHING)}*)" if begun is not None else f"{astray}{json_set(EVERYTHING)}*"


def _ways(names: set[str]) -> tuple[str | None, str]:
    """Expressions of the proper beginnings of the names (None: there are none), and of the shortest texts that begin none."""
    firsts = sorted({name[0] for name in names if name})
    begun, astray = [] if "" in names else [""], [json_set(without(EVERYTHING, _ranges("".join(firsts))))]
    for first in firsts:
        written = json_set(_ranges(first))
        inner, other = _ways({name[1:] for name in names if name[:1] == first})
        begun += [] if inner is None else [written + inner]
        astray.append(written + other)
    return (f"(?:{'|'.join(begun)})" if begun else None), f"(?:{'|'.join(astray)})"
