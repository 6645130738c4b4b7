"""Principal components of the training slides: a frozen gene encoder that needs no pretraining."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.encoders.base import GeneEncoder
from stfm.encoders.gene.scaling import GeneScaler
from stfm.nn.principal import leading_components

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec


class PrincipalComponents(nn.Module):
    """Scores on principal components of log-normalised counts.

    Where genes were not measured, they are not taken for zeros: the scores are those expected from the measured ones
    under probabilistic PCA. Before :meth:`fit` the components are random directions.

    Parameters
    ----------
    n_genes, n_components
        G and the width of the result.
    standardise
        Of the genes, as in :class:`GeneScaler`.
    whiten
        Give every score unit variance on the training spots.
    """

    components: Tensor
    deviation: Tensor
    noise: Tensor

    def __init__(self, n_genes: int, n_components: int, *, standardise: str = "centre", whiten: bool = True) -> None:
        super().__init__()
        self.scaler = GeneScaler(n_genes, standardise)
        self.whiten = whiten
        self.register_buffer("components", torch.randn(n_components, n_genes) / n_genes**0.5)
        self.register_buffer("deviation", torch.ones(n_components))
        self.register_buffer("noise", torch.ones(()))

    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Compute the components of ``x``, ``(n, G)``; deterministic."""
        if len(x) < 2:
            msg = f"The 'pca' gene encoder needs at least two training spots, got {len(x)}."
            raise InputError(msg)
        self.scaler.fit(x, mask)
        z = self.scaler(x, mask)
        rank = min(len(self.components), min(z.shape) - 1)
        scores_std, directions = leading_components(z, rank)
        self.components.zero_()
        self.components[:rank] = directions
        self.deviation.fill_(1.0)
        self.deviation[:rank] = scores_std.clamp_min(1e-6)
        left = z.square().sum() / len(z) - scores_std.square().sum()
        self.noise.copy_((left / max(1, z.shape[1] - rank)).clamp_min(1e-8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, n_components)``."""
        z = self.scaler(x, mask)
        projected: Tensor = z @ self.components.T
        if mask is not None and not bool(mask.all()):
            panels, which = torch.unique(mask, dim=0, return_inverse=True)
            for i, panel in enumerate(panels):  # one small system a panel, that is a slide
                projected = torch.where((which == i)[:, None], self._expected(projected, panel), projected)
        return projected / self.deviation if self.whiten else projected

    def _expected(self, projected: Tensor, panel: Tensor) -> Tensor:
        """Return the scores expected from the measured genes.

        With ``M = V_m V_mᵀ``, the latent vector is ``s = (M + σ² / var)⁻¹ V_m z`` and the absent genes add
        ``V_u E[z_u] = (I - M) s``.
        """
        v = (self.components * panel).float()
        gram = v @ v.T
        ridge = (self.noise / self.deviation.square()).clamp(1e-6, 1e6).float()
        latent = torch.linalg.solve(gram + torch.diag(ridge), projected.T.float())
        absent = (torch.eye(len(gram), device=gram.device) - gram) @ latent
        scores: Tensor = projected + absent.T.to(projected.dtype)
        return scores


def pca(
    spec: EncoderSpec, *, n_genes: int, width: int = 64, standardise: str = "centre", whiten: bool = True
) -> GeneEncoder:
    """Build the encoder; options as in :class:`PrincipalComponents`. It is to be fitted before use."""
    backbone = PrincipalComponents(n_genes, width, standardise=standardise, whiten=whiten)
    return GeneEncoder(spec, backbone, width=width, n_genes=n_genes)
