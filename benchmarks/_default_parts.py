"""The parts of the benchmark of the default model: each yields lines of scores and lines of gains as they come."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _default_rows as rows
import _default_scores as scores
import _expression as expression
import numpy as np
import storm
from _default_rows import ADAPTED, DEFAULT, RANDOM, Rows
from _storm_domains import CLUSTER

import stfm as sf
from stfm.errors import StfmWarning
from stfm.inference.domains import cluster, majority
from stfm.inference.expression import fit_expression
from stfm.inference.rings import ring_graphs, ring_means
from stfm.slide import Slide
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Vocabulary

Lines = list[dict[str, Any]]
Step = Iterator[tuple[Lines, Lines]]

BASE = "base: MobileNetV2, contexts + rings, ridge"
TOWER = "the default's own tower, contexts + rings, ridge"
RANDOM_TOWER = "random tower, contexts + rings, ridge"
SCRATCH_BULBS = "STORM from scratch on mob 1, 2"
N_COMPONENTS = 30


@dataclass(frozen=True)
class Setting:
    """What every part is given."""

    made: Rows
    seeds: Sequence[int]
    weights: Path


def domains(setting: Setting) -> Step:
    """Spatial domains of every row by one clustering; the gain is that of the default on each row, in ARI."""
    made = setting.made
    for name in rows.LABELLED_SLIDES:
        found: dict[str, list[np.ndarray]] = {}
        for row in rows.DOMAIN_ROWS:
            lines = [_domain_line(made, row, name, seed, found.setdefault(row, [])) for seed in setting.seeds]
            won = scores.ari_gain(made.truth(name), found[DEFAULT], found[row], made.adata(name).obsm["spatial"])
            yield lines, [] if row == DEFAULT else [{"slide": name, "row": row, "score": "ARI", **won}]


def _domain_line(made: Rows, row: str, name: str, seed: int, found: list[np.ndarray]) -> dict[str, Any]:
    coords, truth = made.adata(name).obsm["spatial"], made.truth(name)
    labels = cluster(made.parts(row, name, seed)["joint"], int(truth.max()) + 1, rng=seed, **CLUSTER)
    if row == rows.TWICE:
        labels = majority(labels, ring_graphs(coords, 1)[0])
    found.append(labels)
    scored = sf.metrics.domain_scores(made.adata(name).obs["label"], labels)
    return {"slide": name, "row": row, "seed": seed, **{key: scored[key] for key in ("ARI", "NMI", "AMI")}}


def annotation(setting: Setting) -> Step:
    """Annotation from few spots a class; the gain is that of the default on each row, in accuracy."""
    made = setting.made
    for name in rows.LABELLED_SLIDES:
        ours: dict[int, np.ndarray] = {}
        for row in rows.ANNOTATION_ROWS:
            if row == rows.IMAGE and name not in rows.WITH_IMAGE:
                continue
            lines, right = _annotated(setting, row, name)
            if row == DEFAULT:
                ours = right
            coords = made.adata(name).obsm["spatial"]
            yield (
                lines,
                [
                    {
                        "slide": name,
                        "row": row,
                        "score": f"accuracy, {n}",
                        **scores.mean_gain(ours[n], right[n], coords),
                    }
                    for n in scores.LABELLED
                    if row != DEFAULT
                ],
            )


def _annotated(setting: Setting, row: str, name: str) -> tuple[Lines, dict[int, np.ndarray]]:
    """Return a line a seed (where the row has any) and number of labelled spots, and how often each spot was right."""
    made, truth = setting.made, setting.made.truth(name)
    lines: Lines = []
    right: dict[int, list[np.ndarray]] = {n: [] for n in scores.LABELLED}
    for seed in setting.seeds if row in rows.DRAWN else setting.seeds[:1]:
        for n in scores.LABELLED:
            accuracy, f1, hits = scores.annotate(made.parts(row, name, seed)["joint"], truth, n)
            right[n].append(hits)
            lines.append({
                "slide": name, "row": row, "seed": seed, "labelled": n, "accuracy": float(np.mean(accuracy)),
                "accuracy_spread": float(np.std(accuracy)), "f1": float(np.mean(f1)), "f1_spread": float(np.std(f1)),
            })  # fmt: skip
    return lines, {n: np.mean(all_seeds, axis=0) for n, all_seeds in right.items()}


# Expression and retrieval ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """Training slides, the slide that is tested, and the genes of ``hvg250`` that the default writes.

    Attributes
    ----------
    names, symbols
        The genes as the slides and as the default name them.
    truth
        Log-normalised expression on the training slides and, last, the tested one.
    """

    train: list[Slide]
    adata: Any
    test: Slide
    names: list[str]
    symbols: list[str]
    truth: list[np.ndarray]

    @classmethod
    def of(cls, made: Rows, train: Sequence[str], test: str) -> Fold:
        """Choose the genes on the training slides."""
        slides = [rows.as_slide(made.adata(name)) for name in train]
        adata = made.adata(test)
        target = rows.as_slide(adata)
        names, truth = expression.fold_targets(slides, [target])
        symbols = written_as(made.model, target, names)
        kept = [i for i, symbol in enumerate(symbols) if symbol is not None]
        return cls(
            slides, adata, target, [names[i] for i in kept], [s for s in symbols if s is not None],
            [table[:, kept] for table in truth],
        )  # fmt: skip

    def score(
        self, guess: np.ndarray, measured: np.ndarray | None = None, slide: Slide | None = None
    ) -> dict[str, Any]:
        """Return the scores of a prediction of the tested slide, or of a part of it."""
        ceiling = expression.slide_ceiling(slide or self.test, self.names)
        return expression.score(self.truth[-1] if measured is None else measured, guess, ceiling)


def written_as(model: sf.models.Model, slide: Slide, names: Sequence[str]) -> list[str | None]:
    """Return the name by which a model writes each gene of a slide; None where it does not."""
    columns = match_genes(slide.panel, Vocabulary(np.array(names)), min_fraction=0.0)
    column_of = dict(zip(columns.target_index, columns.source_index, strict=True))
    match = match_genes(slide.panel, model.vocabulary, min_fraction=0.0)
    learned = model.written_genes()
    place = {s: t for s, t in zip(match.source_index, match.target_index, strict=True) if learned[t]}
    places = [place.get(column_of.get(i)) for i in range(len(names))]
    return [None if at is None else str(model.vocabulary.names[at]) for at in places]


def predicted(model: sf.models.Model, adata: Any, fold: Fold) -> np.ndarray:
    """Return what a model writes from the H&E of a slide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StfmWarning)
        told = sf.tl.predict_expression(adata, model=model, genes=fold.symbols, copy=True)
    return told.obsm["predicted_expression"].to_numpy()


