"""Expression from H&E under the protocols of ``sf.metrics.protocols()``: rows that every learned model stands beside.

A row is a recipe: from the training slides it makes a function that gives the features of a slide, on which ridge (or
the MLP) is fitted. The test slides are touched when they are scored, and not before.

    slides = load_slides("her2st-C-loso", data)
    table = run_protocol("her2st-C-loso", slides, {"coordinates": coordinates_row(), "base": encoder_row(encoder)})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

import stfm as sf
from stfm.inference.contexts import context_features, surround
from stfm.inference.expression import RANKS, fit_expression
from stfm.slide import Slide, as_slides
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Vocabulary
from stfm.slide.normalise import log_normalise

Features = Callable[[Slide], np.ndarray]


@dataclass(frozen=True)
class Row:
    """How features are made from the training slides, and what is fitted on them."""

    make: Callable[[Sequence[Slide]], Features]
    method: str = "ridge"
    ranks: tuple[int | None, ...] = (None,)
    n_components: int = 256
    rings: int = 0
    rule: str = "best"


def load_slides(protocol: str, data: Path | None = None) -> dict[str, Slide]:
    """Read the sections of a protocol as slides.

    ``data`` is a folder with ``cache`` (files as their repositories have them) and ``h5ad``; without it her2st and MOB
    are fetched into the cache of stfm, and the DLPFC sections cannot be read.
    """
    spec = sf.metrics.get_protocol(protocol)
    slides = {}
    for section in spec.sections:
        if spec.dataset == "dlpfc":
            if data is None:
                raise SystemExit("the DLPFC sections have no public home that stfm fetches from; name them with --data")
            adata = read_dlpfc(data, section)
        elif data is None:
            adata = sf.datasets.load(f"{spec.dataset}:{section}")
        else:
            with sf.settings.override(cache_dir=data / "cache", offline=True):
                adata = sf.datasets.load(f"{spec.dataset}:{section}")
        slides[section] = as_slides(adata)[0]
    return slides


def read_dlpfc(data: Path, section: str) -> Any:
    """Read a DLPFC section; µm/px follow from the lattice (the spot diameter of these files is wrong)."""
    import anndata as ad

    adata = ad.read_h5ad(data / "h5ad" / f"dlpfc_{section}.h5ad")
    adata.obs["library_id"], adata.obs["patient"] = section, "Br8100"
    adata.uns["spatial"][section]["scalefactors"].pop("spot_diameter_fullres", None)
    return adata


def coordinates_row(degree: int = 3) -> Row:
    """Coordinates only: polynomials of the place on the slide, which know nothing of the image."""

    def features(slide: Slide) -> np.ndarray:
        xy = slide.coords[:, :2]
        xy = 2 * (xy - xy.min(axis=0)) / np.maximum(np.ptp(xy, axis=0), 1e-9) - 1
        powers = [xy[:, 0] ** i * xy[:, 1] ** j for i in range(degree + 1) for j in range(degree + 1 - i) if i + j]
        return np.column_stack(powers).astype(np.float32)

    return Row(lambda _train: features)


def encoder_row(
    encoder: Any, *, contexts_um: Sequence[float] | None = None, rings: int = 2, tile_px: int = 224, **row: Any
) -> Row:
    """Features of a frozen encoder at several contexts, with the means of rings 1 and 2 (the base row)."""

    def features(slide: Slide) -> np.ndarray:
        sizes = contexts_um
        if sizes is None:
            sizes = (448.0, 1120.0) if slide.tiles.native_mpp > 7 else (112.0, 224.0, 448.0)
        return context_features(slide, encoder, contexts_um=sizes, rings=rings, tile_px=tile_px)

    return Row(lambda _train: features, **row)


def base_rows(weights: Path, *, seed: int = 0) -> dict[str, Row]:
    """Rows that a learned one stands beside: coordinates, handcrafted, random weights, and the base row."""
    import torch

    torch.manual_seed(seed)
    from stfm.encoders.build import build_encoder

    handcrafted = build_encoder("handcrafted", mode="frozen")
    trained = build_encoder("mobilenetv2", weights=weights, mode="frozen")
    untrained = build_encoder("mobilenetv2", mode="frozen")
    return {
        "coordinates only, ridge": coordinates_row(),
        "handcrafted, one 224-µm tile, ridge": encoder_row(handcrafted, contexts_um=(224.0,), rings=0),
        "random weights, base features, ridge": encoder_row(untrained),
        "base: MobileNetV2, contexts + rings, ridge": encoder_row(trained),
        "base features, penalty by one standard error": encoder_row(trained, rule="one_se"),
        "base features, rank chosen": encoder_row(trained, ranks=RANKS),
        "base features, MLP": encoder_row(trained, method="mlp"),
    }


class Direct(Protocol):
    """A row that predicts by itself instead of giving features."""

    def fit(self, slides: Sequence[Slide], genes: Sequence[str], seed: int) -> Features:
        """Return what predicts log-normalised expression of the genes from the H&E of a slide."""
        ...


def run_protocol(
    protocol: str,
    slides: Mapping[str, Slide],
    rows: Mapping[str, Row | Direct],
    *,
    genes: str = "hvg250",
    seed: int = 0,
    against: str | None = None,
) -> pd.DataFrame:
    """Return a table with a line a row and test section: r, r of the 50 most variable genes, MSE, ceiling, share.

    ``against`` names a row: the table then holds each row's gain on it, with the central 90 % of a block bootstrap.
    """
    spec = sf.metrics.get_protocol(protocol)
    lines = []
    for fold in spec.folds:
        train, test = [slides[name] for name in fold.train], [slides[name] for name in fold.test]
        names, truth = fold_targets(train, test, genes)
        mean = np.concatenate(truth[: len(train)]).mean(axis=0)
        guesses: dict[str, list[np.ndarray]] = {"gene mean": [np.tile(mean, (s.n_obs, 1)) for s in test]}
        for name, row in rows.items():
            guesses[name] = predict_fold(row, train, test, truth[: len(train)], names, seed=seed)
        for i, slide in enumerate(test):
            measured = truth[len(train) + i]
            ceiling = slide_ceiling(slide, names)
            for name, guess in guesses.items():
                line = {"protocol": protocol, "section": slide.name, "row": name, **score(measured, guess[i], ceiling)}
                if against is not None:
                    line |= gain_on(measured, guess[i], guesses[against][i], slide.coords)
                lines.append(line)
    return pd.DataFrame(lines)


def gain_on(
    measured: np.ndarray, guess: np.ndarray, base: np.ndarray, coords: np.ndarray, *, n_draws: int = 200
) -> dict[str, float]:
    """Return the gain in mean r on another prediction of the same section, and its interval over draws of blocks.

    Neighbouring spots are alike, so whole blocks (6 x 6 over the section) are drawn with replacement, alike for both.
    """
    unit = (coords[:, :2] - coords[:, :2].min(axis=0)) / np.maximum(np.ptp(coords[:, :2], axis=0), 1e-9)
    block = np.minimum((unit * 6).astype(int), 5) @ np.array([6, 1])
    members = [np.flatnonzero(block == b) for b in np.unique(block)]
    rng = np.random.default_rng(0)

    def gain(spots: np.ndarray) -> float:
        r = [sf.metrics.gene_pearson(measured[spots], p[spots]).mean() for p in (guess, base)]
        return float(r[0] - r[1])

    draws = [
        gain(np.concatenate([members[b] for b in rng.integers(len(members), size=len(members))]))
        for _ in range(n_draws)
    ]
    low, high = np.quantile(draws, [0.05, 0.95])
    return {"gain": gain(np.arange(len(measured))), "gain_low": float(low), "gain_high": float(high)}


def predict_fold(
    row: Row | Direct,
    train: Sequence[Slide],
    test: Sequence[Slide],
    targets: Sequence[np.ndarray],
    genes: Sequence[str],
    *,
    seed: int = 0,
) -> list[np.ndarray]:
    """Fit a row on the training slides and predict the test slides."""
    if not isinstance(row, Row):
        predict = row.fit(train, genes, seed)
        return [predict(slide) for slide in test]
    make = row.make(train)
    features = {slide.name: surround(make(slide), slide.coords, row.rings) for slide in (*train, *test)}
    fitted = fit_expression(
        [features[s.name] for s in train], targets, genes, method=row.method, ranks=row.ranks,
        n_components=row.n_components, rule=row.rule, coords=[s.coords for s in train], rng=seed,
    )  # fmt: skip
    return [fitted.predict(features[s.name]) for s in test]


def fold_targets(
    train: Sequence[Slide], test: Sequence[Slide], genes: str = "hvg250"
) -> tuple[list[str], list[np.ndarray]]:
    """Choose the genes on the training slides among those that every slide measured; return them and all targets."""
    every = [*train, *test]
    shared = Vocabulary.from_panels([slide.panel for slide in every], mode="intersection")
    counts = [match_genes(s.panel, shared, min_fraction=0.0).take(s.counts.to_csr()) for s in every]
    totals = [slide.counts.totals() for slide in every]
    chosen = sf.metrics.select_genes(counts[: len(train)], genes, totals=totals[: len(train)])
    tables = [log_normalise(c[:, chosen], t).toarray() for c, t in zip(counts, totals, strict=True)]
    return [str(name) for name in shared.names[chosen]], tables


def named_targets(slides: Sequence[Slide], genes: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Return named genes that every slide measured, and ``log1p(1e4 c / sum c)`` of them on each slide."""
    wanted = Vocabulary(np.array(genes))
    tables = []
    for slide in slides:
        match = match_genes(slide.panel, wanted, min_fraction=0.0)
        tables.append(log_normalise(match.take(slide.counts.to_csr()), slide.counts.totals()).toarray())
    return list(genes), tables


