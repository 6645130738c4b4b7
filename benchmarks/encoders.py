"""Image encoders: expression by ridge on their frozen features, and images a second.

Two protocols stand side by side: the HEST-Benchmark as its code runs it, and the repaired ones of
``sf.metrics.protocols()``. Encoders whose weights are not at hand take part with random weights, and say so.

    python benchmarks/encoders.py --data DATA --weights mobilenetv2=mobilenet_v2_float.safetensors
    python benchmarks/encoders.py --data DATA --encoders default     (adds or replaces rows of the committed table)
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import _expression as expression
import numpy as np
import torch
from _common import best_of, run_record, write
from _common import table as markdown
from _hest import hest_targets, run_hest

import stfm as sf
from stfm.encoders import ENCODERS, build_encoder
from stfm.inference.contexts import context_features
from stfm.slide import Slide

PROTOCOLS = ("her2st-C-loso", "her2st-C-to-B4", "mob-animal1-to-2", "mob-animal2-to-1")
RESULTS = Path(__file__).parent / "results"
TILE_UM, TILE_PX = 112.0, 224
#: larger ones are not built on a machine of two cores
MOST_PARAMETERS = 400_000_000


@dataclass(frozen=True)
class Candidate:
    """An encoder of the table: a row of the registry, or the image encoder of the packaged model."""

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False
    contexts: bool = False

    @property
    def weights(self) -> str:
        """Where the weights come from, in a word."""
        if self.name == "default":
            return "the packaged model"
        if self.random:
            return "random"
        return "none needed" if ENCODERS.get(self.name).source == "formula" else "published"


def candidates(weights: Mapping[str, Path]) -> list[Candidate]:
    """Return every encoder that can be had: with weights of its own first, then with random ones."""
    rows = [Candidate("handcrafted", "handcrafted", contexts=True)]
    for name in weights:
        for pooling in ("mean", "stage-means", "stages"):
            title = f"{name}, {pooling}"
            rows.append(Candidate(name, title, {"pooling": pooling}, contexts=pooling == "stage-means"))
    rows.append(Candidate("default", "default", contexts=True))
    rows.append(Candidate("mobilenetv2", "mobilenetv2, stage-means, random", {"pooling": "stage-means"}, random=True))
    others = [n for n in ENCODERS.names() if ENCODERS.get(n).modality == "image"]
    known = {row.name for row in rows}
    rows += [
        Candidate(n, f"{n}, random", random=True)
        for n in others
        if n not in known and ENCODERS.get(n).source in ("published", "scratch")
    ]
    return rows


def build(candidate: Candidate, weights: Mapping[str, Path], seed: int) -> torch.nn.Module:
    """Return the encoder, frozen; random weights are seeded."""
    torch.manual_seed(seed)
    if candidate.name == "default":
        model = sf.models.load("default")
        encoder = model.frozen_image_encoder("spot") or model.frozen_image_encoder("niche")
        if encoder is None:
            encoder = next(m for m in model.modules() if type(m).__name__ == "ImageEncoder")
        return copy.deepcopy(encoder).eval()
    file = None if candidate.random else weights.get(candidate.name)
    return build_encoder(candidate.name, options=candidate.options, weights=file, mode="frozen").eval()


# ---- images a second


def speed(encoder: torch.nn.Module, *, batch: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Return images a second of each way, and how far bf16 moves the features."""
    px = getattr(getattr(encoder, "spec", None), "input_px", None) or TILE_PX
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (batch, 3, px, px), generator=generator, dtype=torch.uint8)
    ways = {"fp32": (encoder, tiles, "fp32")}
    trained = any(p.numel() for p in encoder.parameters())
    if trained:
        last = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
        beside = tiles.contiguous(memory_format=torch.channels_last)
        ways |= {
            "bf16": (encoder, tiles, "bf16"),
            "fp32, channels-last": (last, beside, "fp32"),
            "bf16, channels-last": (last, beside, "bf16"),
        }
    calls = {name: _call(*way) for name, way in ways.items()}
    features = {name: call() for name, call in calls.items()}  # the first call sets up kernels
    seconds = best_of(calls, rounds)
    out: dict[str, Any] = {"px": px, "images_per_s": {name: batch / value for name, value in seconds.items()}}
    if trained:
        exact = features["fp32"]
        out["bf16_off"] = float((features["bf16"].float() - exact).norm() / exact.norm().clamp_min(1e-12))
        if compiled:
            out |= _compiled(ways, out["images_per_s"], batch, rounds)
    return out


def _call(encoder: torch.nn.Module, tiles: torch.Tensor, precision: str) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return encoder(tiles)

    return call


