"""The results as PNG, in one archive; nothing where matplotlib is missing."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

__all__ = ["write_plots"]


def write_plots(results: dict[str, Any], folder: Path) -> Path | None:
    """Draw what there is; returns the archive, or None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = [*_attention(results.get("attention", []), folder), *_steps(results.get("engine_steps", []), folder)]
    archive = folder / "plots.tar"
    with tarfile.open(archive, "w") as tar:
        for file in files:
            tar.add(file, arcname=file.name)
    return archive


def _attention(entries: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One picture per head layout: microseconds by tree and way."""
    import matplotlib.pyplot as plt

    files = []
    for heads in sorted({tuple(entry["heads"]) for entry in entries if "heads" in entry}):
        mine = [entry for entry in entries if tuple(entry.get("heads", ())) == heads]
        ways = ("floor_us", "plain_us", "flashinfer_cascade_us", "ours_one_level_us", "ours_us")
        figure, axes = plt.subplots(figsize=(1 + 0.8 * len(mine), 5))
        for i, way in enumerate(ways):
            places = [x + 0.16 * (i - 2) for x in range(len(mine))]
            axes.bar(places, [entry.get(way, 0) for entry in mine], width=0.16, label=way.removesuffix("_us"))
        axes.set_xticks(range(len(mine)), [entry["tree"] for entry in mine], rotation=60, ha="right", fontsize=7)
        axes.set(ylabel="microseconds a layer", yscale="log", title=f"{heads[0]} query / {heads[1]} KV heads")
        axes.legend()
        files.append(folder / f"attention_{heads[0]}_{heads[1]}.png")
        figure.savefig(files[-1], dpi=110, bbox_inches="tight")
        plt.close(figure)
    return files


def _steps(entries: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One picture per model: a decode step over its floor, by batch, a line per prefix and variant."""
    import matplotlib.pyplot as plt

    files = []
    measured = [entry for entry in entries if "over_floor" in entry]
    for model in sorted({entry["model"] for entry in measured}):
        figure, axes = plt.subplots(figsize=(7, 5))
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for entry in measured:
            if entry["model"] == model:
                lines.setdefault((entry["variant"], entry["prefix"]), []).append((entry["batch"], entry["over_floor"]))
        for (variant, prefix), points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{variant}, prefix {prefix}")
        axes.set(xlabel="batch", ylabel="decode step / floor", xscale="log", title=model)
        axes.legend(fontsize=7)
        files.append(folder / f"steps_{model}.png")
        figure.savefig(files[-1], dpi=110, bbox_inches="tight")
        plt.close(figure)
    return files