def slide_ceiling(slide: Slide, genes: Sequence[str]) -> np.ndarray:
    """Return the noise ceiling of each gene on a slide."""
    match = match_genes(slide.panel, Vocabulary(np.array(genes)), min_fraction=0.0)
    columns = np.empty(len(genes), np.int64)
    columns[match.target_index] = match.source_index
    return sf.metrics.noise_ceiling(slide.counts.to_csr(), columns=columns)


def score(measured: np.ndarray, predicted: np.ndarray, ceiling: np.ndarray) -> dict[str, float]:
    """Return the scores of one section; genes stand in falling order of variance on the training sections."""
    r = sf.metrics.gene_pearson(measured, predicted)
    return {
        "r": float(r.mean()),
        "r_hvg50": float(r[:50].mean()),
        "mse": float(sf.metrics.gene_mse(measured, predicted).mean()),
        "ceiling": float(ceiling.mean()),
        "share": float(r.mean() / ceiling.mean()),
    }


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over test sections, a line a row and protocol, in the order of the rows."""
    order = list(dict.fromkeys(table["row"]))
    columns = ["r", "r_hvg50", "mse", "ceiling", "share"]
    means = table.groupby(["protocol", "row"], sort=False)[columns].mean()
    return means.reindex(pd.MultiIndex.from_product([list(dict.fromkeys(table["protocol"])), order])).dropna(how="all")