def expression_rows(
    setting: Setting, fold: Fold, frozen: Mapping[str, expression.Row]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield name, seed and prediction of every row; the default first."""
    model = setting.made.model
    yield DEFAULT, 0, predicted(model, fold.adata, fold)
    yield "gene mean", 0, np.tile(np.concatenate(fold.truth[:-1]).mean(axis=0), (fold.test.n_obs, 1))
    for name, row in {"coordinates only, ridge": expression.coordinates_row(), **frozen}.items():
        yield name, 0, expression.predict_fold(row, fold.train, [fold.test], fold.truth[:-1], fold.names)[0]
    for seed in setting.seeds:
        drawn = rows.random_weights(model, seed)
        yield f"{RANDOM}, zero-shot", seed, predicted(drawn, fold.adata, fold)
        if frozen:
            row = tower_row(drawn)
            guess = expression.predict_fold(row, fold.train, [fold.test], fold.truth[:-1], fold.names)[0]
            yield RANDOM_TOWER, seed, guess
            learned = storm.Storm(setting.weights).fit(fold.train, fold.names, seed)
            yield SCRATCH_BULBS, seed, learned(fold.test)


def tower_row(model: sf.models.Model) -> expression.Row:
    """Return ridge on a model's own image tower, at the size of tiles that the model sees."""
    return expression.encoder_row(model.image.encoder, tile_px=model.config.spot_px)


def frozen_rows(setting: Setting) -> dict[str, expression.Row]:
    """Return ridge on each frozen encoder that can be had."""
    from stfm.encoders.build import build_encoder

    return {
        BASE: expression.encoder_row(build_encoder("mobilenetv2", weights=setting.weights, mode="frozen")),
        TOWER: tower_row(setting.made.model),
        "handcrafted, contexts + rings, ridge": expression.encoder_row(
            build_encoder("handcrafted", mode="frozen"), tile_px=112
        ),
    }


def from_image(setting: Setting) -> Step:
    """Expression from H&E; the gain is that of the default on each row, in r."""
    bulb = Fold.of(setting.made, ["mob:1", "mob:2"], "mob:3")
    cortex = Fold.of(setting.made, ["dlpfc:151673", "dlpfc:151674"], "dlpfc:151675")
    for name, fold, frozen in (("mob:3", bulb, frozen_rows(setting)), ("dlpfc:151675", cortex, {})):
        ours = np.empty(0)
        for row, seed, guess in expression_rows(setting, fold, frozen):
            where = {"slide": name, "row": row, "seed": seed, "genes": len(fold.names)}
            if row == DEFAULT:
                ours = guess
            won = scores.expression_gain(fold.truth[-1], ours, guess, fold.test.coords)
            line = {**where, **fold.score(guess)}
            yield [line], [] if row == DEFAULT else [{"slide": name, "row": row, "seed": seed, "score": "r", **won}]


def components(fold: Fold, row: expression.Row, *, smoothed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return principal components of the tested slide as ridge on frozen features tells them, and as they are."""
    from sklearn.decomposition import PCA

    slides = [*fold.train, fold.test]
    shared = Vocabulary.from_panels([slide.panel for slide in slides], mode="intersection")
    _, tables = expression.named_targets(slides, [str(name) for name in shared.names])
    pca = PCA(N_COMPONENTS, random_state=0).fit(np.concatenate(tables[:-1]))
    found = [pca.transform(table).astype(np.float32) for table in tables]
    if smoothed:
        found = [ring_means(x, ring_graphs(s.coords, 1)[0], with_self=True) for x, s in zip(found, slides, strict=True)]
    make = row.make([])
    features = [make(slide) for slide in slides]
    names = [f"PC{i + 1}" for i in range(N_COMPONENTS)]
    fitted = fit_expression(
        features[:-1], found[:-1], names, ranks=(None,), coords=[slide.coords for slide in fold.train]
    )
    return fitted.predict(features[-1]), found[-1]


def retrieval_rows(setting: Setting, fold: Fold) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Yield name, seed and both sides of every row; the default first."""
    made = setting.made
    found = made.parts(DEFAULT, "mob:3", 0)
    yield DEFAULT, 0, found["image"], found["gene"]
    for name, row in frozen_rows(setting).items():
        title = name.partition(",")[0].removeprefix("base: ")
        yield f"PCA 30, told from {title} by ridge", 0, *components(fold, row, smoothed=False)
        yield (
            f"PCA 30 averaged over self + ring 1, told from {title} by ridge",
            0,
            *components(fold, row, smoothed=True),
        )
    for seed in setting.seeds:
        found = made.parts(RANDOM, "mob:3", seed)
        yield RANDOM, seed, found["image"], found["gene"]
        trained = storm.Storm(setting.weights, recipe={"stage": "both"}).train(fold.train, fold.names, seed)
        found = rows.embed(trained, fold.adata, "mob:3")
        yield SCRATCH_BULBS, seed, found["image"], found["gene"]


def retrieval(setting: Setting) -> Step:
    """Cross-modal retrieval on mob:3; the gain is that of the default on each row, in recall@5 of both directions."""
    fold = Fold.of(setting.made, ["mob:1", "mob:2"], "mob:3")
    ours = np.empty(0)
    for row, seed, image, gene in retrieval_rows(setting, fold):
        hits = scores.retrieve(image, gene)
        if row == DEFAULT:
            ours = at_five(hits)
        won = scores.mean_gain(ours, at_five(hits), fold.test.coords)
        gains = [] if row == DEFAULT else [{"slide": "mob:3", "row": row, "seed": seed, "score": "recall@5", **won}]
        yield scores.recall_lines(hits, slide="mob:3", row=row, seed=seed), gains


def at_five(hits: Mapping[str, Mapping[int, np.ndarray]]) -> np.ndarray:
    """Return recall@5 of every spot, the mean of both directions."""
    return np.mean([hits[way][5] for way in scores.DIRECTIONS], axis=0)


# Adaptation --------------------------------------------------------------------------------------------------------


def adapting(setting: Setting) -> Step:
    """What ``sf.tl.train(adata, init=model)`` adds; the gain is that of the adapted model on the default as it ships.

    Domains and annotation on the slide itself; expression and retrieval on the half of mob:3 that was not trained on.
    """
    made = setting.made
    whole = {"what": "time", "slide": "mob:3", "row": ADAPTED, "seed": 0, "n_obs": made.adata("mob:3").n_obs}
    yield [{**whole, "seconds": rows.adapt(made.model, made.adata("mob:3"), "mob:3", 0)[1]}], []
    yield from _adapted_halves(setting)
    for name in rows.LABELLED_SLIDES:
        found: dict[str, list[np.ndarray]] = {DEFAULT: [], ADAPTED: []}
        lines: Lines = []
        for row in (DEFAULT, ADAPTED):
            for seed in setting.seeds:
                line = _domain_line(made, row, name, seed, found[row])
                seconds = made.seconds.get((name, seed)) if row == ADAPTED else None
                lines.append({**line, "what": "domains", "seconds": seconds, "n_obs": len(made.truth(name))})
        won = scores.ari_gain(made.truth(name), found[ADAPTED], found[DEFAULT], made.adata(name).obsm["spatial"])
        gains = [{"what": "domains", "slide": name, "row": ADAPTED, "score": "ARI", **won}]
        (before, hits), (after, better) = (_annotated(setting, row, name) for row in (DEFAULT, ADAPTED))
        lines += [{**line, "what": "annotation"} for line in (*before, *after)]
        gains += [
            {"what": "annotation", "slide": name, "row": ADAPTED, "score": f"accuracy, {n}",
             **scores.mean_gain(better[n], hits[n], made.adata(name).obsm["spatial"])}
            for n in scores.LABELLED
        ]  # fmt: skip
        yield lines, gains


def _adapted_halves(setting: Setting) -> Step:
    made = setting.made
    fold = Fold.of(made, ["mob:1", "mob:2"], "mob:3")
    parts = rows.halves(fold.adata)
    for seed in setting.seeds:
        for side, other in (("left", "right"), ("right", "left")):
            adapted, seconds = rows.adapt(made.model, parts[side], "mob:3", seed)
            test = rows.as_slide(parts[other])
            (measured,) = _targets(fold, test)
            name = f"mob:3, {other} half"
            where = {"slide": name, "seed": seed}
            guesses, hits = {}, {}
            lines: Lines = []
            for row, model in ((DEFAULT, made.model), (ADAPTED, adapted)):
                cost = {"row": row, "seconds": seconds if row == ADAPTED else None, "n_obs": parts[side].n_obs}
                guesses[row] = predicted(model, parts[other], fold)
                told = fold.score(guesses[row], measured, test)
                lines.append({**where, **cost, "what": "expression", "genes": len(fold.names), **told})
                found = rows.embed(model, parts[other], "mob:3")
                hits[row] = scores.retrieve(found["image"], found["gene"])
                lines += scores.recall_lines(hits[row], **where, **cost, what="retrieval")
            won = scores.expression_gain(measured, guesses[ADAPTED], guesses[DEFAULT], test.coords)
            more = scores.mean_gain(at_five(hits[ADAPTED]), at_five(hits[DEFAULT]), test.coords)
            yield (
                lines,
                [
                    {**where, "what": "expression", "row": ADAPTED, "score": "r", **won},
                    {**where, "what": "retrieval", "row": ADAPTED, "score": "recall@5", **more},
                ],
            )


def _targets(fold: Fold, slide: Slide) -> list[np.ndarray]:
    """Return the measured values of the fold's genes on a part of the tested slide."""
    rows_of = {str(name): i for i, name in enumerate(fold.test.obs_names)}
    return [fold.truth[-1][[rows_of[str(name)] for name in slide.obs_names]]]
