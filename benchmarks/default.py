"""The default model on slides kept out of its pretraining: as it ships, and adapted to a slide.

Beside it stand simple rows, random weights, frozen encoders, and STORM trained from scratch. Every part writes what it
has after each row, so that a run that is cut leaves a table; a part that is run again replaces itself.

    python benchmarks/default.py --data DATA --weights mobilenet_v2_float.safetensors [--parts domains ...] [--seeds 3]
    python benchmarks/default.py --data DATA --model FOLDER --out FOLDER ...     (another model of the same kind)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _default_parts as parts
import _default_rows as rows
import pandas as pd
from _common import run_record, write
from _common import table as markdown

import stfm as sf

RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[parts.Setting], parts.Step]] = {
    "domains": parts.domains,
    "expression": parts.from_image,
    "retrieval": parts.retrieval,
    "annotation": parts.annotation,
    "adapt": parts.adapting,
}
NOTE = """Slides that the recipe of the default never read (`pretraining/_slides.py`): her2st E1 and G2 (two patients of
whom it saw nothing; counts alone), bulb section 3 (another animal than sections 1 and 2, which it saw, as in
`mob-animal1-to-2`), bulb rep11 (counts alone), cortex 151675 (of the donor whose sections 673 and 674 it saw, without
their H&E). mean ± spread over seeds; rows without randomness have one. "default − row" is what the default wins, with
the central 90 % of a bootstrap of blocks of tissue.

