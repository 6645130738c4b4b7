"""One vector a gene: read from any panel, written for any gene."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stfm._errors import InputError
from stfm.nn.gene_table import GeneTable
from stfm.nn.principal import shared_components

G, WIDTH, N = 1200, 6, 500


def low_rank(noise: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Log-normalised expression of rank 6 with noise, on scales that differ from gene to gene."""
    generator = torch.Generator().manual_seed(seed)
    u, loadings = torch.randn(N, WIDTH, generator=generator), torch.randn(G, WIDTH, generator=generator) / WIDTH**0.5
    z = u @ loadings.T + noise * torch.randn(N, G, generator=generator)
    return 2.0 + (0.2 + torch.rand(G, generator=generator)) * z


def fitted(x: torch.Tensor, mask: torch.Tensor | None = None, **options) -> GeneTable:
    torch.manual_seed(0)
    table = GeneTable(x.shape[1], WIDTH, **options)
    table.fit(x, torch.full((len(x),), 5000.0), mask)
    return table


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return low_rank()


@pytest.fixture(scope="module")
def table(x: torch.Tensor) -> GeneTable:
    return fitted(x, likelihood="gaussian").requires_grad_(False)


def test_reads_the_posterior_of_probabilistic_pca(table: GeneTable, x: torch.Tensor):
    z = ((x - x.mean(dim=0)) / x.std(dim=0, correction=0)).double().numpy()
    values, vectors = np.linalg.eigh(z.T @ z / N)
    kept, directions = values[::-1][:WIDTH], vectors[:, ::-1][:, :WIDTH]
    noise = (values.sum() - kept.sum()) / (G - WIDTH)
    assert float(table.noise) == pytest.approx(noise, rel=1e-3)
    loadings = directions * np.sqrt(kept - noise)
    posterior = z @ loadings @ np.linalg.inv(loadings.T @ loadings + noise * np.eye(WIDTH))
    read = table.read(x).double().numpy()
    signs = np.sign((read * posterior).sum(axis=0))
    np.testing.assert_allclose(read, posterior * signs, atol=5e-3)


def test_what_is_read_has_unit_variance(table: GeneTable, x: torch.Tensor):
    torch.testing.assert_close(table.read(x).var(dim=0), torch.ones(WIDTH), atol=0.02, rtol=0.0)


def test_a_panel_of_300_reads_nearly_the_same(table: GeneTable, x: torch.Tensor):
    whole = table.read(x)
    mask = torch.zeros(G, dtype=torch.bool)
    mask[torch.randperm(G, generator=torch.Generator().manual_seed(1))[:300]] = True
    few = table.read(x, mask.expand(N, -1))
    r = torch.nn.functional.cosine_similarity(few, whole, dim=0)
    assert float(r.min()) > 0.98
    assert (few.var(dim=0) < whole.var(dim=0)).all()  # fewer genes: nearer to what is expected of any spot


def test_genes_outside_the_panel_are_not_read(table: GeneTable, x: torch.Tensor):
    mask = torch.rand(G, generator=torch.Generator().manual_seed(0)) < 0.3
    other = torch.where(mask, x, torch.rand(x.shape))
    torch.testing.assert_close(table.read(other, mask.expand(N, -1)), table.read(x, mask.expand(N, -1)))


def test_spots_of_several_panels_in_one_batch(table: GeneTable, x: torch.Tensor):
    mask = torch.ones(N, G, dtype=torch.bool)
    mask[::2, ::3] = False
    together = table.read(x, mask)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        torch.testing.assert_close(together[rows], table.read(x[rows], mask[rows]), atol=1e-5, rtol=1e-4)


def test_nothing_measured_reads_what_is_expected_of_any_spot(table: GeneTable, x: torch.Tensor):
    assert not table.read(x, torch.zeros(N, G, dtype=torch.bool)).any()


def test_writes_what_it_read(table: GeneTable, x: torch.Tensor):
    written = table.expression(table.write(table.read(x)))
    r = torch.nn.functional.cosine_similarity(written - written.mean(0), x - x.mean(0), dim=0)
    assert float(r.median()) > 0.75  # the rest of a gene is noise of its own
    torch.testing.assert_close(written.mean(dim=0), x.mean(dim=0), atol=5e-3, rtol=0.0)
    genes = torch.tensor([5, 3, 900])
    torch.testing.assert_close(table.write(table.read(x), genes), table.write(table.read(x))[:, genes])


