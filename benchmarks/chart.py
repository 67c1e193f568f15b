"""
Draw docs/cpu.svg, the chart of the README, from the table of decoding on a CPU in RESULTS.md.

    pip install matplotlib
    python benchmarks/chart.py
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS, OTHERS = "#5b3fd1", "#9aa0ab"


def decoding() -> dict[str, list[float]]:
    """Tokens a second behind 512 and 4,096 tokens for each engine: the first table under `## Decoding on a CPU`."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.split("## Decoding on a CPU")[1].split("\n\n")[2].splitlines()]
    names = [cell.strip() for cell in rows[0]]
    columns = [names.index(f"{context}: tokens/s") for context in ("512", "4,096")]
    return {row[0].strip(): [float(row[i]) for i in columns] for row in rows[2:]}


def main() -> None:
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "qwen", "font.family": "sans-serif"})
    engines = decoding()
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True)
    for axis, i, context in zip(axes, (0, 1), ("512", "4,096")):
        names = list(engines)[::-1]
        speeds = [engines[name][i] for name in names]
        bars = axis.barh(names, speeds, color=[OURS if name.startswith("ours") else OTHERS for name in names])
        axis.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=3)
        axis.set_title(f"tokens a second behind {context} tokens", fontsize=10)
        axis.set_xlim(0, max(max(values) for values in engines.values()) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "cpu.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
