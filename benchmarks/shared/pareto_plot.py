"""The figure of the table `pareto`."""

from pathlib import Path

import numpy as np

from .plots import add_grid, make_panels, palette


def fronts(
    fronts: dict[str, dict[str, list[tuple[list[float], list[float]]]]],
    volumes: dict[str, dict[str, list[float]]],
    dashed: tuple[str, ...],
    reference: tuple[float, float],
    path: Path,
) -> None:
    """Plots median errors at each fraction of a cost, and hypervolumes.

    Args:
      fronts: ``{cost: {method: runs}}``; a run is (rising fractions, errors) of a seed.
      volumes: ``{cost: {method: hypervolume per seed}}``.
      dashed: Methods that are drawn with dashed lines.
      reference: Largest error and fraction.
      path: File of the figure.
    """
    figure, axes = make_panels(2, len(fronts), (14, 7), height_ratios=(2.2, 1))
    max_error, max_fraction = reference
    at = np.geomspace(0.01, max_fraction, 200)
    colors = palette("tab10")
    for (top, bottom), (cost, methods) in zip(axes.T, fronts.items(), strict=True):
        for i, (name, runs) in enumerate(methods.items()):
            errors = [
                np.r_[np.nan, error][np.searchsorted(fraction, at, side="right")]
                for fraction, error in runs
            ]
            style = "--" if name in dashed else "-"
            middle = np.median(np.where(np.isnan(errors), 1.0, errors), axis=0)
            top.step(at, middle, style, where="post", color=colors[i], label=name)
            values = volumes[cost][name]
            height = i + np.linspace(-0.2, 0.2, len(values))
            bottom.plot(values, height, "o", ms=4, color=colors[i], alpha=0.6)
            bottom.plot(
                [np.median(values)] * 2, [i - 0.35, i + 0.35], color="k", lw=1.5
            )
        top.set_xscale("log")
        top.set_yscale("log")
        top.set_ylim(0.045, max_error)
        top.set_title(f"error against {cost}")
        top.set_xlabel(f"fraction of the {cost}")
        top.set_yticks([0.05, 0.1, 0.2, 0.5], ["5%", "10%", "20%", "50%"])
        top.set_xlim(at[0], max_fraction)
        top.set_xticks(
            [0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["1%", "2%", "5%", "10%", "20%", "50%"]
        )
        top.minorticks_off()
        bottom.set_yticks(range(len(methods)), methods if bottom is axes[1, 0] else [])
        bottom.locator_params(axis="x", nbins=5)
        bottom.invert_yaxis()
        bottom.set_xlabel("hypervolume on test, a dot a seed")
        add_grid(top)
        add_grid(bottom)
    axes[0, 0].set_ylabel("test error, median of seeds")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("Networks picked on validation; dashed: searches without gradients")
    figure.savefig(path, dpi=120)