def test_denoised_on_genes_that_the_panel_lacks(table: GeneTable):
    clean = low_rank(noise=0.0)
    mask = torch.zeros(G, dtype=torch.bool)
    mask[:300] = True
    written = table.expression(table.write(table.read(low_rank(), mask.expand(N, -1))))[:, 300:]
    truth = clean[:, 300:]
    r = torch.nn.functional.cosine_similarity(written - written.mean(0), truth - truth.mean(0), dim=0)
    assert float(r.median()) > 0.95


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_rates_start_at_the_share_of_each_gene(likelihood: str):
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(40, generator=generator)
    counts = torch.poisson(3000 * (share / share.sum()).expand(200, -1), generator=generator)
    totals = counts.sum(dim=1)
    table = fitted(torch.log1p(1e4 * counts / totals[:, None]), likelihood=likelihood)
    pooled = counts.sum(dim=0) / counts.sum()
    torch.testing.assert_close(table.offset.detach().exp(), pooled, rtol=0.05, atol=1e-4)
    mean, variance = table.moments(table.write(torch.zeros(1, WIDTH)), totals.median())
    measured = torch.log1p(1e4 * counts / totals[:, None])
    torch.testing.assert_close(mean[0].detach(), measured.mean(dim=0), atol=0.15, rtol=0.1)
    often = pooled * 3000 > 20  # where the slope of the logarithm describes it
    ratio = variance[0].detach().sqrt()[often] / measured.std(dim=0)[often]
    assert 0.7 < float(ratio.median()) < 1.6


def test_dispersion_of_poisson_counts_is_large_and_of_overdispersed_ones_small():
    generator = torch.Generator().manual_seed(0)
    rate = torch.full((400, 20), 30.0)
    rate[:, 10:] *= torch.distributions.Gamma(2.0, 2.0).sample((400, 10))
    counts = torch.poisson(rate, generator=generator)
    totals = torch.full((400,), 600.0)
    theta = fitted(torch.log1p(1e4 * counts / totals[:, None])).log_spread.detach().exp()
    assert float(theta[:10].min()) > 20
    assert 1.0 < float(theta[10:].median()) < 4.0


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "gaussian"])
def test_absent_genes_have_no_gradient(likelihood: str, x: torch.Tensor):
    mask = torch.ones(N, G, dtype=torch.bool)
    mask[:, 1000:] = False
    table = fitted(x.clamp_min(0) * mask, mask, likelihood=likelihood)
    assert torch.equal(table.known, mask[0])
    u = table.read(x, mask)
    genes = torch.arange(G)
    weight = mask.float()
    (table.nll(u, x.clamp_min(0), torch.full((N,), 5000.0), genes) * weight).sum().backward()
    for name in ("embedding", "offset", "log_step", "log_spread"):
        grad = getattr(table, name).grad
        if grad is None:
            assert (likelihood, name) == ("poisson", "log_spread")
            continue
        assert not grad[1000:].any(), name
        assert grad[:1000].any(), name


def test_likelihood_is_checked():
    with pytest.raises(InputError, match="likelihood='zinb' is unknown"):
        GeneTable(5, 2, likelihood="zinb")
    with pytest.raises(InputError, match="gene_width"):
        GeneTable(5, 0)


def test_few_spots_fill_few_directions():
    table = fitted(low_rank()[:3])
    assert int(table.embedding.detach().any(dim=0).sum()) == 2
    assert torch.isfinite(table.read(low_rank()[:3])).all()


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_genes_that_come_later_are_learned_and_the_others_stay(x: torch.Tensor, likelihood: str):
    before = torch.ones(N, G, dtype=torch.bool)
    before[:, 1000:] = False
    table = fitted(torch.where(before, x, 0.0), before, likelihood=likelihood).requires_grad_(False)
    assert int(table.known.sum()) == 1000
    kept = {name: value[:1000].clone() for name, value in table.state_dict().items() if value.ndim and len(value) == G}
    assert table.learn(x, torch.full((N,), 5000.0)) == 200
    assert bool(table.known.all())
    for name, value in kept.items():
        assert torch.equal(table.state_dict()[name][:1000], value)
    written = table.expression(table.write(table.read(torch.where(before, x, 0.0), before)))[:, 1000:]
    r = [np.corrcoef(written[:, g].numpy(), x[:, 1000 + g].numpy())[0, 1] for g in range(0, 200, 10)]
    assert np.mean(r) > 0.7  # the noise leaves 0.89
    assert table.learn(x, torch.full((N,), 5000.0)) == 0


