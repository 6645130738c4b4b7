"""What every benchmark shares: the record of the run, times in turns, peak memory, a JSON with a table beside it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

#: columns that tell the lines of a table apart
KEYS = ("protocol", "mode", "section", "slide", "source", "target", "row", "seed", "k")
PACKAGES = ("stfm", "numpy", "scipy", "numba", "torch", "anndata", "scanpy", "scikit-learn", "squidpy", "spatialdata")


def run_record(seed: int | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return when, where, with which versions and at which commit a benchmark ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "seed": seed,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        text = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return text.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def best_of(calls: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Return the least seconds of each call; they take turns, so that a busy machine slows all alike."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


# VmHWM begins anew with a process; ru_maxrss, which other systems have, may carry that of the parent
_PEAK = """
import sys as _s
from pathlib import Path as _P
def peak_mb():
    if _P("/proc/self/status").exists():
        return next(int(l.split()[1]) / 1024 for l in _P("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if _s.platform == "darwin" else 1024)
"""
_TELL = "\n_s.stderr.write(f'\\nPEAK {peak_mb()}')"


def in_new_process(script: str, *args: str) -> dict[str, Any]:
    """Run Python code in a process of its own; it writes one line of JSON, to which peak memory in MB is added.

    The code finds its arguments in ``sys.argv[1:]`` and may call ``peak_mb()``.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PEAK + script + _TELL, *args], capture_output=True, text=True, check=False
    )
    if done.returncode:
        message = f"the measured process failed:\n{done.stderr[-2000:]}"
        raise RuntimeError(message)
    lines = done.stdout.strip().splitlines()
    return {**(json.loads(lines[-1]) if lines else {}), "peak_mb": float(done.stderr.rpartition("PEAK ")[2])}


def joined(scores: pd.DataFrame, folders: Sequence[Path], name: str) -> pd.DataFrame:
    """Return the scores of a run beside those of others, so that rows, protocols and seeds may run at different times.

    Each line carries the commit and the day of the run that measured it.

    Parameters
    ----------
    scores
        Of this run; may be empty.
    folders
        Where tables of the same name were written, the latest last: what was run again takes the place of what was
        there.
    name
        Of the table.
    """
    earlier = [json.loads((folder / f"{name}.json").read_text("utf-8")) for folder in folders]
    parts = [_dated(pd.DataFrame(one["scores"]), one["run"]) for one in earlier]
    whole = pd.concat([*parts, _dated(scores, run_record())], ignore_index=True)
    keys = [key for key in KEYS if key in whole]
    return whole[keys].drop_duplicates().merge(whole.drop_duplicates(keys, keep="last"), on=keys)  # order of the first


def _dated(scores: pd.DataFrame, run: Mapping[str, Any]) -> pd.DataFrame:
    """Return lines with the commit and the day of their run, where they do not carry those of an earlier one."""
    if scores.empty:
        return scores
    dated = scores.copy()
    for key, value in (("commit", str(run["commit"])), ("day", run["date"].split()[0])):
        dated[key] = dated[key].fillna(value) if key in dated else value
    return dated


def _measured(scores: Sequence[Mapping[str, Any]], here: str) -> str:
    """Return at which commits the lines of a table were measured; nothing where that is where it was written."""
    found = sorted({(line["day"], line["commit"][:8]) for line in scores if "commit" in line})
    if all(here.startswith(commit) for _, commit in found):
        return ""
    return "\n\nLines were measured at " + ", ".join(f"{commit} ({day})" for day, commit in found) + "."


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def write(stem: str | Path, result: Mapping[str, Any], text: str, *, seed: int | None = None) -> Path:
    """Write ``<stem>.json`` (the result and the record of the run) and ``<stem>.md`` (its tables); return the first."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    run = run_record(seed)
    path = stem.with_suffix(".json")
    path.write_text(json.dumps({"benchmark": stem.name, "run": run, **result}, indent=1, default=float) + "\n", "utf-8")
    machine = run["machine"]
    head = f"{run['date']}, commit {str(run['commit'])[:8]}, {machine['processor']}, {machine['cores']} cores"
    head += _measured(result.get("scores", ()), str(run["commit"]))
    stem.with_suffix(".md").write_text(f"# {stem.name}\n\n{head}\n\n{text}\n", "utf-8")
    return path
