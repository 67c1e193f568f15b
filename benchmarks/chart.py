"""
Draw docs/cpu.svg and docs/gpu.svg, the charts of the README, from the tables of decoding in RESULTS.md.

    pip install matplotlib
    python benchmarks/chart.py
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS, OTHERS = "#5b3fd1", "#9aa0ab"


def table(heading: str) -> list[dict[str, str]]:
    """The rows of the first table below a heading of RESULTS.md: what stands in each column."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    below = text.split(f"\n## {heading}\n")[1]
    lines = next(part for part in below.split("\n\n") if part.startswith("|")).splitlines()
    names, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(names, row)) for row in rows]


def cpu() -> dict[str, dict[str, float]]:
    """Tokens a second, by what stands above a part of the chart and by engine."""
    rows = table("Decoding on a CPU")
    engines = next(iter(rows[0]))
    return {
        f"tokens a second behind {context} tokens": {row[engines]: float(row[f"{context}: tokens/s"]) for row in rows}
        for context in ("512", "4,096")
    }


def gpu() -> dict[str, dict[str, float]]:
    """As `cpu`, for one row."""
    parts = {}
    for row in table("GPU"):
        rows, context = row["rows, behind"].replace(" tokens", "").split(", ")
        if rows == "1" and row["Qwen2 ms"] and context in ("2,048", "32,000"):
            columns = {"ours, int8 cache": "int8 cache", "ours": "ours ms", "Qwen2": "Qwen2 ms"}
            speeds = {name: 1000 / float(row[column]) for name, column in columns.items()}
            parts[f"tokens a second behind {context} tokens"] = speeds
    return parts


def draw(parts: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "qwen", "font.family": "sans-serif"})
    rows = max(map(len, parts.values()))
    figure, axes = plt.subplots(1, len(parts), figsize=(9, 0.8 + 0.32 * rows), sharey=True)
    for axis, (title, engines) in zip(axes, parts.items()):
        names = list(engines)[::-1]
        speeds = [engines[name] for name in names]
        bars = axis.barh(names, speeds, color=[OURS if name.startswith("ours") else OTHERS for name in names])
        axis.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(max(values.values()) for values in parts.values()) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    draw(cpu(), ROOT / "docs" / "cpu.svg")
    draw(gpu(), ROOT / "docs" / "gpu.svg")


if __name__ == "__main__":
    main()