def test_directions_within_slides_leave_out_what_sets_slides_apart(x: torch.Tensor):
    generator = torch.Generator().manual_seed(3)
    slide = torch.arange(N) % 2
    apart = x + 3.0 * slide[:, None] * torch.randn(G, generator=generator)
    totals = torch.full((N,), 5000.0)
    torch.manual_seed(0)
    all_, within = (GeneTable(G, WIDTH, likelihood="gaussian").requires_grad_(False) for _ in range(2))
    all_.fit(apart, totals)
    within.fit(apart, totals, groups=slide)

    def between(table: GeneTable) -> float:
        u = table.read(apart)
        return float((u[slide == 1].mean(dim=0) - u[slide == 0].mean(dim=0)).abs().max() / u[slide == 0].std())

    assert between(all_) > 1.5  # a component of its own
    alike = fitted(x, likelihood="gaussian").requires_grad_(False)
    # The space of the genes' embeddings is that of slides without a difference.
    known, _ = torch.linalg.qr(alike.embedding)
    kept = [float((known.T @ torch.linalg.qr(t.embedding)[0]).square().sum() / WIDTH) for t in (all_, within)]
    assert kept[1] > 0.95
    assert kept[0] < 0.9


def chain(n: int) -> torch.Tensor:
    """Return the graph of a row of spots, each the neighbour of the next, with entries that sum to n."""
    i = torch.arange(n - 1)
    places = torch.cat([torch.stack([i, i + 1]), torch.stack([i + 1, i])], dim=1)
    return torch.sparse_coo_tensor(places, torch.full((2 * n - 2,), n / (2 * n - 2)), (n, n), check_invariants=True)


def test_shared_directions_are_those_of_the_dense_problem():
    z = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).cumsum(dim=0)
    z = z - z.mean(dim=0)
    graph = chain(300)
    dense = z.T @ (graph.to_dense() + 0.3 * torch.eye(300)) @ z / 300
    values, vectors = torch.linalg.eigh(dense)
    deviation, directions = shared_components(z, graph, 4, single=0.3)
    torch.testing.assert_close(deviation.square(), values.flip(0)[:4], rtol=1e-3, atol=0.0)
    overlap = (directions @ vectors.flip(1)[:, :4]).abs()
    torch.testing.assert_close(overlap, torch.eye(4), atol=1e-2, rtol=0.0)


def test_neighbours_that_are_unlike_do_not_hide_those_that_are_alike():
    place = torch.arange(300.0)
    generator = torch.Generator().manual_seed(0)
    alternating = 9 * torch.cos(torch.pi * place)[:, None] * torch.randn(40, generator=generator)
    z = alternating + (place / 30).sin()[:, None] * torch.randn(40, generator=generator)
    z = z + 0.1 * torch.randn(300, 40, generator=generator)
    z = z - z.mean(dim=0)
    deviation, directions = shared_components(z, chain(300), 2, single=0.0)
    assert float(deviation[0]) > 1.0
    assert abs(float(np.corrcoef(z @ directions[0], (place / 30).sin())[0, 1])) > 0.9


def test_directions_of_neighbours_leave_out_what_they_do_not_share():
    generator = torch.Generator().manual_seed(0)
    place = torch.linspace(0, 12, N)
    # Two programmes that change over the tissue, and two stronger ones that each spot has for itself.
    programmes = torch.stack([place.sin(), place.cos(), *torch.randn(2, N, generator=generator)], dim=1)
    loadings = torch.randn(G, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.5, 1.5])
    x = 3.0 + 0.2 * (programmes @ loadings.T + torch.randn(N, G, generator=generator))
    totals = torch.full((N,), 5000.0)
    found = {}
    for name, graph in (("variance", None), ("neighbours", chain(N))):
        torch.manual_seed(0)
        table = GeneTable(G, 2, likelihood="gaussian").requires_grad_(False)
        table.fit(x, totals, graph=graph)
        u = torch.linalg.qr(table.read(x) - table.read(x).mean(dim=0))[0]
        tissue = torch.linalg.qr(programmes[:, :2] - programmes[:, :2].mean(dim=0))[0]
        found[name] = float((u.T @ tissue).square().sum() / 2)
    assert found["variance"] < 0.1
    assert found["neighbours"] > 0.8
