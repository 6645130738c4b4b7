"""Components of the slides that STORM was adapted to: found among noise, saved, read from part of a panel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stfm as sf
from stfm.models._storm_fit import Sample
from stfm.models._storm_own import fit_own
from stfm.nn.gene_table import GeneTable

pytestmark = pytest.mark.filterwarnings("ignore::stfm.errors.StfmWarning")
WIDTH = 16 + 16  # own components, and those of storm-tiny


@pytest.fixture(scope="module")
def sections():
    adata = sf.datasets.toy(n_spots=150, n_patients=3)
    return [adata[adata.obs["patient"] == patient].copy() for patient in adata.obs["patient"].unique()]


@pytest.fixture(scope="module")
def model(sections):
    return sf.tl.train(sections[0], "storm-tiny", epochs=1, validation=None, config={"own_field": True})


@pytest.fixture(scope="module")
def adapted(sections, model):
    return sf.tl.train(sections[1], init=model, epochs=1, validation=None)


def embedded(adata, model, **options) -> np.ndarray:
    return sf.tl.embed(adata, model, copy=True, **options).obsm["X_stfm"]


def test_an_adapted_model_has_them_and_comes_back_bit_equal(sections, model, adapted, tmp_path):
    assert model.own is None
    before, after = embedded(sections[1], model), embedded(sections[1], adapted)
    assert before.shape[1] == 16
    assert after.shape[1] == WIDTH
    again = sf.models.load(adapted.save(tmp_path / "m"))
    np.testing.assert_array_equal(embedded(sections[1], again), after)
    np.testing.assert_allclose(embedded(sections[1], adapted, batch_size=7), after, atol=1e-5)
    # What pretraining knew weighs less than what the slide says of itself.
    own, known = (float(part.var(axis=0).sum()) for part in (after[:, :16], after[:, 16:]))
    assert 0.01 < known / own < 0.5
    assert embedded(sections[0], adapted).shape[1] == WIDTH


def test_another_slide_replaces_them_and_one_that_was_seen_does_not(sections, adapted):
    short = {"epochs": 1, "validation": None, "stage": "mask"}
    further = sf.tl.train(sections[2], init=adapted, tune="head", **short)
    assert float(further.own.known) != float(adapted.own.known)
    assert embedded(sections[2], further).shape[1] == WIDTH
    again = sf.tl.train(sections[1], init=adapted, **short)
    torch.testing.assert_close(again.own.embedding, adapted.own.embedding, rtol=0.0, atol=0.0)
    assert len(list(further.own.parameters())) == 0


def test_h_and_e_alone_and_part_of_a_panel(sections, adapted):
    whole = sections[1]
    shown = whole[:, :0].copy()
    image = embedded(shown, adapted)
    assert image.shape == (whole.n_obs, WIDTH)
    assert np.isfinite(image).all()
    part = embedded(whole[:, ::2].copy(), adapted)
    full = embedded(whole, adapted)
    r = [np.corrcoef(part[:, i], full[:, i])[0, 1] for i in range(2)]
    assert min(r) > 0.8


def test_models_that_do_not_look_at_a_slide_go_without(sections):
    start = sf.tl.train(sections[0], "storm-tiny", epochs=1, validation=None)
    assert sf.tl.train(sections[1], init=start, epochs=1, validation=None).own is None


def tissue(n_genes: int) -> tuple[Sample, np.ndarray]:
    """Return a square of spots with one programme over it, in noise that each spot has for itself."""
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), axis=-1).reshape(-1, 2) * 100
    programme = np.sin(coords[:, 0] / 400)
    single = rng.normal(size=400) * 1.2
    x = 3 + 0.3 * (programme[:, None] * rng.normal(size=n_genes) + single[:, None] * rng.normal(size=n_genes))
    x = torch.from_numpy((x + 0.3 * rng.normal(size=x.shape)).astype(np.float32))
    slide = torch.zeros(400, dtype=torch.int64)
    return Sample(x, torch.full((400,), 1e4), None, slide, [coords]), programme


def test_they_are_what_neighbours_share():
    sample, programme = tissue(60)
    table = GeneTable(60, 4, likelihood="gaussian").requires_grad_(False)
    table.fit(sample.x, sample.totals)
    own = fit_own(table, sample)
    assert own.genes.tolist() == list(range(60))
    assert abs(np.corrcoef(own.read(sample.x)[:, 0].numpy(), programme)[0, 1]) > 0.95
    assert abs(np.corrcoef(table.read(sample.x)[:, 0].numpy(), programme)[0, 1]) < 0.5
    told = table.read(sample.x) @ own.told
    assert abs(np.corrcoef(told[:, 0].numpy(), programme)[0, 1]) > 0.9


def test_a_handful_of_genes_has_none():
    sample, _ = tissue(16)
    table = GeneTable(16, 4, likelihood="gaussian").requires_grad_(False)
    table.fit(sample.x, sample.totals)
    assert fit_own(table, sample) is None
