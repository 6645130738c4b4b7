"""What training both STORM systems costs, for each size: share of a step, tokens a second, memory of attention.

python benchmarks/storm_throughput.py [--models storm-tiny ...] [--parts steps windows sites cuda] [--out ...]

* steps: time of forward + backward (all losses of the stage) on batches that lie ready, over the time of a whole step
  of ``fit``, which ``tl.train`` calls: what of reading and augmentation is not hidden behind it, Lightning, clipping,
  optimiser, schedules, journal. Goal: 0.85. Features of frozen image encoders are computed before the first step, in
  training as here. The optimiser (clipping, AdamW, gradients let go) and the reading of a batch (by the reader thread,
  beside the step) are timed apart as well. A token is a spot or an image patch in one modality, shown or hidden,
  without padding; tokens a second are those of the whole step.
* windows: peak memory of forward + backward of the encoder, its biases included, as the number of windows (of tiles)
  grows, in a fresh process each. Goal: linear; memory a window at 8x over that at 1x within 0.9 to 1.1.
* sites: the same as a window grows from 9 to 49 spots.
* cuda: all of it in bf16 with the peak memory of the device; skipped where there is none.

A model whose step takes more than two minutes on a CPU is left out of ``steps``; a small batch in a process of its own
tells how long it would take.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Idle threads that spin would take the cores from the reader thread; memory that is freed goes back at once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import numpy as np
import torch
from _common import in_new_process, table, write
from _steps import EPOCHS, Steps, clock, step_share
from _storm_memory import memory, n_parameters

import stfm as sf
from stfm.models.inputs import SlideInputs
from stfm.models.registry import create
from stfm.training.genes import make_vocabulary
from stfm.training.recipes import recipe_for

GOAL = 0.85
STRAIGHT = (0.9, 1.1)
#: seconds of a step above which a model is not trained here
LIMIT_S = 120.0
TIMES = (1, 2, 4, 8)
SITES = (9, 25, 49)
#: model -> spots of each of the two slides that it is trained on, and windows (tiles) at 1x
SIZES = {
    "storm-tiny": (600, 256),
    "storm-small": (600, 128),
    "storm-base": (600, 128),
    "storm": (600, 4),
    "storm-multibranch-small": (600, 128),
    "storm-multibranch-base": (64, 8),
    "storm-multibranch": (64, 1),
}
#: full size -> what is changed to find out on a CPU how long a row of its batch takes
FULL = {"storm": {"window": 2, "n_visible": 1}, "storm-multibranch": {"window": 16}}
#: full size -> what is changed in its configuration and recipe on a GPU; both have published batches for many of these
ON_GPU: dict[str, dict[str, Any]] = {
    "storm": {"batch_size": 16},
    "storm-multibranch": {"config": {"window": 16, "checkpointing": True}, "batch_size": 16},
}
#: gigabytes of weights and gradients above which the memory of attention is measured on a device alone
_MAX_GB = 3.0
PARTS = ("steps", "windows", "sites", "cuda")

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import storm_throughput
print(json.dumps(getattr(storm_throughput, sys.argv[2])(*json.loads(sys.argv[3]))))
"""