Random weights: the same model with all parameters drawn anew; means and spreads of genes and the reach of the field
stay, without which its embedding is constant. STORM trained on the slide itself: `storm-small` on its counts, as in
storm_domains."""
TITLES = {
    "domains": "Spatial domains\n\nOne clustering for all rows: consensus of mixtures, as many domains as labels.",
    "expression": (
        "Expression from H&E\n\nThe genes of `hvg250`, chosen on the training slides, that the default writes. Ridge "
        "and STORM from scratch are trained on bulbs 1 and 2; MobileNetV2 sees tiles at 224 px, the others at "
        "112. Cortex is at 16 µm/px, where a px is as large as a cell."
    ),
    "retrieval": (
        "Cross-modal retrieval\n\nThe right one among 128 random spots of mob:3, 20 galleries, both sides centred over "
        "the slide, by cosine."
    ),
    "annotation": (
        "Annotation from 5 and 20 spots a class\n\nLogistic regression (C = 1, standardised), 20 draws, at most half "
        "of a class is labelled; ± is the spread over draws."
    ),
    "adapt": (
        'Adapted by `sf.tl.train(adata, init="default")`\n\nDomains and annotation on the slide that it was adapted to '
        "(its labels unseen; `stage=\"mask\"` where there is no H&E). Expression and retrieval: adapted on one half of "
        "mob:3, scored on the other, before and after on the same half. The gain is that of adapting."
    ),
}  # fmt: skip


class Report:
    """The result so far, on disk after each step."""

    def __init__(self, out: Path, model: sf.models.Model, source: str, seeds: Sequence[int]) -> None:
        self.stem = out / "default"
        self.seeds = list(seeds)
        path = self.stem.with_suffix(".json")
        sha = model.weights_sha256()
        old = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self.model = {"source": source, "weights_sha256": sha, "seen": list(model.seen.slides)}
        same = old.get("model", {}).get("weights_sha256") == sha
        self.parts: dict[str, Any] = old["parts"] if same else {}

    def take(self, folder: Path) -> None:
        """Take the parts of a run elsewhere, of the same model."""
        other = json.loads((folder / "default.json").read_text("utf-8"))
        if other["model"]["weights_sha256"] != self.model["weights_sha256"]:
            raise SystemExit("that run was of a model with other weights")
        self.parts |= other["parts"]
        self.save()

    def run(self, name: str, steps: parts.Step) -> None:
        """Go through a part and write after each step."""
        start = time.perf_counter()
        part: dict[str, Any] = {"run": run_record(), "scores": [], "gains": [], "complete": False}
        self.parts[name] = part
        for lines, gains in steps:
            part["scores"] += lines
            part["gains"] += gains
            part["seconds"] = time.perf_counter() - start
            self.save()
            _tell(name, lines)
        part["complete"] = True
        self.save()

    def save(self) -> None:
        """Write JSON and tables."""
        text = [f"{NOTE}\n\nWeights of the model: sha256 {self.model['weights_sha256'][:16]}."]
        for name in PARTS:
            if name in self.parts:
                part = self.parts[name]
                unfinished = "" if part["complete"] else " Not finished."
                run = f"Measured {part['run']['date']} at commit {str(part['run']['commit'])[:8]}.{unfinished}"
                text.append(f"## {TITLES[name]}\n\n{run}\n\n{SHOW[name](part)}")
        write(self.stem, {"model": self.model, "seeds": self.seeds, "parts": self.parts}, "\n\n".join(text))


def _tell(name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    for line in lines:
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items() if v is not None}
        print(name, *shown.values(), flush=True)


def _cells(scores: pd.DataFrame, by: Sequence[str], value: str, spread: str | None = None) -> dict[Any, str]:
    """Return mean ± spread over seeds of each group; the spread of a column where there is one."""
    found = scores.groupby(list(by), sort=False)
    mean, over = found[value].mean(), found[value].std().fillna(0.0) if spread is None else found[spread].mean()
    return {key: f"{mean[key]:.3f} ± {over[key]:.3f}" for key in mean.index}


def _gains(part: Mapping[str, Any], by: Sequence[str]) -> dict[Any, str]:
    """Return gain and interval of each group, the mean over seeds."""
    if not part["gains"]:
        return {}
    mean = pd.DataFrame(part["gains"]).groupby(list(by), sort=False)[["gain", "low", "high"]].mean()
    cells = [f"{g:+.3f} ({low:+.3f} to {high:+.3f})" for g, low, high in mean.to_numpy()]
    return dict(zip(mean.index, cells, strict=True))


def _grid(cells: Mapping[tuple[str, str], str], head: str) -> str:
    """Return (row, column) -> cell as a table."""
    names, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    return markdown(
        [head, *columns], [[name, *(cells.get((name, column), "") for column in columns)] for name in names]
    )


def show_domains(part: Mapping[str, Any]) -> str:
    """Return a table a score, rows by slides, and what the default wins."""
    scores = pd.DataFrame(part["scores"])
    text = [_grid(_cells(scores, ["row", "slide"], score), f"{score}: row") for score in ("ARI", "NMI", "AMI")]
    return "\n\n".join([*text, _grid(_gains(part, ["row", "slide"]), "default − row, ARI")])


def show_expression(part: Mapping[str, Any]) -> str:
    """Return a table of rows with r, r of the 50 most variable genes, share of the ceiling."""
    scores, won = pd.DataFrame(part["scores"]), _gains(part, ["slide", "row"])
    r = _cells(scores, ["slide", "row"], "r")
    means = scores.groupby(["slide", "row"], sort=False)[["genes", "r_hvg50", "share"]].mean()
    lines = [
        [*key, int(means.loc[key, "genes"]), r[key], f"{means.loc[key, 'r_hvg50']:.3f}",
         f"{means.loc[key, 'share']:.0%}", won.get(key, "")]
        for key in r
    ]  # fmt: skip
    return markdown(["slide", "row", "genes", "r", "r, hvg50", "share of ceiling", "default − row, r"], lines)


def show_retrieval(part: Mapping[str, Any]) -> str:
    """Return a table of rows with recall in both directions."""
    scores, won = pd.DataFrame(part["scores"]), _gains(part, ["row"])
    cells = _cells(scores, ["row", "direction", "k"], "recall")
    columns = [(way, k) for way in parts.scores.DIRECTIONS for k in parts.scores.TOP]
    lines = [
        [row, *(cells[row, way, k] for way, k in columns), won.get(row, "")] for row in dict.fromkeys(scores["row"])
    ]
    lines.append(["chance", *(f"{k / parts.scores.GALLERY:.3f}" for _, k in columns), ""])
    return markdown(["row", *(f"{way}, recall@{k}" for way, k in columns), "default − row, recall@5"], lines)


def show_annotation(part: Mapping[str, Any]) -> str:
    """Return accuracy and macro-F1 by number of labelled spots, and what the default wins."""
    scores = pd.DataFrame(part["scores"])
    text = []
    for n, some in scores.groupby("labelled", sort=False):
        accuracy, f1 = (_cells(some, ["row", "slide"], v, f"{v}_spread") for v in ("accuracy", "f1"))
        both = {key: f"{accuracy[key]} / {f1[key]}" for key in accuracy}
        text.append(_grid(both, f"accuracy / macro-F1 from {n} a class: row"))
    gains = pd.DataFrame(part["gains"])
    for score in dict.fromkeys(gains["score"]) if len(gains) else ():
        some = {"gains": gains[gains["score"] == score].to_dict("records")}
        text.append(_grid(_gains(some, ["row", "slide"]), f"default − row, {score} a class"))
    return "\n\n".join(text)


def show_adapt(part: Mapping[str, Any]) -> str:
    """Return each score before and after, the gain of adapting, and the seconds that it took."""
    scores = pd.DataFrame(part["scores"])
    scores = scores.reindex(columns=[*dict.fromkeys([*scores, "recall", "k", "seconds"])])  # as far as the run came
    won = _gains(part, ["what", "slide", "score"])
    scores["recall"] = scores["recall"].groupby([scores[c] for c in ("slide", "row", "seed", "k")]).transform("mean")
    kinds = {"domains": ["ARI", "AMI"], "expression": ["r", "r_hvg50", "share"], "time": []}
    lines = []
    for (what, slide), some in scores.groupby(["what", "slide"], sort=False):
        if what == "retrieval":
            some = some[some["direction"] == parts.scores.DIRECTIONS[0]]
            shown = {f"recall@{k}": (some[some["k"] == k], "recall") for k in parts.scores.TOP}
        elif what == "annotation":
            shown = {f"accuracy, {n}": (some[some["labelled"] == n], "accuracy") for n in parts.scores.LABELLED}
        else:
            shown = {score: (some, score) for score in kinds[what]}
        for score, (chosen, column) in shown.items():
            cells = _cells(chosen, ["row"], column)
            before, after = (cells.get(row, "") for row in (rows.DEFAULT, rows.ADAPTED))
            lines.append([slide, f"{what}, {score}", before, after, won.get((what, slide, score), "")])
    text = markdown(["scored on", "score", "before", "after", "gain of adapting"], lines)
    return f"{text}\n\n{_show_time(scores)}"


def _show_time(scores: pd.DataFrame) -> str:
    """Return seconds to adapt by slide, those of the first seed, which found no features on disk."""
    timed = scores[scores["seconds"].notna() & (scores["seed"] == 0)].drop_duplicates("slide")
    timed = timed[timed["what"].isin(["time", "domains"])]
    head = ["adapted to", "spots", "seconds, image features computed anew"]
    return markdown(head, timed[["slide", "n_obs", "seconds"]].to_numpy().tolist())


SHOW = {
    "domains": show_domains,
    "expression": show_expression,
    "retrieval": show_retrieval,
    "annotation": show_annotation,
    "adapt": show_adapt,
}


def check_unseen(model: sf.models.Model) -> None:
    """Refuse a model that saw a slide which it would be scored on."""
    if seen := sorted({*rows.KEPT_OUT} & {*model.seen.slides}):
        raise SystemExit(f"the model was trained on {', '.join(seen)}, which it would be scored on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cache/ and h5ad/")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 checkpoint of the base row and of STORM from scratch")
    parser.add_argument("--model", type=Path, help="folder of a saved model; the packaged default without")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--take", nargs="*", type=Path, default=[], help="folders of runs at a time, --out of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = options.parts or ([] if options.take else list(PARTS))
    if options.weights is None and {"expression", "retrieval"} & {*chosen}:
        parser.error("--weights is needed: the base row is ridge on frozen MobileNetV2 features")
    model = sf.models.load(options.model or "default")
    check_unseen(model)
    report = Report(options.out, model, "folder" if options.model else "packaged", range(options.seeds))
    setting = parts.Setting(rows.Rows(model, options.data), range(options.seeds), options.weights)
    for folder in options.take:
        report.take(folder)
    for name in chosen:
        report.run(name, PARTS[name](setting))


if __name__ == "__main__":
    main()
