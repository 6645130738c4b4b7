"""How long ``import stfm`` takes in a fresh process, and what it loads.

python benchmarks/import_time.py [--runs 7] [--limit 0.3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

SNIPPET = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
heavy = ("torch", "lightning", "squidpy", "spatialdata", "sklearn", "matplotlib.pyplot", "scanpy", "numba", "anndata")
sys.stdout.write(json.dumps({{"seconds": seconds, "heavy": [name for name in heavy if name in sys.modules]}}))
"""
MODULES = ("stfm", "numpy", "pooch", "anndata", "torch", "scanpy")


def once(module: str) -> dict:
    """Import a module in a process of its own."""
    command = [sys.executable, "-c", SNIPPET.format(module=module)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=0.3, help="seconds; a slower median is an error")
    parser.add_argument("--others", action="store_true", help="also time what stfm does not load")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows = {}
    for module in MODULES if options.others else MODULES[:1]:
        runs = [once(module) for _ in range(options.runs)]
        seconds = [run["seconds"] for run in runs]
        rows[module] = {
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "heavy": runs[-1]["heavy"],
        }
        row = rows[module]
        print(f"import {module:8s} {row['median_s']:.3f} s (min {row['min_s']:.3f}, max {row['max_s']:.3f})")
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
        options.json.write_text(json.dumps({"runs": options.runs, **machine, "rows": rows}, indent=2) + "\n")
    own = rows["stfm"]
    if own["heavy"]:
        print(f"import stfm loads {', '.join(own['heavy'])}", file=sys.stderr)
        return 1
    if own["median_s"] > options.limit:
        print(f"import stfm takes {own['median_s']:.3f} s, more than {options.limit} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
