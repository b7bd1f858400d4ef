"""`LLM.get_metrics`: what /metrics shows, as Python objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from kernel_core.api import BuildContext, decode
from kernel_metrics.records import Sample
from kernel_metrics.series import SERIES, names

VECTOR = "position"  # series with this label are one vector


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """Only grows."""

    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    value: float


@dataclass(frozen=True, slots=True)
class Vector(Metric):
    """A counter for each position."""

    values: list[int]


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """`buckets`: how many values are at most the bound; that of "+Inf" is `count`."""

    sum: float
    count: int
    buckets: dict[str, int]


def fixed_labels(context: BuildContext) -> dict[str, str]:
    """The labels that every series has."""
    return {"model_name": context.section.model_name or context.config.model, "engine": "0"}


def verb(context: BuildContext) -> Callable[..., list[Metric]]:
    labels, compatible = fixed_labels(context), context.section.compatible_names

    def get_metrics(call: Callable[..., list[bytes]]) -> list[Metric]:
        """Everything that was counted since the start."""
        samples = decode(call("metrics.read")[0], list[Sample])
        return [made for sample in joined(samples) for made in metrics(sample, labels, compatible)]

    return get_metrics


def joined(samples: list[Sample]) -> list[Sample]:
    """Samples of the positions of one vector become one, with a count for each position."""
    made: list[Sample] = []
    for sample in samples:
        if VECTOR not in sample.labels:
            made.append(sample)
        elif made and made[-1].name == sample.name:
            made[-1].counts.append(int(sample.value))
        else:
            made.append(Sample(sample.name, counts=[int(sample.value)]))
    return made


def metrics(sample: Sample, labels: dict[str, str], compatible: bool) -> list[Metric]:
    series, labels = SERIES[sample.name], labels | sample.labels
    made: Callable[[str], Any]
    if series.buckets:
        bounds = [*map(str, series.buckets), "+Inf"]
        buckets = dict(zip(bounds, accumulate(sample.counts), strict=True))

        def made(name: str) -> Metric:
            return Histogram(name, labels, sample.value, buckets["+Inf"], buckets)

    elif sample.counts:

        def made(name: str) -> Metric:
            return Vector(name, labels, sample.counts)

    elif series.kind == "gauge":

        def made(name: str) -> Metric:
            return Gauge(name, labels, sample.value)

    else:

        def made(name: str) -> Metric:
            return Counter(name, labels, int(sample.value))

    return [made(name) for name in names(sample, compatible)]
