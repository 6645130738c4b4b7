"""Components of the slides that STORM was adapted to: found among noise, saved, read from part of a panel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stfm as sf
from stfm.models._sample import Sample
from stfm.models._storm_components import fit_components
from stfm.nn.gene_table import GeneTable

pytestmark = pytest.mark.filterwarnings("ignore::stfm.errors.StfmWarning")
WIDTH = 16 + 16  # own components, and those of storm-tiny


@pytest.fixture(scope="module")
def sections():
    adata = sf.datasets.toy(n_spots=150, n_patients=3)
    return [adata[adata.obs["patient"] == patient].copy() for patient in adata.obs["patient"].unique()]


@pytest.fixture(scope="module")
def model(sections):
    config = {"own_field": True, "slide_components": 16}
    return sf.tl.train(sections[0], "storm-tiny", epochs=1, validation=None, config=config)


@pytest.fixture(scope="module")
def adapted(sections, model):
    return sf.tl.train(sections[1], init=model, epochs=1, validation=None)


def embedded(adata, model, **options) -> np.ndarray:
    return sf.tl.embed(adata, model, copy=True, **options).obsm["X_stfm"]


def test_an_adapted_model_has_them_and_comes_back_bit_equal(sections, model, adapted, tmp_path):
    assert model.slide_components is None
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


def test_another_slide_replaces_them_and_the_same_finds_them_again(sections, adapted):
    short = {"epochs": 1, "validation": None, "stage": "mask"}
    further = sf.tl.train(sections[2], init=adapted, tune="head", **short)
    before, after = adapted.slide_components, further.slide_components
    assert before.genes.tolist() != after.genes.tolist() or not torch.equal(before.embedding, after.embedding)
    assert embedded(sections[2], further).shape[1] == WIDTH
    again = sf.tl.train(sections[1], init=adapted, **short)
    torch.testing.assert_close(again.slide_components.embedding, adapted.slide_components.embedding, rtol=0.0, atol=0.0)
    assert len(list(further.slide_components.parameters())) == 0


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


def test_slides_without_a_name_are_never_the_same(sections, model):
    unnamed = []
    for section in sections[1:]:
        adata = section.copy()
        del adata.obs["library_id"]
        adata.uns = {}
        unnamed.append(adata)
    short = {"epochs": 1, "validation": None, "stage": "mask", "mpp": 1.0}
    first = sf.tl.train(unnamed[0], init=model, **short)
    second = sf.tl.train(unnamed[1], init=first, **short)
    assert float(first.slide_components.latent_size) != float(second.slide_components.latent_size)


def test_half_precision_and_several_slides_with_panels_of_their_own(sections, model, tmp_path):
    parts = [sections[1][:, :250].copy(), sections[2][:, 100:].copy()]
    both = sf.tl.train(parts, init=model, epochs=1, validation=None)
    full, half = (embedded(parts[0], both, precision=precision) for precision in ("fp32", "bf16"))
    assert full.shape[1] == WIDTH
    assert np.corrcoef(full[:, 0], half[:, 0])[0, 1] > 0.99
    saved = sf.models.load(both.save(tmp_path / "m", dtype="fp16"))
    np.testing.assert_allclose(embedded(parts[0], saved), full, atol=0.02 * np.abs(full).max())


def test_a_panel_without_their_genes_and_places_that_are_shared(sections, adapted):
    read = {str(adapted.vocabulary.names[gene]) for gene in adapted.slide_components.genes.tolist()}
    others = [name for name in sections[1].var_names if name not in read]
    if others:
        assert embedded(sections[1][:, others].copy(), adapted)[:, :16].std(axis=0).min() > 0
    twice = sections[1].copy()
    twice.obsm["spatial"][1::2] = twice.obsm["spatial"][: twice.n_obs - 1 : 2][: len(twice.obsm["spatial"][1::2])]
    found = sf.tl.train(twice, init=adapted, epochs=1, validation=None, stage="mask")
    assert embedded(twice, found).std(axis=0).max() > 0.1


def test_random_numbers_of_the_user_are_left_alone(sections, model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    sf.tl.train(sections[1], init=model, epochs=1, validation=None, stage="mask")
    torch.testing.assert_close(torch.rand(2), expected, rtol=0.0, atol=0.0)


def test_models_that_do_not_look_at_a_slide_go_without(sections):
    start = sf.tl.train(sections[0], "storm-tiny", epochs=1, validation=None)
    assert sf.tl.train(sections[1], init=start, epochs=1, validation=None).slide_components is None


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
    own = fit_components(table, sample, 16)
    assert own.genes.tolist() == list(range(60))
    assert abs(np.corrcoef(own.read(sample.x)[:, 0].numpy(), programme)[0, 1]) > 0.95
    assert abs(np.corrcoef(table.read(sample.x)[:, 0].numpy(), programme)[0, 1]) < 0.5
    told = table.read(sample.x) @ own.told
    assert abs(np.corrcoef(told[:, 0].numpy(), programme)[0, 1]) > 0.9


def test_a_handful_of_genes_has_none():
    sample, _ = tissue(16)
    table = GeneTable(16, 4, likelihood="gaussian").requires_grad_(False)
    table.fit(sample.x, sample.totals)
    assert fit_components(table, sample, 16) is None
