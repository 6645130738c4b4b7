"""Which genes a new model reads: chosen on training slides only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from stfm._errors import InputError
from stfm._validate import check_count
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stfm.slide.slide import Slide

__all__ = ["Genes", "gene_variability", "make_vocabulary"]

#: a number of genes, ``"all"``, names, or a vocabulary
Genes: TypeAlias = int | Literal["all"] | Sequence[str] | Vocabulary

#: overdispersion above which a gene's counts are held to be explained by its mean (negative binomial)
_THETA = 100.0
_MAX_SPOTS = 5000


def gene_variability(slide: Slide) -> NDArray[np.float64]:
    """Return how much each gene varies beyond sampling noise: chi² over degrees of freedom, float64 ``(g,)``.

    With counts c, totals t and p = sum(c) / sum(t), the expected counts are mu = p t; sum((c - mu)² / mu) needs the
    counts that are not zero only: sum(c² / t) / p - sum(mu). It is divided by ``1 + mean(mu) / theta``, the growth of
    the variance of a negative binomial with its mean, so that abundant genes do not win by abundance. 1 is noise.
    """
    if slide.counts is None:
        msg = f"slide {slide.name!r} has no counts to choose genes by."
        raise InputError(msg)
    n = slide.n_obs
    rows = np.arange(n) if n <= _MAX_SPOTS else np.linspace(0, n - 1, _MAX_SPOTS).astype(np.int64)
    counts = slide.counts.rows(rows).astype(np.float64)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    share = np.asarray(counts.sum(axis=0)).ravel() / max(totals.sum(), 1.0)
    per_row = np.repeat(np.where(totals > 0, totals, 1.0), np.diff(counts.indptr))
    squares = np.bincount(counts.indices, weights=counts.data**2 / per_row, minlength=counts.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        chi2 = squares / share - share * totals.sum()
    spread = chi2 / max(len(rows) - 1, 1) / (1 + share * totals.mean() / _THETA)
    return np.where(share > 0, spread, 0.0)


def make_vocabulary(slides: Sequence[Slide], genes: Genes = 2000) -> Vocabulary:
    """Return the vocabulary of a new model.

    Parameters
    ----------
    slides
        Training slides.
    genes
        A number: the genes that vary most beyond noise, by their mean rank over the slides (a slide that lacks a gene
        ranks it last). ``"all"``: every gene of any slide. Names, or a vocabulary: these.

    Returns
    -------
    The vocabulary.

    Raises
    ------
    InputError
        No slide has counts, or ``genes`` is none of the above.
    """
    if isinstance(genes, Vocabulary):
        return genes
    if isinstance(genes, Sequence) and not isinstance(genes, str):
        return Vocabulary(np.array([str(g) for g in genes]))
    panels = [s.panel for s in slides if s.panel is not None]
    if not panels:
        msg = "No training slide has counts, so there are no genes to read."
        raise InputError(msg)
    whole = Vocabulary.from_panels(panels)
    if isinstance(genes, str):
        if genes != "all":
            msg = f"genes={genes!r} is unknown: give a number, 'all', or a list of names."
            raise InputError(msg)
        return whole
    check_count("genes", genes)
    if len(whole) <= genes:
        return whole
    score = np.zeros(len(whole))
    for slide in slides:
        if slide.panel is not None:
            match = match_genes(slide.panel, whole, min_fraction=0.0)
            variability = np.zeros(len(whole))
            variability[match.target_index] = gene_variability(slide)[match.source_index]
            score += np.argsort(np.argsort(variability, kind="stable"), kind="stable")
    kept = np.sort(np.argsort(-score, kind="stable")[:genes])
    return Vocabulary(whole.names[kept], None if whole.ids is None else whole.ids[kept], whole.species)
