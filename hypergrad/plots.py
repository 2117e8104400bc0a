"""Pictures; matplotlib is imported when one is drawn."""

from pathlib import Path

import numpy as np
from jaxtyping import PyTree

COLORS = {
    "baseline": "#7f7f7f",
    "random search": "#8c564b",
    "implicit": "#1f77b4",
    "neumann": "#2ca02c",
    "unrolled": "#ff7f0e",
}


def _figure(columns: int):
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib: pip install 'hypergrad-jax[cli]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5 * columns, 3.6), layout="constrained")


def cleaning(results: dict[str, PyTree], path: Path) -> None:
    """Learned weights of clean and wrong examples; validation loss against cost.

    Args:
      results: a study's ``{method: results}``, leaves lead with the seeds.
      path: of the PNG.
    """
    figure, (left, right) = _figure(2)
    learned = {name: r for name, r in results.items() if "curve_value" in r}
    shown = next((n for n in ("implicit", *learned) if n in learned), None)
    if shown is not None:
        result = learned[shown]
        bins = np.linspace(0, 1, 41)
        for wrong, label, color in (
            (False, "clean label", "#1f77b4"),
            (True, "wrong label", "#d62728"),
        ):
            weights = result["alpha"][result["wrong"] == wrong]
            left.hist(weights, bins, alpha=0.6, label=label, color=color, density=True)
        left.set(
            xlabel="learned weight", ylabel="density", title=f"Example weights, {shown}"
        )
        left.legend(frameon=False)
    for name, result in learned.items():
        value, cost = result["curve_value"], result["curve_cost"]
        if name == "random search":
            value = np.minimum.accumulate(value, axis=1)
        low, middle, high = np.percentile(value, [25, 50, 75], axis=0)
        at = np.median(cost, axis=0)
        color = COLORS.get(name)
        right.plot(at, middle, label=name, color=color)
        right.fill_between(at, low, high, alpha=0.2, color=color, linewidth=0)
    right.set(
        xlabel="gradient-equivalents",
        ylabel="validation loss",
        yscale="log",
        title="Median and quartiles over seeds",
    )
    if learned:
        right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    from matplotlib import pyplot

    pyplot.close(figure)
