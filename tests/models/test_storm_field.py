"""The field of STORM's latent components: kriging against its formula, scales found without labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import stfm as sf
from stfm.models._sample import Sample
from stfm.models._storm_field import LatentField
from stfm.models.inputs import SlideInputs
from stfm.models.storm_config import STORMConfig
from stfm.slide import as_slides


@pytest.fixture(scope="module")
def grid() -> np.ndarray:
    y, x = np.mgrid[:24, :24]
    return np.column_stack([x.ravel(), y.ravel()]) * 100.0


def smooth_field(coords: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    distance = np.linalg.norm(coords[:, None] - coords[None], axis=-1)
    covariance = np.exp(-distance / reach) + 1e-6 * np.eye(len(coords))
    return np.linalg.cholesky(covariance) @ rng.normal(size=len(coords))


def windows(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.r_[i, rng.choice(np.delete(np.arange(n), i), size - 1, replace=False)] for i in range(8)])


def test_the_field_is_simple_kriging(grid):
    rng = np.random.default_rng(0)
    field = LatentField(2)
    field.sill.copy_(torch.tensor([0.5, 0.8]))
    field.reach_um.copy_(torch.tensor([300.0, 90.0]))
    rows = windows(len(grid), 9, rng)
    latent = rng.normal(size=(8, 9, 2)).astype(np.float32)
    seen = np.ones((8, 9), bool)
    seen[:, 4:] = rng.random((8, 5)) < 0.5
    found = field(torch.from_numpy(latent), torch.from_numpy(grid[rows].astype(np.float32)), torch.from_numpy(seen))
    for b in range(8):
        kept = seen[b]
        xy = grid[rows[b]][kept]
        distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
        for c, (sill, reach) in enumerate(((0.5, 300.0), (0.8, 90.0))):
            shared = sill * np.exp(-distance / reach)
            weight = np.linalg.solve(shared + (1 - sill) * np.eye(len(xy)), shared[0])
            assert float(found[b, c]) == pytest.approx(weight @ latent[b, kept, c], abs=2e-5)


def test_scales_are_found_without_labels(grid):
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(len(grid), 3))
    latent = np.column_stack([smooth_field(grid, 800.0, rng), smooth_field(grid, 150.0, rng), np.zeros(len(grid))])
    field = LatentField(3)
    field.fit([latent + 0.7 * noise], [grid])
    wide, narrow, none = (field.sill / field.total).tolist()
    assert wide > 0.4
    assert narrow > 0.25
    assert none < 0.2
    assert float(field.reach_um[0]) > 2 * float(field.reach_um[1])


def test_denoising_beats_the_spot_and_a_fixed_ring(grid):
    rng = np.random.default_rng(2)
    truth = np.column_stack([smooth_field(grid, 900.0, rng), smooth_field(grid, 120.0, rng)])
    noisy = truth + np.array([1.0, 0.3]) * rng.normal(size=truth.shape)
    field = LatentField(2)
    field.fit([noisy], [grid])
    order = np.argsort(np.linalg.norm(grid[:, None] - grid[None], axis=-1), axis=1, kind="stable")[:, :25]
    latent, xy = torch.from_numpy(noisy[order].astype(np.float32)), torch.from_numpy(grid[order].astype(np.float32))
    found = field(latent, xy, torch.ones(order.shape, dtype=torch.bool)).numpy()

    def error(guess: np.ndarray) -> np.ndarray:
        return ((guess - truth) ** 2).mean(axis=0)

    ring = noisy[order[:, :9]].mean(axis=1)
    assert error(found)[0] < 0.3 * error(noisy)[0]
    assert error(found)[1] < 0.5 * error(ring)[1]  # one ring for all destroys what is narrow
    assert error(found).sum() < error(ring).sum()


def test_a_spot_without_counts_is_written_by_the_decoder():
    adata = sf.datasets.toy(n_spots=60)
    model = sf.tl.train(adata, "storm-tiny", stage="mask", epochs=1, genes=50, validation=None)
    assert model.field is not None
    assert float(model.field.sill.max()) > 0
    batch = SlideInputs(as_slides(adata)[0], model.inputs, model.vocabulary).batch(np.arange(60))
    with torch.no_grad():
        both, blind = model.embed(batch).joint, model.embed(batch.without("gene")).joint
        some = replace(batch, measured=torch.arange(60) < 1)  # one spot was measured: it and its window know of it
        few = model.embed(some).joint
    assert both.shape == blind.shape == (60, model.config.gene_width)
    assert torch.isfinite(blind).all()
    assert not torch.allclose(both, blind)
    reached = torch.from_numpy((SlideInputs(as_slides(adata)[0], model.inputs, model.vocabulary).windows == 0).any(1))
    assert not torch.allclose(few[reached], blind[reached])
    assert float(few[reached].abs().max()) < float(both.abs().max())


def test_the_papers_sizes_embed_their_tokens():
    assert STORMConfig.preset("paper").joint == STORMConfig.preset("recommended").joint == "concat"
    assert STORMConfig.preset("small").joint == "field"


def test_a_slide_tells_of_itself_by_its_number_of_spots(grid):
    rng = np.random.default_rng(2)
    trained, own = LatentField(1), LatentField(1)
    trained.sill.fill_(0.2)
    latent = smooth_field(grid, 500.0, rng)[:, None]
    own.fit([latent], [grid])
    share = len(grid) / (len(grid) + 1000)
    adapted = trained.adapted(latent, grid)
    for name in ("sill", "total", "reach_um"):
        expected = share * getattr(own, name) + (1 - share) * getattr(trained, name)
        torch.testing.assert_close(getattr(adapted, name), expected)
    assert float(trained.sill) == pytest.approx(0.2)


@pytest.mark.filterwarnings("ignore::stfm.errors.StfmWarning")
def test_own_field_changes_an_embedding_and_is_forgotten():
    adata = sf.datasets.toy(n_spots=150, n_patients=2)
    train, other = (adata[adata.obs["patient"] == p].copy() for p in adata.obs["patient"].unique())
    model = sf.tl.train(train, "storm-tiny", epochs=1, validation=None, config={"own_field": True})
    assert model._ready == {}
    sf.tl.embed(other, model)
    assert model._ready == {}
    own = other.obsm["X_stfm"]
    model.config = replace(model.config, own_field=False)
    sf.tl.embed(other, model)
    difference = np.abs(own - other.obsm["X_stfm"]).max() / np.abs(own).max()
    assert 1e-3 < difference < 1.0


def test_the_graph_of_the_gene_table_is_the_ring_of_each_slide(grid):
    hexagonal = np.array([[2 * x + y % 2, y * 3**0.5] for y in range(12) for x in range(10)]) * 50.0
    apart = np.array([[0.0, 0.0]])
    none = torch.empty(0)
    graph = Sample(none, none, None, none, [grid, hexagonal, apart]).graph().to_dense()
    n, m = len(grid), len(hexagonal)
    torch.testing.assert_close(graph, graph.T)
    assert float(graph[:n, :n].sum()) == pytest.approx(n, rel=1e-4)
    assert float(graph[n : n + m, n : n + m].sum()) == pytest.approx(m, rel=1e-4)
    assert float(graph[:n, n:].abs().sum() + graph[-1].abs().sum()) == 0.0
    middle = (graph[12 * 24 + 12] > 0).sum(), (graph[n + 55] > 0).sum()
    assert middle == (8, 6)  # a square with its corners, a hexagon
