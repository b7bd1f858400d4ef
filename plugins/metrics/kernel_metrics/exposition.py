"""Samples as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from kernel_metrics.records import Sample
from kernel_metrics.series import SERIES, names


class Samples(Collector):
    """One scrape."""

    def __init__(self, samples: list[Sample], labels: dict[str, str], compatible: bool) -> None:
        self._samples, self._labels, self._compatible = samples, labels, compatible

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for sample in self._samples:
            for name in names(sample, self._compatible):
                family = families.get(name) or families.setdefault(name, self._family(name, sample))
                add(family, sample, [*self._labels.values(), *sample.labels.values()])
        yield from families.values()

    def _family(self, name: str, sample: Sample) -> Metric:
        series, labels = SERIES[sample.name], [*self._labels, *sample.labels]
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        return kinds[series.kind](name, series.help, labels=labels)


def add(family: Metric, sample: Sample, labels: list[str]) -> None:
    if isinstance(family, HistogramMetricFamily):
        bounds = [*map(str, SERIES[sample.name].buckets), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(sample.counts), strict=True)), sample.value)
    elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
        family.add_metric(labels, sample.value)


def text(samples: list[Sample], labels: dict[str, str], compatible: bool) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Samples(samples, labels, compatible))
    return generate_latest(registry)
