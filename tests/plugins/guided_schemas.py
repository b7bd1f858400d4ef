"""JSON schemas of real-world shapes, in families that vary sizes, optional keys, unions and references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


def obj(required: str = "", /, **properties: Schema) -> Schema:
    names = required.split() if required else list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def text(most: int = 8, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def array(items: Schema, least: int = 0, most: int = 2) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def whole(least: int = 0, most: int = 999) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


VERSION = {"type": "string", "pattern": r"^[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}$"}
DATE = {"type": "string", "format": "date"}
TIME = {"type": "string", "format": "date-time"}
MONEY = {"type": "string", "pattern": r"^[0-9]{1,5}\.[0-9]{2}$"}
SMALL = {"type": "number", "minimum": -90, "maximum": 90}
BOOLEAN, NULL = {"type": "boolean"}, {"type": "null"}


def packages(n: int) -> Schema:
    names = ["left-pad", "express", "lodash", "react", "vite"][: 1 + n % 5]
    dependencies = obj(names[0], **dict.fromkeys(names, VERSION))
    private = {"private": BOOLEAN} if n % 2 else {}
    return obj("name version", name=text(6 + n, pattern="^[a-z-]{1,8}$"), version=VERSION, dependencies=dependencies, **private)


def openapi_parameter(n: int) -> Schema:
    kind = obj("type", type=one_of("string", "integer", "boolean")) if n % 2 else {"$ref": "#/$defs/kind"}
    made = obj(
        "name in schema",
        name=text(5 + n),
        **{"in": one_of("query", "header", "path", "cookie"), "required": BOOLEAN, "schema": kind},
    )
    return made if n % 2 else {**made, "$defs": {"kind": obj("type", type=one_of("string", "array"), nullable=BOOLEAN)}}


def github_event(n: int) -> Schema:
    actor = obj("id login", id=whole(1, 10 ** (2 + n % 6)), login=text(6 + n))
    payload = [obj(action=one_of("opened", "closed"), number=whole()), obj(ref=text(6), size=whole(0, 20))][n % 2]
    kind = one_of("PushEvent", "IssuesEvent", *[f"Event{i}" for i in range(n)])
    return obj(id=text(4, pattern="^[0-9]{1,4}$"), type=kind, actor=actor, payload=payload, public=BOOLEAN, created_at=TIME)


def invoice(n: int) -> Schema:
    line = obj("description quantity price", description=text(5), quantity=whole(1, 9), price=MONEY, tax=one_of(0, 7, 19))
    return obj(number={"type": "string", "pattern": f"^INV-[0-9]{{{2 + n % 5}}}$"}, date=DATE, lines=array(line, 1, 1 + n % 3))


def geojson(n: int) -> Schema:
    point = {"type": "array", "prefixItems": [SMALL, SMALL], "items": False, "minItems": 2, "maxItems": 2}
    shapes = [obj(type={"const": "Point"}, coordinates=point), obj(type={"const": "LineString"}, coordinates=array(point, 2, 2))]
    geometry = shapes[n % 2] if n % 3 else {"anyOf": shapes}
    return obj(type={"const": "Feature"}, geometry=geometry, properties=obj("name", name=text(2 + n), height=whole()))


def tool_call(n: int) -> Schema:
    arguments = [
        obj("city", city=text(6 + n), unit=one_of("celsius", "fahrenheit")),
        obj(x={"type": "number"}),
        obj(query=text(10 + n), limit=whole(1, 50), sort=one_of("asc", "desc", None)),
        obj("path", path=text(8 + n), recursive=BOOLEAN),
    ]
    calls = [obj(name={"const": f"tool_{i}"}, arguments=arguments[(i + n) % 4]) for i in range(1 + n % 3)]
    return array({"anyOf": calls}, 1, 1 + n % 2)


def user(n: int) -> Schema:
    address = obj("street zip", street=text(6), zip={"type": "string", "pattern": "^[0-9]{5}$"}, country=one_of("DE", "FR", "JP"))
    contact = {"anyOf": [NULL, obj(email={"type": "string", "format": "email", "maxLength": 20 + n})]}
    return obj(
        "id name address",
        id={"type": "string", "format": "uuid"},
        name=text(3 + n),
        age=whole(0, 130),
        address=address,
        contact=contact,
    )


def settings(n: int) -> Schema:
    level = one_of("debug", "info", "warning", "error")
    sections = {f"section_{i}": obj("level", level=level, port=whole(1, 65535), ratio=SMALL) for i in range(1 + n % 4)}
    return obj(next(iter(sections)), **sections, timeout={"type": ["integer", "null"], "minimum": 0, "maximum": 60 + n})


def tree(n: int) -> Schema:
    children = array({"$ref": "#/$defs/node"}, 0, 1 + n % 2)
    return {"$ref": "#/$defs/node", "$defs": {"node": obj("value", value=one_of(*range(2 + n)), children=children)}}


def review(n: int) -> Schema:
    aspects = {name: whole(1, 5) for name in ("taste", "price", "service", "noise", "place")[: 1 + n % 5]}
    return obj(
        "stars verdict", stars=whole(1, 5), verdict=one_of("good", "bad"), aspects=obj(**aspects), tags=array(text(4), 0, n % 4)
    )


def chart(n: int) -> Schema:
    series = obj(label=text(4), values=array({"type": "number", "exclusiveMinimum": 0, "maximum": 10 + n}, 1, 2))
    return obj(
        kind=one_of("bar", "line"),
        series=array(series, 1, 1 + n % 2),
        step={"type": "integer", "multipleOf": 1 + n, "minimum": 0, "maximum": 100},
    )


def scalar(n: int) -> Schema:
    forms = [whole(-n, n), one_of("a", 1, None, True), {"type": "string", "pattern": f"^(ab|c){{1,{n + 1}}}$"}, SMALL, BOOLEAN]
    forms += [DATE, {"type": "string", "format": "ipv4"}, {"type": ["string", "null"], "maxLength": n}, array(whole(), n % 3, 4)]
    return forms[n % len(forms)]


FAMILIES = (packages, openapi_parameter, github_event, invoice, geojson, tool_call, user, settings, tree, review, chart, scalar)
EACH = 18


def schemas() -> Iterator[tuple[str, Schema]]:
    """(name, schema), the families taking turns."""
    for n in range(EACH):
        for family in FAMILIES:
            yield f"{family.__name__} {n}", family(n)
