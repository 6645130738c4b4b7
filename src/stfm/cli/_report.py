"""What the demo found: a table on the screen, ``report.md`` and ``report.json`` on disk."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from stfm._version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


@dataclass(frozen=True)
class Row:
    """One method and what it reached; ``ours`` marks the rows of the trained model."""

    method: str
    value: float
    ours: bool = False


@dataclass
class Report:
    """Everything that a run of the demo says.

    Parameters
    ----------
    dataset
        What was asked for.
    seed
        Seed of the run.
    tissue
        What was trained on and what was held out, in words.
    domains
        ARI of every method against the known domains; empty where none are known.
    expression
        Mean Pearson r of every method over ``genes``.
    genes
        Genes that were predicted.
    ceiling
        Mean noise ceiling of these genes on the held-out tissue.
    seconds
        Time of every step.
    """

    dataset: str
    seed: int
    tissue: str
    domains: list[Row] = field(default_factory=list)
    expression: list[Row] = field(default_factory=list)
    genes: list[str] = field(default_factory=list)
    ceiling: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)

    def sections(self) -> list[tuple[str, str, list[Row]]]:
        """Return title, explanation and rows of each table that has rows."""
        domains = "ARI against the known domains of the held-out tissue; 1 is perfect, 0 is chance."
        share = "" if self.ceiling != self.ceiling else f" Counting noise allows {self.ceiling:.3f} at most."
        expression = f"Pearson r over the spots of the held-out tissue, mean of {len(self.genes)} genes.{share}"
        tables = [("Spatial domains", domains, self.domains), ("Expression from H&E", expression, self.expression)]
        return [(title, text, rows) for title, text, rows in tables if rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, with the versions and the machine."""
        packages = {name: version(name) for name in ("torch", "numpy", "scanpy", "anndata")}
        machine = {
            "system": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        verdicts = {title: verdict(rows) for title, _, rows in self.sections()}
        return {"stfm": __version__, **asdict(self), "verdicts": verdicts, "machine": machine, "packages": packages}


def verdict(rows: list[Row]) -> str:
    """Say in one sentence whether the model or a baseline came out ahead."""
    ours = max((row for row in rows if row.ours), key=lambda row: row.value)
    others = [row for row in rows if not row.ours]
    if not others:
        return f"{ours.method} reaches {ours.value:.3f}."
    best = max(others, key=lambda row: row.value)
    if ours.value > best.value:
        return f"{ours.method} ({ours.value:.3f}) is ahead of the best baseline, {best.method} ({best.value:.3f})."
    return f"The baseline {best.method} ({best.value:.3f}) is not beaten here: {ours.method} reaches {ours.value:.3f}."


def show(report: Report, console: Console) -> None:
    """Print the tables and the verdicts."""
    from rich.table import Table

    for title, text, rows in report.sections():
        table = Table(title=title, title_justify="left", caption=text, caption_justify="left")
        table.add_column("method")
        table.add_column("ARI" if title == "Spatial domains" else "mean r", justify="right")
        for row in rows:
            table.add_row(row.method, f"{row.value:.3f}", style="bold" if row.ours else "")
        console.print(table)
        console.print(verdict(rows), markup=False, highlight=False)
        console.print()


def write(report: Report, folder: Path, figures: dict[str, str]) -> None:
    """Write ``report.json`` and ``report.md`` beside the figures (file name -> caption)."""
    text = json.dumps(report.to_dict(), indent=2, default=float) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    lines = [
        f"# stfm demo: {report.dataset}",
        "",
        f"{report.tissue} Seed {report.seed}, stfm {__version__}.",
        "",
    ]
    for title, text, rows in report.sections():
        lines += [f"## {title}", "", text, "", "| method | value |", "|---|---|"]
        lines += [f"| {'**' + row.method + '**' if row.ours else row.method} | {row.value:.3f} |" for row in rows]
        lines += ["", verdict(rows), ""]
    lines += ["## Figures", ""]
    for name, caption in figures.items():
        lines += [f"![{caption}]({name})", "", caption, ""]
    lines += ["## Time", "", "| step | s |", "|---|---|"]
    lines += [f"| {step} | {seconds:.1f} |" for step, seconds in report.seconds.items()]
    lines += ["", "One seed and one tissue show that everything runs; they rank no methods (`benchmarks/` does).", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
