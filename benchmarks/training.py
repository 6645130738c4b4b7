"""What training and embedding cost beside the bare model, and whether memory stays flat.

python benchmarks/training.py [--models st-align-tiny st-align-small] [--spots 1500] [--out benchmarks/results]

* step share: time of forward + backward on batches that lie ready, over the time of a whole step of ``fit`` (what of
  reading and augmentation is not hidden behind it, Lightning, clipping, optimiser, schedules, journal). Goal: 0.85.
* embedding share: time of ``model.embed`` on batches that lie ready, over the time of ``embed_slides``. Goal: 0.90.
* peak memory of ``embed_blocks`` as the number of spots grows. Goal: flat.

Bare and whole runs take turns, and the fastest of each counts. The CPU time of the thread that computes is given too:
it tells the same on a busy machine (what the reader thread does beside it is not in it).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

# Idle threads that spin would take the cores from the reader thread (docs/decisions.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from _common import table, write
from _steps import Steps, clock, shares, step_share

import stfm as sf
from stfm.inference.stream import embed_blocks, embed_slides
from stfm.models.inputs import SlideInputs
from stfm.models.registry import create
from stfm.slide.genes import Vocabulary
from stfm.slide.readers import open_image
from stfm.slide.slide import Slide
from stfm.slide.tiles import TileReader
from stfm.training.genes import make_vocabulary


def embed_share(name: str, slides, runs: int, batch_size: int = 256) -> dict:
    """``model.embed`` on batches that lie ready beside ``embed_slides``, tiles read and encoded in both cases."""
    model = create(name, make_vocabulary(slides)).eval()
    inputs = [SlideInputs(s, model.inputs, model.vocabulary, slide_id=i) for i, s in enumerate(slides)]
    batches = [
        one.batch(np.arange(a, min(a + batch_size, one.n_obs)))
        for one in inputs
        for a in range(0, one.n_obs, batch_size)
    ]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.embed(batch)

    def whole() -> None:
        embed_slides(model, inputs, batch_size=batch_size, device="cpu")

    bare_s, whole_s = [], []
    for _ in range(runs):
        bare_s.append(clock(bare))
        whole_s.append(clock(whole))
    n = sum(s.n_obs for s in slides)
    best = np.min(whole_s, 0)
    return {"spots_per_s": n / best[0], **shares("embed", np.min(bare_s, 0), best)}


def peak_memory(name: str, sizes) -> dict:
    """Growth of the peak memory in MB as more spots of one picture are embedded, block by block."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (2000, 2000, 3), np.uint8)
    model = create(name, Vocabulary(np.array([f"GENE{i}" for i in range(200)])))
    peaks = {}
    for n in sizes:
        centres = rng.uniform(100, 1900, (n, 2))
        slide = Slide(
            name="S", coords=centres, obs_names=np.full(n, "s"), rows=np.arange(n), mpp=1.0, spot_um=55.0,
            niche_um=255.0, tiles=TileReader(open_image(picture), centres, 1.0),
        )  # fmt: skip
        one = SlideInputs(slide, model.inputs, model.vocabulary)
        _ = one.niches
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, _ in enumerate(embed_blocks(model, [one], batch_size=256, device="cpu")):
            if number == 40:  # flat from here on, or not at all
                break
        peaks[n] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return peaks


def tables(result: dict) -> str:
    """The tables in markdown: time of training and of embedding, growth of memory."""
    blocks = []
    for what, title, goal in (
        ("step", "Training: a step of `fit`", 0.85),
        ("embed", "Embedding: `embed_slides`", 0.90),
    ):
        head = ["model", "bare model ms", "whole ms", "share", "share of CPU time", "goal reached"]
        rows = [
            [name, row["bare_ms"], row[f"{what}_ms"], row["share"], row["share_of_cpu"], bool(row["share"] >= goal)]
            for name, row in result[what].items()
        ]
        blocks.append(f"## {title} beside the bare model (goal: a share of {goal:.2f})\n\n{table(head, rows)}")
    memory = [[f"{int(n):,}", mb] for n, mb in result["memory_mb"].items()]
    blocks.append(f"## Growth of the peak memory while embedding\n\n{table(['spots', 'MB'], memory)}")
    said = f"{result['spots']} spots, {result['threads']} threads, {result['runs']} turns; the fastest of each counts"
    said += " (of training, of each batch)."
    return "\n\n".join([said, *blocks])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["st-align-tiny", "st-align-small"])
    parser.add_argument("--spots", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    slides = sf.slide.as_slides(sf.datasets.toy(n_spots=options.spots, n_patients=2))
    results: dict = {
        "spots": 2 * options.spots, "runs": options.runs, "threads": torch.get_num_threads(), "step": {}, "embed": {},
    }  # fmt: skip
    for name in options.models:
        measures = {
            "step": lambda name=name: step_share(Steps(name, slides), options.runs),
            "embed": lambda name=name: embed_share(name, slides, options.runs),
        }
        for what, measure in measures.items():
            row = results[what][name] = measure()
            print(
                f"{name}: bare {row['bare_ms']:.1f} ms, {what} {row[f'{what}_ms']:.1f} ms, "
                f"share {row['share']:.2f}, of CPU {row['share_of_cpu']:.2f}"
            )
    results["memory_mb"] = peak_memory(options.models[0], options.sizes)
    print("growth of peak memory:", ", ".join(f"{n:,} spots {mb:.0f} MB" for n, mb in results["memory_mb"].items()))
    text = tables(results)
    write(options.out / "training", results, text, seed=0)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