def apart(function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Return what a function of this file returns in a fresh process."""
    return in_new_process(CHILD, str(Path(__file__).resolve().parent), function.__name__, json.dumps(args))


def toy(spots: int) -> list[Any]:
    """Two slides of toy tissue with 1,000 genes."""
    return sf.slide.as_slides(sf.datasets.toy(n_spots=spots, n_patients=2, n_genes=1000))


def tokens(steps: Steps) -> float:
    """Tokens of a batch: spots and image patches that are there, in each modality, shown or hidden."""
    total = 0
    for batch in steps.batches:
        if steps.model.family == "storm":
            total += 2 * int((batch.window >= 0).sum())
        else:
            tissue = steps.model.read(batch)
            patches = len(batch) * len(steps.model.centres)
            total += patches + (patches if steps.model.config.expression == "bins" else int(tissue.present.sum()))
    return total / len(steps.batches)


def step_rows(name: str, runs: int, spots: int | None, device: str) -> list[dict[str, Any]]:
    """Measure both stages of a model; of one that is too slow, say so."""
    if device == "cpu" and name in FULL:
        found = apart(seconds_of_step, name)
        if found["step_s"] > LIMIT_S:
            why = f"forward + backward of a batch of {found['batch_size']} takes {found['step_s']:,.0f} s here at least"
            print(name, why, flush=True)
            return [{"model": name, "skipped": why, **found}]
    slides = toy(spots or SIZES[name][0])
    rows = []
    for stage in ("mask", "align"):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = Steps(name, slides, stage=stage, device=device, **(ON_GPU.get(name, {}) if device == "cuda" else {}))
        found = step_share(steps, runs)
        n, spots_a_batch = tokens(steps), sum(len(batch) for batch in steps.batches) / len(steps.batches)
        row = {
            "model": name,
            "stage": stage,
            "parameters": steps.model.n_parameters,
            **found,
            "spots_per_s": 1e3 * spots_a_batch / found["step_ms"],
            "tokens": n,
            "tokens_per_s": 1e3 * n / found["step_ms"],
            "load": os.getloadavg()[0],
        }
        if device == "cuda":
            row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def seconds_of_step(name: str) -> dict[str, Any]:
    """Estimate the seconds of forward + backward of a whole batch of a full size, from two of its windows."""
    slides = toy(60)[:1]
    model = create(name, make_vocabulary(slides), pretrained=False, **FULL[name])
    model.stage = "mask"
    batch = SlideInputs(slides[0], model.inputs, model.vocabulary).batch(np.arange(2))
    model.train()
    seconds = float(clock(lambda: model.losses(batch)["loss"].backward())[0])
    # A batch of windows has a tile for each of its windows at least.
    n_tiles, batch_size = batch.n_rows if name == "storm" else len(batch), recipe_for(name).batch_size
    return {"batch_size": batch_size, "parameters": model.n_parameters, "tiles": n_tiles, "seconds": seconds,
            "step_s": seconds * batch_size / n_tiles}  # fmt: skip


def memory_rows(name: str, counts: list[tuple[int, int | None]], device: str) -> dict[str, Any]:
    """Measure a model at several numbers of windows, or sizes of them, each in a fresh process."""
    if device == "cpu" and (gb := 8e-9 * n_parameters(name)) > _MAX_GB:
        return {"model": name, "skipped": f"{gb:.1f} GB of weights and gradients alone; measured on a GPU"}
    rows = [{"windows": n, "sites": sites, **apart(memory, name, n, sites, device)} for n, sites in counts]
    per_window = [row["mb"] / row["windows"] for row in rows]
    print(name, [round(mb, 3) for mb in per_window], "MB a window", flush=True)
    return {"model": name, "rows": rows, "mb_a_window": per_window, "ratio": per_window[-1] / per_window[0]}


def growth(part: str, names: list[str], times: list[int], device: str) -> list[dict[str, Any]]:
    """Measure how memory grows with the number of windows, or with the spots in them."""
    rows = []
    for name in names:
        base = SIZES[name][1]
        if part == "windows":
            rows.append(memory_rows(name, [(t * base, None) for t in times], device))
        elif name != "storm-multibranch":  # whose bins fill a tile in any window
            rows.append(memory_rows(name, [(base, sites) for sites in SITES], device))
    return rows


def step_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of shares, and why some sizes are not in it."""
    head = ["model", "stage", "parameters", "batch", "forward + backward ms", "optimiser ms", "reading ms", "step ms"]
    head += ["share", "of CPU time", "share, optimiser apart", "goal reached", "spots/s", "tokens/s", "load"]
    cells = [
        [
            r["model"], r["stage"], f"{r['parameters']:,}", r["batch_size"], r["bare_ms"], r["optimiser_ms"],
            r["reading_ms"], r["step_ms"], r["share"], r["share_of_cpu"], r["share_with_optimiser"],
            bool(r["share"] >= GOAL), f"{r['spots_per_s']:,.0f}", f"{r['tokens_per_s']:,.0f}", r["load"],
        ]
        for r in rows if "skipped" not in r
    ]  # fmt: skip
    return "\n\n".join([table(head, cells), *left_out(rows)])


def memory_table(part: str, rows: list[dict[str, Any]], times: list[int]) -> str:
    """Return the table of memory a window, and why some sizes are not in it."""
    if part == "windows":
        head = ["model", "windows at 1×", *(f"MB a window at {t}×" for t in times), f"{times[-1]}× / 1×", "linear"]
    else:
        head = ["model", "windows", *(f"MB a window of {s}" for s in SITES), f"{SITES[-1]} / {SITES[0]}"]
    cells = []
    for r in rows:
        if "skipped" not in r:
            straight = [bool(STRAIGHT[0] <= r["ratio"] <= STRAIGHT[1])] if part == "windows" else []
            cells.append([r["model"], r["rows"][0]["windows"], *r["mb_a_window"], r["ratio"], *straight])
    return "\n\n".join([table(head, cells), *left_out(rows)])


def left_out(rows: list[dict[str, Any]]) -> list[str]:
    """Return a list of the sizes that were left out."""
    lines = [f"- `{r['model']}` was left out: {r['skipped']}." for r in rows if "skipped" in r]
    return ["\n".join(lines)] if lines else []


def report(result: dict[str, Any], times: list[int]) -> str:
    """Return all tables."""
    measured = [[part, *found.values()] for part, found in result["measured"].items()]
    blocks = [
        f"{result['threads']} threads; toy tissue, 1,000 genes; the fastest of {result['runs'] * EPOCHS} times of each "
        "batch counts. The load of the machine, in processes that want a core, while it was measured:",
        table(["part", "began", "load at the start", "load at the end"], measured),
        f"## A step of `fit` beside forward + backward on batches that lie ready (goal: a share of {GOAL})",
        "A step has all that `tl.train` does: reading (in a thread beside it), Lightning, clipping, optimiser, "
        "schedules, journal. Features of frozen encoders are computed before the first step. A token is a spot or an "
        "image patch in one modality, shown or hidden. `share` is forward + backward over the step, `share, optimiser "
        "apart` has the optimiser on both sides.",
        step_table(result["steps"]),
        "## Peak memory of forward + backward of the encoder as the number of windows grows",
        "Weights and gradients are not in it; each number is of a fresh process. A window of `storm` has 25 spots in "
        "two modalities, a tile of `storm-multibranch` its image patches and one spot.",
        memory_table("windows", result["windows"], times),
        "## The same as a window grows",
        memory_table("sites", result["sites"], times),
        "## On a GPU, in bf16",
    ]
    gpu = result["cuda"]
    if "skipped" in gpu:
        return "\n\n".join([*blocks, f"Not measured: {gpu['skipped']}."])
    peaks = [[r["model"], r["stage"], r["peak_mb"]] for r in gpu["steps"]]
    blocks += [gpu["name"], step_table(gpu["steps"]), table(["model", "stage", "peak memory of the run, MB"], peaks)]
    return "\n\n".join([*blocks, *(memory_table(part, gpu[part], times) for part in ("windows", "sites"))])


def on_gpu(names: list[str], runs: int, spots: int | None, times: list[int]) -> dict[str, Any]:
    """Measure all of it on a GPU, or say that there is none."""
    if not torch.cuda.is_available():
        return {"skipped": "this machine has no CUDA device"}
    return {
        "name": torch.cuda.get_device_name(),
        "steps": [row for name in names for row in step_rows(name, runs, spots, "cuda")],
        **{part: growth(part, names, times, "cuda") for part in ("windows", "sites")},
    }


def missed(result: dict[str, Any]) -> list[str]:
    """Return which goals were missed."""
    lines = [
        f"{r['model']}, {r['stage']}: a share of {r['share']:.2f}"
        for r in result["steps"] if "skipped" not in r and r["share"] < GOAL
    ]  # fmt: skip
    lines += [
        f"{r['model']}: memory a window changes by {r['ratio']:.2f}"
        for r in result["windows"] if "skipped" not in r and not STRAIGHT[0] <= r["ratio"] <= STRAIGHT[1]
    ]  # fmt: skip
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*SIZES], choices=SIZES)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS, help="the others stay as they were")
    parser.add_argument("--spots", type=int, help="of each of two slides; by default enough for the size")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--times", type=int, nargs="+", default=[*TIMES])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = time.perf_counter()
    result: dict[str, Any] = {
        "measured": {}, "runs": options.runs, "threads": torch.get_num_threads(), "steps": [], "windows": [],
        "sites": [], "cuda": {"skipped": "not asked for"},
    }  # fmt: skip
    kept = options.out / "storm_throughput.json"
    if kept.exists():
        before = json.loads(kept.read_text("utf-8"))
        result.update({part: before[part] for part in ("measured", *PARTS) if part in before})
    names = options.models
    parts: dict[str, Callable[[], Any]] = {
        "steps": lambda: [row for name in names for row in step_rows(name, options.runs, options.spots, "cpu")],
        "windows": lambda: growth("windows", names, options.times, "cpu"),
        "sites": lambda: growth("sites", names, options.times, "cpu"),
        "cuda": lambda: on_gpu(names, options.runs, options.spots, options.times),
    }
    for part in options.parts:  # written after each, should the next take too long
        began, load = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), os.getloadavg()[0]
        found = parts[part]()
        if part != "cuda":  # rows of models that were not asked for stay
            order = [*SIZES]
            found += [row for row in result[part] if row["model"] not in names]
            found.sort(key=lambda row: order.index(row["model"]))
        result[part] = found
        result["measured"][part] = {"began": began, "load": load, "load_after": os.getloadavg()[0]}
        short = missed(result)
        text = report(result, options.times)
        text += "\n\n" + ("Goals missed:\n\n- " + "\n- ".join(short) if short else "All goals are met.")
        record = {**result, "missed": short, "wall_s": time.perf_counter() - start}
        write(options.out / "storm_throughput", record, text, seed=0)
    print(text)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