def _compiled(
    ways: Mapping[str, tuple[torch.nn.Module, torch.Tensor, str]], rates: Mapping[str, float], batch: int, rounds: int
) -> dict[str, Any]:
    """Compile the fastest way; where the compiler fails, say why."""
    fastest = max(rates, key=lambda name: rates[name])
    encoder, tiles, precision = ways[fastest]
    call = _call(torch.compile(copy.deepcopy(encoder)), tiles, precision)
    start = time.perf_counter()
    try:
        call()
    except RuntimeError as error:
        return {"compile_failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    begun = time.perf_counter() - start
    call()
    rate = batch / best_of({"compiled": call}, rounds)["compiled"]
    return {"compiled": {"of": fastest, "images_per_s": rate, "start_s": begun}}


# ---- accuracy


@cache
def load(protocol: str, data: Path | None) -> dict[str, Slide]:
    """Read the sections of a protocol once."""
    return expression.load_slides(protocol, data)


@cache
def load_targets(protocol: str, data: Path | None) -> dict[str, np.ndarray]:
    """Return HEST's targets of a protocol's sections."""
    return hest_targets(load(protocol, data))


def ready(slides: Mapping[str, Slide], features: Mapping[str, np.ndarray]) -> expression.Row:
    """Return a row of features that are there already, by section."""
    by_slide = {slide.name: features[section] for section, slide in slides.items()}
    return expression.Row(lambda _train: lambda slide: by_slide[slide.name])


def accuracy(
    candidate: Candidate, encoder: torch.nn.Module, data: Path | None, protocols: Iterable[str], precision: str
) -> list[dict[str, Any]]:
    """Return a line a protocol: HEST's score, and the repaired ones."""

    def features(slide: Slide, **changes: Any) -> np.ndarray:
        settings = {"contexts_um": (TILE_UM,), "rings": 0, "tile_px": TILE_PX, "batch_size": 16, **changes}
        return context_features(slide, encoder, precision=precision, **settings)

    lines = []
    for protocol in protocols:
        slides = load(protocol, data)
        tile = {name: features(slide) for name, slide in slides.items()}
        rows = {"tile": ready(slides, tile)}
        if candidate.contexts:
            contexts = sf.metrics.get_protocol(protocol).contexts_um
            base = {name: features(slide, contexts_um=contexts, rings=2) for name, slide in slides.items()}
            rows["contexts"] = ready(slides, base)
        means = expression.summary(expression.run_protocol(protocol, slides, rows)).loc[protocol]
        line = {
            "protocol": protocol,
            "hest": run_hest(protocol, load_targets(protocol, data), tile),
            "ceiling": float(means["ceiling"].iloc[0]),
        }
        lines.append(line | {name: float(means.loc[name, "r"]) for name in rows})
    return lines


# ---- the run


def measure(candidate: Candidate, options: argparse.Namespace, weights: Mapping[str, Path]) -> dict[str, Any]:
    """Return one row: what it is, how fast, how good; or why it was left out."""
    run = run_record(options.seed)
    row: dict[str, Any] = {"weights": candidate.weights, "date": run["date"], "commit": run["commit"]}
    spec = None if candidate.name == "default" else ENCODERS.get(candidate.name)
    if spec is not None and (spec.parameters or 0) > MOST_PARAMETERS:
        return row | {"parameters": spec.parameters, "skipped": f"{(spec.parameters or 0) / 1e6:.0f} M parameters"}
    try:
        encoder = build(candidate, weights, options.seed)
    except sf.errors.StfmError as error:
        return row | {"skipped": str(error)}
    row |= {"width": encoder.width, "parameters": sum(p.numel() for p in encoder.parameters())}
    row["load"] = run["machine"]["load"]
    row["speed"] = speed(encoder, batch=options.batch, rounds=options.rounds, compiled=options.compile)
    rate = max(row["speed"]["images_per_s"].values())
    if rate < options.slowest:
        return row | {"skipped": f"{rate:.2g} images a second, fewer than {options.slowest:g}"}
    row["precision"] = "bf16" if candidate.random and row["parameters"] > 1e7 else "fp32"
    if not options.speed_only:
        row["scores"] = accuracy(candidate, encoder, options.data, options.protocols, row["precision"])
    return row


def show(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tables."""
    scored = {title: row for title, row in rows.items() if row.get("scores")}
    protocols = [
        p for p in PROTOCOLS if any(line["protocol"] == p for row in scored.values() for line in row["scores"])
    ]
    text = []
    for key, words in ABOUT.items():
        lines = [
            [title, row["weights"], row["width"], *(_score(row, protocol, key) for protocol in protocols)]
            for title, row in scored.items()
            if any(key in line for line in row["scores"])
        ]
        if not lines:
            continue
        if key != "hest":
            lines.append(["noise ceiling", "", "", *(_ceiling(scored, protocol) for protocol in protocols)])
        text += [words, markdown(["encoder", "weights", "width", *protocols], lines)]
    text += [f"Images a second at the encoder's own size. {SPEED_NOTE}", speed_table(rows)]
    left = [f"* {title}: {row['skipped']}" for title, row in rows.items() if row.get("skipped")]
    return "\n\n".join([*text, *(["Left out:\n\n" + "\n".join(left)] if left else [])])


ABOUT = {
    "hest": (
        "HEST-Benchmark as its code runs it: one tile of 112 µm at 0.5 µm/px, log1p of raw counts, 50 genes chosen on "
        "all sections, PCA 256, ridge without intercept, penalty 100 / (256 * 50); r pooled over a fold's test spots."
    ),
    "tile": (
        "Repaired: the same tile; log1p(1e4 c / sum c), 250 genes and the penalty chosen on training sections, r "
        "inside each section."
    ),
    "contexts": "Repaired, with tiles of 112, 224 and 448 µm and the means over rings 1 and 2.",
}
SPEED_NOTE = (
    "The four ways took turns, best of several rounds; the compiler was given the fastest. Ratios hold on a busy "
    "machine, absolute numbers do not. bf16 off: length of the change of the features over their length."
)


def speed_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return images a second of every encoder that was built."""
    ways = ("fp32", "fp32, channels-last", "bf16", "bf16, channels-last")
    lines = []
    for title, row in rows.items():
        if "speed" not in row:
            continue
        measured = row["speed"]
        compiled = measured.get("compiled", {})
        start = f"{compiled['start_s']:.0f} s" if compiled else measured.get("compile_failed", "")
        lines.append([
            title, measured["px"], row["parameters"] / 1e6, *(measured["images_per_s"].get(way) for way in ways),
            compiled.get("images_per_s"), start, measured.get("bf16_off"),
        ])  # fmt: skip
    return markdown(["encoder", "px", "M parameters", *ways, "compiled", "compiler took", "bf16 off"], lines)


def _score(row: Mapping[str, Any], protocol: str, key: str) -> str:
    found = [line[key] for line in row["scores"] if line["protocol"] == protocol and key in line]
    return f"{found[0]:.3f}" if found else ""


def _ceiling(rows: Mapping[str, Mapping[str, Any]], protocol: str) -> str:
    found = [line["ceiling"] for row in rows.values() for line in row["scores"] if line["protocol"] == protocol]
    return f"{found[0]:.3f}" if found else ""


def kept_rows(stem: Path) -> dict[str, Any]:
    """Return the rows of the table that is there."""
    path = stem.with_suffix(".json")
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}


def chosen(every: Sequence[Candidate], names: Sequence[str] | None) -> list[Candidate]:
    """Return the candidates whose title or name was asked for; all of them where none was."""
    if not names:
        return list(every)
    return [c for c in every if c.name in names or any(c.title == n or c.title.startswith(f"{n},") for n in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cache/; without it her2st and MOB are fetched")
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="ENCODER=FILE", help="published checkpoints at hand"
    )
    parser.add_argument(
        "--encoders", nargs="+", help="only these: names of sf.models.list_encoders(), default, or titles"
    )
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--slowest", type=float, default=3.0, help="images a second below which no features are made")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "encoders")
    options = parser.parse_args()
    weights = {name: Path(file) for name, _, file in (text.partition("=") for text in options.weights)}
    every = candidates(weights)
    rows = kept_rows(options.out)
    for candidate in chosen(every, options.encoders):
        new = measure(candidate, options, weights)
        if options.speed_only and "scores" in rows.get(candidate.title, {}):
            new |= {key: rows[candidate.title][key] for key in ("scores", "precision")}
        rows[candidate.title] = new
        brief = {k: v for k, v in new.items() if k in ("skipped", "scores")}
        print(candidate.title, brief or new["speed"]["images_per_s"], flush=True)
        order = [c.title for c in every if c.title in rows] + [t for t in rows if t not in {c.title for c in every}]
        rows = {title: rows[title] for title in order}
        result = {"protocols": options.protocols, "tile_um": TILE_UM, "tile_px": TILE_PX, "rows": rows}
        write(options.out, result, show(rows), seed=options.seed)
    print(show(rows))


if __name__ == "__main__":
    main()
