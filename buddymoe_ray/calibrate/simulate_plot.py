"""A simulation as a page: local hits by window, and tokens/s. One HTML file without script or network.

Knows numbers and names only. Neighbour: `charts` draws.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from buddymoe_ray.calibrate.charts import PALETTE, Axis, Point, Series, bar_chart, line_chart
from buddymoe_ray.calibrate.markup import element
from buddymoe_ray.calibrate.simulate import Cluster, Outcome
from buddymoe_ray.calibrate.workloads import Workload
from buddymoe_ray.errors import ConfigError

__all__ = ["write_plot"]


def write_plot(outcomes: Sequence[Outcome], cluster: Cluster, workload: Workload, path: Path, *, title: str) -> None:
    """Write the page atomically. Raises ConfigError when it cannot be written."""
    series = [
        Series(
            name=outcome.placement,
            colour=PALETTE[at],
            points=[
                Point(x=w + 1, y=100 * float(uses_R[0] / max(uses_R.sum(), 1e-300)))
                for w, uses_R in enumerate(outcome.uses_WR)
            ],
        )
        for at, outcome in enumerate(outcomes)
    ]
    speeds = [outcome.tokens_per_second(cluster, workload) for outcome in outcomes]
    body = [
        element("h1", title),
        line_chart(series, Axis(label="window"), Axis(label="uses answered locally, %"), title="Local hits by window"),
        bar_chart(speeds, [o.placement for o in outcomes], "placement", Axis(label="tokens/s"), title="Tokens/s"),
    ]
    head = element("head", element("meta", charset="utf-8"), element("title", title))
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(f"<!DOCTYPE html>\n{element('html', head, element('body', *body), lang='en')}\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"--plot {path} cannot be written ({error.strerror}), must be. hint: choose another file"
        ) from error
