"""Put a pretrained model into the package: its card with the numbers that were measured, its files, their hashes.

    python pretraining/package.py OUT/default [--results benchmarks/results/default.json]

Prints the lines that go into ``src/stfm/weights/registry.toml`` as ``stfm weights hash`` prints them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

import stfm as sf

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ROOT / "src" / "stfm" / "weights" / "packaged" / "default"


#: of each part of the benchmark: what tells its scores apart, and which of them the card shows
SHOWN = {
    "domains": (("slide",), ("ARI", "NMI")),
    "expression": (("slide",), ("r", "share")),
    "retrieval": (("slide", "direction", "k"), ("recall",)),
    "annotation": (("slide", "labelled"), ("accuracy", "f1")),
}


def results(path: Path) -> dict[str, dict[str, float]]:
    """Return the scores of the default, zero-shot, from ``benchmarks/default.py``: protocol -> metric -> mean."""
    record = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[str, float]] = {}
    for part, (apart, shown) in SHOWN.items():
        scores = pd.DataFrame(record["parts"][part]["scores"])
        scores = scores[scores["row"] == "default, zero-shot"]
        for key, group in scores.groupby(list(apart), sort=False):
            name = ", ".join([part, *map(str, key)])
            found[name] = {metric: round(float(group[metric].mean()), 3) for metric in shown if metric in group}
    return found


def main() -> None:
    """Save the model with its card where the wheel takes it from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    model = sf.models.load(options.folder)
    card = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    measured = {} if options.results is None else results(options.results)
    model.about = sf.models.About("stfm default", "bsd-3-clause", card, measured)
    model.save(PACKAGED, dtype="fp16")
    print(f"saved {PACKAGED.relative_to(ROOT)}")  # noqa: T201 - what a script says


if __name__ == "__main__":
    main()
