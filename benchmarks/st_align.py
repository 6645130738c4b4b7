"""The three tables of the ST-Align paper in form: spatial domains, expression from H&E, ablations.

Every learned row is trained here, from scratch, by ``sf.tl.train``, and stands beside simple rows under the same
protocol. Settings were chosen on training sections only (docs/decisions.md); the test sections are scored and no more.

    python benchmarks/st_align.py domains     --data DATA [--seeds 3] [--mode zero-shot self]
    python benchmarks/st_align.py expression  --data DATA --weights mobilenet_v2_float.safetensors
    python benchmarks/st_align.py spots       --data DATA --weights ...   (the paper's own 80 / 20 split)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import _domains as domains
import _expression as expression
import numpy as np
import pandas as pd
from _common import joined, write
from _common import table as markdown

import stfm as sf
from stfm.encoders.build import build_encoder
from stfm.inference.expression import RANKS
from stfm.inference.expression_slides import SlideFeatures
from stfm.slide import Slide, as_slides

DLPFC = ("151673", "151674", "151675")
PROTOCOLS = ("her2st-C-loso", "her2st-C-to-B4", "mob-loso", "mob-animal1-to-2", "mob-animal2-to-1", "dlpfc-loso")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Learned:
    """A row that is trained: a registered model, changes of its configuration, changes of its recipe."""

    model: str = "st-align-small"
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def train(self, slides: Sequence[Slide], seed: int, **changes: Any) -> Any:
        """Train on slides, all of their spots, for the whole recipe; nothing is held out to choose an epoch."""
        config = {**self.config, **changes}
        return sf.tl.train(
            list(slides), self.model, config=config, genes="all", validation=None, rng=seed, **dict(self.recipe)
        )


def learned_rows(recipe: Mapping[str, Any]) -> dict[str, Learned]:
    """ST-Align, its ablations (Table 2 of the paper), and the two baselines of the paper."""
    st_align = partial(Learned, recipe=recipe)
    return {
        "ST-Align": st_align(),
        "ST-Align, untrained (as it starts)": st_align(recipe={**recipe, "lr": 1e-12, "epochs": 1}),
        "CLIP (spot image, spot genes)": Learned("clip-small", recipe=recipe),
        "PLIP (handcrafted H&E tower frozen)": Learned("plip-small", recipe=recipe),
        "ST-Align without L_NS": st_align(config={"ablation": "no-ns"}),
        "ST-Align without adaptive encoders": st_align(config={"ablation": "no-ae"}),
        "ST-Align without ABFN (concatenation)": st_align(config={"ablation": "no-abfn"}),
        "concatenation of frozen encoders": st_align(config={"ablation": "concat"}),
        "ST-Align, spot level only": st_align(config={"ablation": "spot"}),
        "ST-Align, niche level only": st_align(config={"ablation": "niche"}),
    }


# ---- domains (Table 1)


def domain_table(
    data: Path,
    rows: Mapping[str, Learned],
    seeds: Iterable[int],
    modes: Sequence[str],
    save: Callable[[pd.DataFrame], None],
) -> pd.DataFrame:
    """ARI of every row on every section; learned rows once for each seed, simple ones clustered with each seed.

    What there is is saved after each seed, so that a run that is cut short leaves a table of fewer seeds.
    """
    slides = {name: expression.read_dlpfc(data, name) for name in DLPFC}
    simple = {**domains.simple_rows(), "image only (handcrafted)": domains.DomainRow(image_embedding)}
    parts = [domains.run_domains(slides, simple, seeds=seeds).assign(mode="no training")]
    for seed in seeds:
        for mode in modes:
            for title, row in rows.items():
                parts.append(learned_domains(slides, title, row, seed, mode))
                print(mode, title, seed, parts[-1].groupby("slide")["ARI"].mean().round(3).to_dict(), flush=True)
        save(pd.concat(parts, ignore_index=True))
    return pd.concat(parts, ignore_index=True)


def learned_domains(slides: Mapping[str, Any], title: str, row: Learned, seed: int, mode: str) -> pd.DataFrame:
    """Train on the other sections (zero-shot) or on the section itself (self), embed, cluster, score."""
    scored = []
    for name, adata in slides.items():
        others = [as_slides(a)[0] for other, a in slides.items() if other != name]
        model = row.train(as_slides(adata) if mode == "self" else others, seed)
        embedded = adata.copy()
        sf.tl.embed(embedded, model)
        one = {title: domains.DomainRow(domains.from_obsm("X_stfm"))}
        scored.append(domains.run_domains({name: embedded}, one, seeds=[seed]))
    return pd.concat(scored).assign(mode=mode)


def image_embedding(adata: Any, _seed: int) -> np.ndarray:
    """Handcrafted statistics of each niche tile: what the picture says alone."""
    (slide,) = as_slides(adata, modalities=("image",))
    encoder = build_encoder("handcrafted", mode="frozen")
    return expression.context_features(slide, encoder, contexts_um=(448.0,), rings=1, tile_px=56)


def show_domains(scores: pd.DataFrame) -> str:
    """Return the table: a line a row, mean ± spread over seeds for each section, median over sections."""
    lines = []
    for (mode, row), part in scores.groupby(["mode", "row"], sort=False):
        mean = part.groupby("slide")["ARI"].mean()
        spread = part.groupby("slide")["ARI"].std().fillna(0.0)
        cells = [f"{mean[s]:.3f} ± {spread[s]:.3f}" for s in DLPFC]
        lines.append([row, mode, part["seed"].nunique(), *cells, f"{mean.mean():.3f}", f"{mean.median():.3f}"])
    return markdown(["row", "trained on", "seeds", *DLPFC, "mean", "median"], lines)


# ---- expression (Table 3)


def learned_row(row: Learned, base: Callable[[Slide], np.ndarray], seed: int, *, alone: bool = False) -> expression.Row:
    """Image features of a model trained on the training slides, and the paper's MLP on them.

    ``alone`` leaves out the features of the base row, which otherwise stand beside the model's own.
    """

    def make(train: Sequence[Slide]) -> Callable[[Slide], np.ndarray]:
        extract = SlideFeatures.of(row.train(train, seed), list(train), rings=1)

        def features(slide: Slide) -> np.ndarray:
            learned = extract(slide)
            return learned if alone else np.concatenate([base(slide), learned], axis=1)

        return features

    return expression.Row(make, method="mlp", ranks=RANKS)


def expression_table(
    data: Path,
    weights: Path,
    protocols: Sequence[str],
    learned: Mapping[str, Learned],
    seeds: Sequence[int],
    save: Callable[[pd.DataFrame], None],
) -> pd.DataFrame:
    """Scores of every row under every protocol; simple rows once, rows with randomness once for each seed."""
    parts = []
    for protocol in protocols:
        slides = expression.load_slides(protocol, data)
        rows = expression.base_rows(weights)
        base = rows["base: MobileNetV2, contexts + rings, ridge"].make([])
        fixed = {name: row for name, row in rows.items() if row.method == "ridge"}
        parts.append(expression.run_protocol(protocol, slides, fixed).assign(seed=0))
        for seed in seeds:
            random = {name: row for name, row in rows.items() if row.method != "ridge"}
            for name, row in learned.items():
                random[f"{name}: base + own features, MLP"] = learned_row(row, base, seed)
                random[f"{name}: own features, MLP"] = learned_row(row, base, seed, alone=True)
            part = expression.run_protocol(protocol, slides, random, seed=seed)
            parts.append(part[part["row"] != "gene mean"].assign(seed=seed))
        save(pd.concat(parts, ignore_index=True))
    return pd.concat(parts, ignore_index=True)


def show_expression(scores: pd.DataFrame) -> str:
    """Return the tables: r, r of the 50 most variable genes, MSE, share of the ceiling, difference to the base row."""
    lines = []
    for protocol, part in scores.groupby("protocol", sort=False):
        base = part[part["row"].str.startswith("base: ")].groupby("section")["r"].mean()
        for row, one in part.groupby("row", sort=False):
            by_seed = one.groupby("seed")[["r", "r_hvg50", "mse", "share"]].mean()
            mean, spread = by_seed.mean(), by_seed.std().fillna(0.0)
            gain = one.groupby("section")["r"].mean() - base
            error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
            lines.append([
                protocol, row, len(by_seed), f"{mean['r']:.3f} ± {spread['r']:.3f}", f"{mean['r_hvg50']:.3f}",
                f"{mean['mse']:.4f}", f"{mean['share']:.0%}", f"{gain.mean():+.3f} ± {error:.3f}",
            ])  # fmt: skip
    return markdown(["protocol", "row", "seeds", "r", "r, hvg50", "MSE", "share of ceiling", "gain on base"], lines)


# ---- the paper's own protocol (80 / 20)


def spots_table(data: Path, weights: Path, learned: Mapping[str, Learned], seeds: Sequence[int]) -> pd.DataFrame:
    """The paper's split: 80 % of the spots of a slide train, 20 % test. Neighbours of test spots train, so it leaks."""
    lines = []
    slides = expression.load_slides("her2st-C-loso", data)
    base = expression.base_rows(weights)["base: MobileNetV2, contexts + rings, ridge"].make([])
    for name, slide in slides.items():
        frozen = base(slide)
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(slide.n_obs)
            cut = int(0.8 * slide.n_obs)
            train, test = np.sort(order[:cut]), np.sort(order[cut:])
            genes, (truth_train, truth_test) = expression.fold_targets([slide.subset(train)], [slide.subset(test)])
            ceiling = expression.slide_ceiling(slide.subset(test), genes)
            features = {"base: MobileNetV2, contexts + rings": frozen}
            for title, row in learned.items():
                extract = SlideFeatures.of(row.train([slide.subset(train)], seed), [slide], rings=1)
                features[title] = np.concatenate([frozen, extract(slide)], axis=1)
            for title, values in features.items():
                for method in ("ridge", "mlp"):
                    fitted = expression.fit_expression(
                        [values[train]], [truth_train], genes, method=method, coords=[slide.coords[train]], rng=seed
                    )
                    scored = expression.score(truth_test, fitted.predict(values[test]), ceiling)
                    row_name = f"{title}, {method}"
                    lines.append({"protocol": "spots-80-20", "section": name, "row": row_name, "seed": seed, **scored})
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["domains", "expression", "spots"])
    parser.add_argument("--data", type=Path, required=True, help="folder with cache/ and h5ad/")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 checkpoint of the base row")
    parser.add_argument("--seeds", type=int, default=3, help="0 runs nothing and joins --take alone")
    parser.add_argument("--take", nargs="*", type=Path, default=[], help="folders of other runs, to be joined")
    parser.add_argument("--mode", nargs="+", default=["zero-shot", "self"], choices=["zero-shot", "self"])
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--rows", nargs="+", help="only these learned rows: names, or how names begin")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.table != "domains" and options.weights is None:
        parser.error("--weights is needed: the base row is ridge on frozen MobileNetV2 features")
    recipe = {} if options.epochs is None else {"epochs": options.epochs}
    rows = learned_rows(recipe)
    if options.rows:
        exact = [name for name in options.rows if name in rows]
        starts = tuple(part for part in options.rows if part not in rows)
        rows = {name: row for name, row in rows.items() if name in exact or (starts and name.startswith(starts))}
    seeds = list(range(options.seeds))
    save = partial(report, options.table, options.out, recipe, options.take)
    if not seeds:
        scores = pd.DataFrame()
    elif options.table == "domains":
        scores = domain_table(options.data, rows, seeds, options.mode, save)
    elif options.table == "spots":
        scores = spots_table(options.data, options.weights, rows, seeds)
    else:
        scores = expression_table(options.data, options.weights, options.protocols, rows, seeds, save)
    save(scores)


def report(table: str, out: Path, recipe: Mapping[str, Any], others: Sequence[Path], scores: pd.DataFrame) -> None:
    """Print the table and write it with its scores and those of other runs."""
    scores = joined(scores, others, f"st_align_{table}")
    text = show_domains(scores) if table == "domains" else show_expression(scores)
    print(text, flush=True)
    seeds = sorted(int(seed) for seed in scores["seed"].unique())
    write(
        out / f"st_align_{table}", {"seeds": seeds, "recipe": dict(recipe), "scores": scores.to_dict("records")}, text
    )


if __name__ == "__main__":
    main()
