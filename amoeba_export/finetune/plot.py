"""The loss curves of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amoeba_export.ir import Progress


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path, *, progress: Progress) -> None:
    """Draw cross-entropy on labels over steps: the first subnet, the last, and those between as points.

    Without matplotlib (extra `report`) nothing is drawn, and said so: the numbers are in the log.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        progress.note("No loss plot: it needs matplotlib (pip install 'amoeba-export[report]').")
        return
    curves: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for record in records:
        subnets = record["subnets"]
        ends = {subnets[0]["shape"], subnets[-1]["shape"]}
        for subnet in subnets:
            steps, losses = curves[subnet["shape"] if subnet["shape"] in ends else "between"]
            steps.append(record["step"])
            losses.append(subnet["cross_entropy"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (steps, losses) in curves.items():
        style = {"linestyle": "none", "marker": ".", "alpha": 0.4} if name == "between" else {"linewidth": 1.5}
        axes.plot(steps, losses, label=name, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy on labels (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
