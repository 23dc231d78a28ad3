"""A worker's metrics through ray: every node's own Prometheus endpoint then has them beside ray's.

Knows `metrics.METRICS` and ray's counters and gauges, not the engine. Invariant: what ray has counted is what the last
published snapshot says. Neighbours: `app` publishes at every health check.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from buddymoe_ray.observe import EngineSnapshot
from buddymoe_ray.serve.metrics import METRICS, Metric

__all__ = ["RayMetrics"]


class RayMetrics:
    """Publishes one worker's snapshots under the labels `model` and `replica`."""

    def __init__(self, *, model: str, replica: str) -> None:
        self._labels = {"model": model, "replica": replica}
        self._sinks = {metric.name: _sink(metric) for metric in METRICS}
        self._counted: dict[tuple[str, str], float] = {}

    def publish(self, snapshot: EngineSnapshot) -> None:
        """Set the gauges, and move the counters on by what was added since the last call."""
        for metric in METRICS:
            sink = self._sinks[metric.name]
            for value_of_label, value in metric.read(snapshot).items():
                tags = self._labels | ({metric.label: value_of_label} if metric.label else {})
                if isinstance(sink, Gauge):
                    sink.set(value, tags=tags)
                    continue
                key = (metric.name, value_of_label)
                added = value - self._counted.get(key, 0.0)
                if added > 0:  # ray refuses to add nothing
                    sink.inc(added, tags=tags)
                    self._counted[key] = value


def _sink(metric: Metric) -> Counter | Gauge:
    make = Counter if metric.kind == "counter" else Gauge
    labels = ("model", "replica", *([metric.label] if metric.label else []))
    return make(metric.name, description=metric.help, tag_keys=labels)
