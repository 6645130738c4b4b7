"""One vector a gene, by which expression is read from any panel and written for any gene."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stfm._validate import check_choice, check_count
from stfm.nn.counts import (
    LIKELIHOODS,
    TARGET_SUM,
    counts_of,
    expression_of_rate,
    gaussian_nll,
    negative_binomial_nll,
    poisson_nll,
)
from stfm.nn.principal import leading_components, shared_components

__all__ = ["GeneTable", "expected_latent"]

_FLOOR = 0.05  # deviation of a gene that hardly varies: at unit variance it would be noise alone
_CLIP = 10.0
_RARE = 1e-8  # share of the counts of a gene that was never seen
_DISPERSION = 10.0
_SINGLE = 0.3  # weight of the variance of single spots beside what neighbours share


class GeneTable(nn.Module):
    """Embeddings of genes, shared by reading and writing.

    A spot's standardised expression z is taken to be ``z_g = <u, e_g> + noise`` with ``u ~ N(0, 1)``; so a spot is read
    as the u expected from the genes that were measured, be they 300 or 18,000 (the posterior mean of probabilistic
    PCA), and any gene with an embedding is written as ``<u, e_g>``.

    Parameters
    ----------
    n_genes, width
        G and the length e of an embedding.
    likelihood
        Of what is written: ``"nb"`` or ``"poisson"`` on counts with the spot's total as size factor, ``"gaussian"`` on
        log-normalised values (:mod:`stfm.nn.counts` says why counts are the default).
    """

    mean: Tensor
    scale: Tensor
    log_share: Tensor
    noise: Tensor
    known: Tensor

    def __init__(self, n_genes: int, width: int, *, likelihood: str = "nb") -> None:
        super().__init__()
        check_count("gene_width", width)
        self.likelihood = check_choice("likelihood", likelihood, LIKELIHOODS)
        self.embedding = nn.Parameter(torch.randn(n_genes, width) / width**0.5)
        # Offset and size of a step of <u, e_g>, on the log rate or on the log-normalised value.
        self.offset = nn.Parameter(torch.zeros(n_genes))
        self.log_step = nn.Parameter(torch.zeros(n_genes))
        self.log_spread = nn.Parameter(torch.zeros(n_genes))
        if likelihood == "poisson":
            self.log_spread.requires_grad = False
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))
        self.register_buffer("log_share", torch.full((n_genes,), -math.log(n_genes)))
        self.register_buffer("noise", torch.ones(()))
        self.register_buffer("known", torch.zeros(n_genes, dtype=torch.bool))

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self.embedding.shape[1]

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        totals: Tensor,
        mask: Tensor | None = None,
        *,
        groups: Tensor | None = None,
        graph: Tensor | None = None,
    ) -> None:
        """Start from the training spots: scales, principal directions, rates and dispersions of the genes.

        Parameters
        ----------
        x
            ``log1p(1e4 c / sum c)``, ``(n, G)``.
        totals
            Counts a spot, ``(n,)``.
        mask
            Which genes were measured, bool ``(n, G)``; None means all.
        groups
            Slide of each spot, int64 ``(n,)``: the directions are those of differences within slides. None takes the
            differences between slides, too.
        graph
            Which spots are neighbours, sparse ``(n, n)`` as of :func:`~stfm.nn.principal.shared_components`: the
            directions are those in which neighbours are alike. None takes those of greatest variance.
        """
        there = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        n = there.sum(dim=0)
        self.known.copy_(n > 0)
        n = n.clamp_min(1.0)
        mean = (x * there).sum(dim=0) / n
        self.mean.copy_(mean)
        centred = (x - mean) * there
        for group in () if groups is None else groups.unique():
            rows = groups == group
            centred[rows] -= centred[rows].mean(dim=0)
        deviation = (centred.square().sum(dim=0) / n).sqrt()
        self.scale.copy_(torch.where(self.known, deviation.clamp_min(_FLOOR), torch.ones_like(deviation)))
        self._fit_directions((centred / self.scale).clamp_(-_CLIP, _CLIP), graph)
        self._fit_rates(counts_of(x, totals) * there, totals[:, None] * there, n, torch.ones_like(self.known))

    @torch.no_grad()
    def learn(self, x: Tensor, totals: Tensor, mask: Tensor | None = None) -> int:
        """Learn genes that were not known from spots that measured them beside known ones; return how many.

        A spot is read by its known genes; the embedding of a new gene is the ridge regression of its standardised
        expression on what was read. Arguments as of :meth:`fit`.
        """
        there = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        new = there.any(dim=0) & ~self.known
        if not bool(new.any()):
            return 0
        rows = there[:, new].any(dim=1)
        x, totals, there = x[rows], totals[rows], there[rows]
        u = self.read(x, there)
        n = there.sum(dim=0).clamp_min(1).to(x.dtype)
        mean = (x * there).sum(dim=0) / n
        deviation = (((x - mean).square() * there).sum(dim=0) / n).sqrt().clamp_min(_FLOOR)
        self.mean[new], self.scale[new] = mean[new], deviation[new]
        z = self.standardise(x, there)[:, new]
        system = u.T @ u + self.noise * torch.eye(self.width)
        self.embedding[new] = torch.linalg.solve(system, u.T @ z).T
        self._fit_rates(counts_of(x, totals) * there, totals[:, None] * there, n, new)
        self.known |= new
        return int(new.sum())

    def _fit_directions(self, z: Tensor, graph: Tensor | None) -> None:
        rank = min(self.width, min(z.shape) - 1)
        if graph is None:
            deviation, directions = leading_components(z, rank)
            held = deviation.square()
        else:
            deviation, directions = shared_components(z, graph, rank, single=_SINGLE)
            held = (z @ directions.T).square().mean(dim=0)
        left = (z.square().sum() / len(z) - held.sum()).clamp_min(0.0)
        self.noise.copy_((left / max(1, z.shape[1] - rank)).clamp_min(1e-3))
        # Probabilistic PCA: e = directions * sqrt(variance - noise), so that u has unit variance. What neighbours share
        # holds little noise; there the size of a direction is that of its eigenvalue.
        gain = (deviation.square() - (self.noise if graph is None else 0.0)).clamp_min(1e-6).sqrt()
        self.embedding.zero_()
        self.embedding[:, :rank] = (directions * gain[:, None]).T
        unseen = ~self.known
        self.embedding[unseen] = torch.randn(int(unseen.sum()), self.width).to(self.embedding) * 0.01

    def _fit_rates(self, counts: Tensor, totals: Tensor, n: Tensor, genes: Tensor) -> None:
        """Set offset, step and spread of some genes (a mask) from their counts."""
        share = (counts.sum(dim=0) / totals.sum(dim=0).clamp_min(1.0)).clamp_min(_RARE)
        self.log_share[genes] = share.log()[genes]
        expected = share * totals
        excess = ((counts - expected).square() - counts).sum(dim=0) / n
        theta = (expected.square().sum(dim=0) / n) / excess.clamp_min(1e-8)
        if self.likelihood == "gaussian":
            self.offset[genes] = self.mean[genes]
            self.log_step[genes] = self.scale.log()[genes]
            self.log_spread[genes] = 2 * self.scale.log()[genes]
            return
        self.offset[genes] = self.log_share[genes]
        # Slope of the log rate for a step of the log-normalised value: d log(r) / d log1p(1e4 r) = (1 + 1e4 r) / 1e4 r.
        slope = (1 + TARGET_SUM * share) / (TARGET_SUM * share)
        self.log_step[genes] = (self.scale * slope).clamp(max=1.0).log()[genes]
        self.log_spread[genes] = torch.where(n > 1, theta, _DISPERSION).clamp(0.05, 100.0).log()[genes]

    def standardise(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(x - mean) / scale``, 0 where a gene was not measured."""
        z = ((x - self.mean) / self.scale).clamp(-_CLIP, _CLIP)
        return z if mask is None else z * mask

    def read(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the u expected of each spot, ``(b, e)``, from the genes that were measured and are known."""
        return expected_latent(x, self.mean, self.scale, self.embedding, self.noise, mask, known=self.known)

    def update(self, expected: Tensor, variance: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return u of spots whose own counts are measured, from what was expected of them: Bayes' rule.

        With ``u ~ N(expected, variance)`` before the spot is looked at, its measured genes move it by
        ``(EᵀE / noise + 1 / variance)⁻¹ Eᵀ (z - E expected) / noise``.

        Parameters
        ----------
        expected
            u as its surroundings tell it, ``(b, e)``.
        variance
            Of u around that, a component, ``(e,)``.
        x, mask
            Log-normalised expression of the spots and which genes were measured, ``(b, G)``.
        """
        z = self.standardise(x, mask) * self.known
        panels, which = _panels(mask, len(x), self.known)
        moved = expected.clone()
        for i, panel in enumerate(panels):
            rows = (which == i).nonzero().squeeze(1)
            kept = (self.embedding * panel[:, None]).float()
            system = kept.T @ kept + torch.diag(self.noise / variance.clamp_min(1e-6))
            gain = torch.linalg.solve(system, kept.T).T
            surprise = (z[rows] - expected[rows] @ kept.T) * panel
            moved = moved.index_add(0, rows, surprise @ gain)
        return moved

    def write(self, u: Tensor, genes: Tensor | None = None) -> Tensor:
        """Return ``<u, e_g>`` in the units of the likelihood, ``(..., G)``: log rates, or log-normalised values."""
        if genes is None:
            return self.offset + self.log_step.exp() * (u @ self.embedding.T)
        return self.offset[genes] + self.log_step[genes].exp() * (u @ self.embedding[genes].T)

    def expression(self, written: Tensor) -> Tensor:
        """Return log-normalised expression from what :meth:`write` gave."""
        return written if self.likelihood == "gaussian" else expression_of_rate(written)

    def moments(self, written: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-normalised expression and its variance in a spot with so many counts, ``(n, G)`` each.

        Of counts the variance comes from that of the likelihood, ``μ + μ² / θ``, by the slope of the logarithm.
        """
        mean = self.expression(written)
        if self.likelihood == "gaussian":
            return mean, self.log_spread.exp().expand_as(mean)
        expected = written.clamp(max=0.0).exp() * total
        variance = expected if self.likelihood == "poisson" else expected + expected.square() / self.log_spread.exp()
        slope = TARGET_SUM / (total + TARGET_SUM * expected)
        return mean, variance * slope.square()

    def nll(self, u: Tensor, x: Tensor, totals: Tensor, genes: Tensor) -> Tensor:
        """Return ``-log p`` of some genes of each spot, ``(n, g)``.

        Parameters
        ----------
        u
            Of the spots, ``(n, e)``.
        x
            Measured ``log1p(1e4 c / sum c)`` of the genes, ``(n, g)``.
        totals
            Counts a spot, ``(n,)``.
        genes
            Which genes, int64 ``(g,)``.
        """
        written, log_spread = self.write(u, genes), self.log_spread[genes]
        if self.likelihood == "gaussian":
            return gaussian_nll(x, written, log_spread)
        counts = counts_of(x, totals)
        log_mean = written + totals.clamp_min(1.0).log()[:, None]
        if self.likelihood == "poisson":
            return poisson_nll(counts, log_mean)
        return negative_binomial_nll(counts, log_mean, log_spread)


def expected_latent(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    embedding: Tensor,
    noise: Tensor,
    mask: Tensor | None = None,
    *,
    known: Tensor | None = None,
) -> Tensor:
    """Return ``E[u] = (EᵀE + noise)⁻¹ Eᵀ z`` of spots, float32 ``(b, e)``; z is their standardised expression.

    Parameters
    ----------
    x
        Log-normalised expression, ``(b, G)``.
    mean, scale
        Of the genes, ``(G,)``.
    embedding
        E, ``(G, e)``.
    noise
        Variance of what the embeddings do not tell, a scalar.
    mask
        Which genes were measured, bool ``(b, G)``; None: all.
    known
        Which genes may be read, bool ``(G,)``; None: all.
    """
    panels, which = _panels(mask, len(x), torch.ones_like(mean, dtype=torch.bool) if known is None else known)
    with torch.autocast(x.device.type, enabled=False):  # small systems that half precision cannot solve
        x = x.float()
        if len(panels) == 1:
            return _posterior(x, mean, scale, embedding, noise, panels[0])
        out = x.new_zeros(len(x), embedding.shape[1])
        for i, panel in enumerate(panels):  # one small system a panel, that is a slide
            rows = (which == i).nonzero().squeeze(1)
            out = out.index_put((rows,), _posterior(x[rows], mean, scale, embedding, noise, panel))
        return out


def _posterior(x: Tensor, mean: Tensor, scale: Tensor, embedding: Tensor, noise: Tensor, panel: Tensor) -> Tensor:
    """Return the same of spots with one panel; genes outside it are not touched."""
    if not bool(panel.all()):
        genes = panel.nonzero().squeeze(1)
        x, mean, scale, embedding = x[:, genes], mean[genes], scale[genes], embedding[genes]
    kept = embedding.float()
    # In place: of 17,000 genes every pass over the spots of a batch counts.
    z = (x - mean).mul_(1 / scale).clamp_(-_CLIP, _CLIP)
    system = kept.T @ kept + noise * torch.eye(kept.shape[1], device=kept.device)
    return z @ torch.linalg.solve(system, kept.T).T  # type: ignore[no-any-return]


def _panels(mask: Tensor | None, n: int, known: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the different panels of a batch, and which one each spot has."""
    alike = torch.zeros(n, dtype=torch.long, device=known.device)
    if mask is None:
        return [known], alike
    if mask.stride(0) == 0 or n == 1:  # one row for all, as of one slide
        return [mask[0] & known], alike
    # Spots of a slide follow each other: only where a panel differs from the one before is there anything to compare.
    first = torch.ones(n, dtype=torch.bool, device=mask.device)
    first[1:] = (mask[1:] != mask[:-1]).any(dim=1)
    panels, which = torch.unique(mask[first], dim=0, return_inverse=True)
    return [panel & known for panel in panels], which[first.cumsum(dim=0) - 1]
