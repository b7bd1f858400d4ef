"""What a run of requests says: rates, percentiles, goodput; as data and as an SVG picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from kernel_bench.sending import Answered

PERCENTILES = (50, 90, 95, 99)
GOALS = ("ttft", "tpot", "e2e")
WIDTH, HEIGHT, PAD = 380, 230, 44


def latencies(answered: Answered) -> dict[str, float]:
    """Seconds: ttft, e2e, and tpot where there is more than one token."""
    found = {"ttft": answered.pieces[0] - answered.sent, "e2e": answered.ended - answered.sent}
    if answered.output_tokens > 1:
        found["tpot"] = (answered.pieces[-1] - answered.pieces[0]) / (answered.output_tokens - 1)
    return found


def series(good: Sequence[Answered]) -> dict[str, np.ndarray]:
    """All values of ttft, tpot, itl (between two pieces of a stream) and e2e, in seconds."""
    each = [latencies(answered) for answered in good]
    found = {name: np.array([one[name] for one in each if name in one]) for name in GOALS}
    gaps = [later - earlier for answered in good for earlier, later in pairwise(answered.pieces)]
    return {"ttft": found["ttft"], "tpot": found["tpot"], "itl": np.array(gaps), "e2e": found["e2e"]}


def report(answers: Sequence[Answered], goals: Mapping[str, float]) -> dict[str, Any]:
    """`goals`: the most seconds of ttft, tpot or e2e; requests that keep all count for the goodput."""
    good = [answered for answered in answers if answered.error is None]
    seconds = max((answered.ended for answered in answers), default=0.0)
    prompt, output = (sum(getattr(answered, name) for answered in good) for name in ("prompt_tokens", "output_tokens"))
    kept = [a for a in good if all(latencies(a).get(name, 0.0) <= limit for name, limit in goals.items())]
    errors = sorted({answered.error for answered in answers if answered.error})
    made = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "seconds": round(seconds, 3),
        "requests_per_s": _rate(len(good), seconds),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "output_tokens_per_s": _rate(output, seconds),
        "total_tokens_per_s": _rate(prompt + output, seconds),
        "latency_ms": {name: summary(values) for name, values in series(good).items()},
        "client_late_ms": summary(np.array([answered.late for answered in answers])),
    }
    if goals:
        made["goodput"] = {"goals_s": dict(goals), "share": round(len(kept) / max(len(answers), 1), 4)}
        made["goodput"]["requests_per_s"] = _rate(len(kept), seconds)
    return made | ({"errors": errors[:5]} if errors else {})


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2) if seconds else 0.0


def summary(seconds: np.ndarray) -> dict[str, float]:
    """Mean and percentiles in milliseconds; empty without values."""
    if not len(seconds):
        return {}
    found = {"mean": float(seconds.mean())}
    found |= {f"p{p}": float(np.percentile(seconds, p)) for p in PERCENTILES}
    return {name: round(value * 1000, 2) for name, value in found.items()}


# ---- the picture


def picture(answers: Sequence[Answered], title: str) -> str:
    """An SVG file: distributions of the latencies, and tokens a second over the run."""
    good = [answered for answered in answers if answered.error is None]
    values = series(good)
    names = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "whole request"}
    panels = [_distribution(values[name], words, place) for place, (name, words) in enumerate(names.items())]
    panels.append(_throughput(good, 3))
    style = (
        "text{font:12px system-ui,sans-serif;fill:#445}.t{font-weight:600;fill:#123}.l{fill:none;stroke:#2f6feb;stroke-width:2}"
    )
    style += ".g{stroke:#dde2ea}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {2 * HEIGHT + 30}"><style>{style}</style>'
    ground = f'<rect width="100%" height="100%" fill="#fff"/><text class="t" x="{PAD}" y="20">{escape(title)}</text>'
    return head + ground + "".join(panels) + "</svg>\n"


def _distribution(seconds: np.ndarray, title: str, place: int) -> str:
    """How many per cent took at most so long."""
    ordered = np.sort(seconds) * 1000
    shares = np.arange(1, len(ordered) + 1) / max(len(ordered), 1) * 100
    return _panel(place, f"{title}: per cent of requests", ordered, shares, "ms", 100.0)


def _throughput(good: Sequence[Answered], place: int) -> str:
    times = np.array([t for answered in good for t in answered.pieces])
    length = float(times.max()) if len(times) else 1.0
    counts, edges = np.histogram(times, bins=min(60, max(1, int(length * 4))), range=(0, length))
    middle = (edges[:-1] + edges[1:]) / 2
    return _panel(
        place, "pieces of answers a second", middle, counts / np.diff(edges), "s", float(counts.max()) / (edges[1] - edges[0])
    )


def _panel(place: int, title: str, x: np.ndarray, y: np.ndarray, unit: str, top: float) -> str:
    left, up = (place % 2) * WIDTH, (place // 2) * HEIGHT + 30
    right, top = axis_end(float(x.max()) if len(x) else 1.0), axis_end(top)
    wide, high = WIDTH - PAD - 16, HEIGHT - 60

    def at(a: float, b: float) -> str:
        return f"{PAD + wide * a / (right or 1):.1f},{30 + high * (1 - b / (top or 1)):.1f}"

    points = " ".join(at(float(a), float(b)) for a, b in zip(x, y, strict=True))
    grid = "".join(_tick(k / 4, top, right, wide, high) for k in range(5))
    line = f'<polyline class="l" points="{points}"/>' if len(x) else ""
    head = f'<text class="t" x="{PAD}" y="16">{escape(title)} <tspan fill="#889">({unit})</tspan></text>'
    return f'<g transform="translate({left},{up})">{head}{grid}{line}</g>'


def axis_end(value: float) -> float:
    """The smallest number that is not below and whose quarters are round."""
    unit = 10.0 ** np.floor(np.log10(max(value, 1e-9) / 4))
    return next(float(4 * step * unit) for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if 4 * step * unit >= value * (1 - 1e-9))


def _tick(share: float, top: float, right: float, wide: int, high: int) -> str:
    """A line and the numbers of both axes."""
    x, y = PAD + wide * share, 30 + high * (1 - share)
    line = f'<line class="g" x1="{PAD}" x2="{PAD + wide}" y1="{y:.1f}" y2="{y:.1f}"/>'
    vertical = f'<text x="{PAD - 6}" y="{y + 4:.1f}" text-anchor="end">{top * share:g}</text>'
    horizontal = f'<text x="{x:.1f}" y="{46 + high}" text-anchor="middle">{right * share:g}</text>'
    return line + vertical + horizontal
