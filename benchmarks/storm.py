"""STORM beside simple rows and its own ablations: expression from H&E, spatial domains, transfer between platforms.

Every learned row is trained here, from scratch, by ``sf.tl.train`` on the training sections of the protocol, all of
their spots, for the whole recipe. Settings were chosen on training sections (docs/decisions.md); the test sections are
scored and no more.

    python benchmarks/storm.py expression --data DATA --weights mobilenet_v2_float.safetensors [--seeds 3]
    python benchmarks/storm.py ablations  --data DATA --weights ...
    python benchmarks/storm.py domains    --data DATA [--seeds 5]
    python benchmarks/storm.py transfer   [--data DATA]   (with data, real slides beside toy tissue)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import _expression as expression
import _storm_domains as domains
import _storm_transfer as transfer
import numpy as np
import pandas as pd
from _common import joined, write
from _common import table as markdown

import stfm as sf
from stfm.inference.contexts import default_contexts
from stfm.inference.predict import genes_written, predict_slides
from stfm.slide import Slide

PROTOCOLS = ("her2st-C-loso", "her2st-C-to-B4", "mob-loso", "mob-animal1-to-2", "mob-animal2-to-1", "dlpfc-loso")
RESULTS = Path(__file__).parent / "results"
BASE = "base: MobileNetV2, contexts + rings, ridge"
COORDINATES = "coordinates only, ridge"
#: genes of the training sections that a model reads and writes beside those that are scored
N_GENES = 500
#: above so many spots (cortex) only two simple rows are run: ridge on 12,144 features of 7,000 spots takes its time
MANY_SPOTS = 5000
#: the model that was trained last
TRAINED: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True)
class Storm:
    """A row that STORM predicts by itself.

    ``weights`` of the frozen MobileNetV2 tower (None: random), changes of the configuration and of the recipe;
    ``blend`` is another share of the window regression in what a trained model predicts, so that rows share a training.
    """

    weights: Path | None
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    model: str = "storm-small"
    blend: float | None = None

    def train(self, slides: Sequence[Slide], genes: Sequence[str], seed: int) -> Any:
        """Train on slides; the genes that are scored and the most variable of the training sections are in."""
        from stfm.training.genes import make_vocabulary

        vocabulary = sorted({*map(str, make_vocabulary(list(slides), N_GENES).names), *genes})
        tower = {
            "name": "mobilenetv2",
            "mode": "frozen",
            "weights": None if self.weights is None else str(self.weights),
        }
        config = {"image": tower, "spot_px": 224, "contexts_um": default_contexts(slides), **self.config}
        recipe = {"stage": "mask", **self.recipe}
        return sf.tl.train(
            list(slides), self.model, config=config, genes=vocabulary, validation=None, rng=seed, **recipe
        )

    def fit(self, slides: Sequence[Slide], genes: Sequence[str], seed: int) -> Callable[[Slide], np.ndarray]:
        """Return what predicts the genes from the H&E of a slide."""
        key = (repr(replace(self, blend=None)), tuple(slide.name for slide in slides), tuple(genes), seed)
        if key not in TRAINED:
            TRAINED.clear()  # rows that share a training follow each other
            TRAINED[key] = self.train(slides, genes, seed)
        model = TRAINED[key]
        _, chosen = genes_written(model, genes)

        blend = model.config.linear_blend if self.blend is None else self.blend

        def predict(slide: Slide) -> np.ndarray:
            kept, model.config = model.config, replace(model.config, linear_blend=blend)
            ((mean, _),) = predict_slides(model, [slide.without("gene")], chosen)
            model.config = kept
            return mean

        return predict


@dataclass(frozen=True)
class Retrieval:
    """Mean expression of the training spots whose base features are nearest; their number is chosen by sections."""

    base: Callable[[Slide], np.ndarray]

    def fit(self, slides: Sequence[Slide], genes: Sequence[str], seed: int) -> Callable[[Slide], np.ndarray]:
        """Return what predicts the genes of a slide."""
        from sklearn.neighbors import KNeighborsRegressor

        from stfm.nn.ridge import Basis, held_out

        del seed
        _, targets = expression.named_targets(slides, genes)
        x, y = np.concatenate([self.base(s) for s in slides]), np.concatenate(targets)
        folds = held_out([s.n_obs for s in slides], [s.coords for s in slides])
        scores = {}
        for k in (5, 10, 20, 40):
            found = []
            for train, test in folds:
                basis = Basis.of(x[train], 50)
                fitted = KNeighborsRegressor(k).fit(basis.scores, y[train])
                found.append(sf.metrics.gene_pearson(y[test], fitted.predict(basis.project(x[test]))).mean())
            scores[k] = np.mean(found)
        basis = Basis.of(x, 50)
        fitted = KNeighborsRegressor(max(scores, key=scores.__getitem__)).fit(basis.scores, y)
        return lambda slide: fitted.predict(basis.project(self.base(slide)))


def storm_rows(weights: Path) -> dict[str, Storm]:
    """STORM, what it is made of, and the same on random weights."""
    storm = partial(Storm, weights)
    return {
        "STORM": storm(),
        "STORM, network alone": storm(blend=0.0),
        "STORM, window regression alone": storm(blend=1.0),
        "STORM on random image weights": Storm(None),
        "CNN from scratch on one 224-µm tile (as ST-Net)": Storm(
            None,
            {
                "image": {"name": "resnet-small", "mode": "full"}, "spot_px": 64, "contexts_um": (224.0,),
                "slide_norm": "none", "ablation": "no-neighbours", "linear_blend": 0.0, "cross_share": 1.0,
                "n_visible": 0, "decoder_depth": 0, "depth": 1,
            },
        ),
    }  # fmt: skip


def ablation_rows(weights: Path) -> dict[str, Storm]:
    """STORM with one thing taken away at a time; the regression on windows is left out of all, which would hide it."""
    storm = partial(Storm, weights)
    alone = {"linear_blend": 0.0}
    return {
        "full network": storm(alone),
        "without neighbours": storm({**alone, "ablation": "no-neighbours"}),
        "without the second modality": storm({**alone, "ablation": "no-gene"}),
        "without distance bias": storm({**alone, "ablation": "no-distance"}),
        "one feed-forward for both modalities": storm({**alone, "ablation": "shared-experts"}),
        "without masking (all H&E shown, no counts)": storm({**alone, "cross_share": 1.0, "n_visible": 0}),
        "masked to the letter (5 visible, no windows of H&E alone)": storm({**alone, "cross_share": 0.0}),
        "both stages (masking, then alignment)": storm(alone, {"stage": "both"}),
        "random image tower": Storm(None, alone),
        "negative binomial on counts": storm({**alone, "likelihood": "nb"}),
    }


def expression_table(
    protocols: Sequence[str],
    data: Path,
    weights: Path,
    rows: Mapping[str, Any],
    seeds: Sequence[int],
    save: Callable[[pd.DataFrame], None],
    *,
    simple: bool = True,
) -> None:
    """Score every row under every protocol; what there is is saved after each seed of each protocol."""
    parts: list[pd.DataFrame] = []
    for protocol in protocols:
        slides = expression.load_slides(protocol, data)
        fixed: dict[str, Any] = expression.base_rows(weights)
        base = fixed[BASE].make([])
        few = not simple or sum(slide.n_obs for slide in slides.values()) > MANY_SPOTS
        fixed = {name: row for name, row in fixed.items() if not few or name in (BASE, COORDINATES)}
        if not few:
            fixed["nearest spots by base features"] = Retrieval(base)
        first = expression.run_protocol(protocol, slides, fixed, against=BASE)
        parts.append(first.assign(seed=0))
        for seed in seeds:
            part = expression.run_protocol(protocol, slides, {BASE: fixed[BASE], **rows}, seed=seed, against=BASE)
            parts.append(part[~part["row"].isin(["gene mean", BASE])].assign(seed=seed))
            save(pd.concat(parts, ignore_index=True))
            print(protocol, seed, parts[-1].groupby("row", sort=False)["r"].mean().round(4).to_dict(), flush=True)


def show_expression(scores: pd.DataFrame) -> str:
    """Return the table: r, share of the ceiling, gain on the base row with its block-bootstrap interval."""
    lines = []
    for protocol, part in scores.groupby("protocol", sort=False):
        for row, one in part.groupby("row", sort=False):
            by_seed = one.groupby("seed")[["r", "r_hvg50", "mse", "share"]].mean()
            mean, spread = by_seed.mean(), by_seed.std().fillna(0.0)
            gain = one[["gain", "gain_low", "gain_high"]].mean()
            lines.append([
                protocol, row, len(by_seed), f"{mean['r']:.3f} ± {spread['r']:.3f}", f"{mean['r_hvg50']:.3f}",
                f"{mean['mse']:.4f}", f"{mean['share']:.0%}",
                f"{gain['gain']:+.3f} ({gain['gain_low']:+.3f} to {gain['gain_high']:+.3f})",
            ])  # fmt: skip
    return markdown(
        ["protocol", "row", "seeds", "r", "r, hvg50", "MSE", "share of ceiling", "gain on base (90 %)"], lines
    )


SHOW = {"expression": show_expression, "ablations": show_expression, "domains": domains.show, "transfer": transfer.show}
SEEDS = {"expression": 3, "ablations": 3, "domains": 5, "transfer": 3}


def report(name: str, out: Path, others: Sequence[Path], scores: pd.DataFrame) -> None:
    """Write the table with its scores and those of other runs."""
    scores = joined(scores, others, f"storm_{name}")
    seeds = sorted(int(seed) for seed in scores["seed"].unique())
    write(out / f"storm_{name}", {"seeds": seeds, "scores": scores.to_dict("records")}, SHOW[name](scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["expression", "ablations", "domains", "transfer"])
    parser.add_argument("--data", type=Path, help="folder with cache/ and h5ad/")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 checkpoint of the image tower and of the base row")
    parser.add_argument("--seeds", type=int, help="0 runs nothing and joins --take alone")
    parser.add_argument("--take", nargs="*", type=Path, default=[], help="folders of other runs, to be joined")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS)
    parser.add_argument("--rows", nargs="+", help="only learned rows whose names begin so")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.table != "transfer" and options.data is None:
        parser.error("--data is needed")
    if options.table in ("expression", "ablations") and options.weights is None:
        parser.error("--weights is needed: the base row is ridge on frozen MobileNetV2 features")
    save = partial(report, options.table, options.out, options.take)
    seeds = range(SEEDS[options.table] if options.seeds is None else options.seeds)
    if not seeds:
        save(pd.DataFrame())
    elif options.table == "domains":
        domains.domain_table(options.data, seeds, save)
    elif options.table == "transfer":
        transfer.transfer_table(seeds, save, data=options.data)
    else:
        ablations = options.table == "ablations"
        rows: Mapping[str, Any] = ablation_rows(options.weights) if ablations else storm_rows(options.weights)
        if options.rows:
            rows = {name: row for name, row in rows.items() if name.startswith(tuple(options.rows))}
        expression_table(
            options.protocols or (["her2st-C-loso", "mob-loso"] if ablations else PROTOCOLS),
            options.data, options.weights, rows, seeds, save, simple=not ablations,
        )  # fmt: skip


if __name__ == "__main__":
    main()
