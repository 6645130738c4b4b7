"""Genes are chosen on training slides, by how much they vary beyond noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_model import GENES, make_slide
from scipy import sparse

from stfm._errors import InputError
from stfm.slide.counts import Counts
from stfm.slide.genes import Vocabulary
from stfm.training.genes import gene_variability, make_vocabulary


def with_counts(slide, dense):
    return replace(slide, counts=Counts(sparse.csr_matrix(dense.astype(np.float32))))


def patterned(n=400, gene=3, seed=0):
    rng = np.random.default_rng(seed)
    rates = np.full((n, 12), 2.0)
    rates[:, 0] = 50.0  # abundant, but flat
    rates[: n // 2, gene] = 12.0
    return with_counts(make_slide(n=n, seed=seed), rng.poisson(rates))


def test_variability_is_one_for_noise_and_more_for_a_pattern():
    spread = gene_variability(patterned())
    flat = np.delete(spread, 3)
    assert spread[3] > 3
    assert np.all(flat < 1.5)
    assert np.median(flat) == pytest.approx(1, abs=0.2)


def test_variability_equals_the_plain_formula():
    slide = patterned(n=50)
    c = slide.counts.to_csr().toarray().astype(float)
    t = c.sum(1)
    mu = t[:, None] * c.sum(0) / t.sum()
    plain = ((c - mu) ** 2 / mu).sum(0) / 49 / (1 + mu.mean(0) / 100)
    np.testing.assert_allclose(gene_variability(slide), plain)


def test_the_most_variable_genes_are_kept_in_their_order():
    slides = [patterned(gene=3), replace(patterned(gene=3, seed=1), name="S2")]
    vocabulary = make_vocabulary(slides, 1)
    assert vocabulary.names.tolist() == ["GENE3"]
    assert make_vocabulary(slides, 5).names.tolist() == sorted(
        make_vocabulary(slides, 5).names, key=lambda g: int(g[4:])
    )


def test_all_names_and_vocabularies():
    slides = [make_slide()]
    assert make_vocabulary(slides, "all").names.tolist() == GENES.tolist()
    assert make_vocabulary(slides, 100).names.tolist() == GENES.tolist()
    assert make_vocabulary(slides, ["GENE1", "GENE5"]).names.tolist() == ["GENE1", "GENE5"]
    mine = Vocabulary(GENES)
    assert make_vocabulary(slides, mine) is mine


def test_guards():
    with pytest.raises(InputError, match="No training slide has counts"):
        make_vocabulary([make_slide(gene=False)])
    with pytest.raises(InputError, match="genes='hvg' is unknown"):
        make_vocabulary([make_slide()], "hvg")
    with pytest.raises(InputError, match="genes must be at least 1"):
        make_vocabulary([make_slide()], 0)
    with pytest.raises(InputError, match="has no counts to choose"):
        gene_variability(make_slide(gene=False))


def test_empty_genes_do_not_count():
    dense = np.random.default_rng(0).poisson(2.0, (30, 12))
    dense[:, 4] = 0
    assert gene_variability(with_counts(make_slide(n=30), dense))[4] == 0
