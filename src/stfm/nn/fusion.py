"""Fusion of an image and a gene vector of the same spot (ST-Align, section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice, check_count

SCALES = ("l", "d")
SOFTMAXES = ("spot", "batch")
MISSING = ("self", "token")
RESIDUALS = ("none", "gene", "mean")


class CrossAttention(nn.Module):
    """One direction of the ABFN (eq. 7): the tokens of one modality look at those of the other.

    ``Z = softmax((f W_q)(g W_k)ᵀ / sqrt(l)) g W_v`` with ``f``, ``g`` of shape ``(b, s, l)``.

    Parameters
    ----------
    width
        l, the width of a token.
    scale
        What the scores are divided by the root of; already resolved to a number.
    softmax
        ``"spot"``: over the key tokens of the same spot. ``"batch"``: as eq. 7 is printed, the denominator of every
        entry of the ``s × s`` matrix sums over the spots of the batch; in evaluation a running value of that
        denominator is used (as batch normalisation does), so that a spot's vector does not depend on its batch.
    n_tokens
        s.
    """

    log_denominator: Tensor
    n_batches: Tensor

    def __init__(self, width: int, *, scale: float, softmax: str, n_tokens: int) -> None:
        super().__init__()
        self.scale, self.softmax, self.momentum = scale, softmax, 0.1
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        if softmax == "batch":
            self.register_buffer("log_denominator", torch.zeros(n_tokens, n_tokens))
            self.register_buffer("n_batches", torch.zeros((), dtype=torch.long))

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """Return Z, ``(b, s, l)``."""
        scores: Tensor = self.query(own) @ self.key(other).mT / math.sqrt(self.scale)
        if self.softmax == "spot":
            weights = scores.softmax(dim=-1)
        else:
            weights = (scores - self._denominator(scores)).exp()
        z: Tensor = weights @ self.value(other)
        return z

    def _denominator(self, scores: Tensor) -> Tensor:
        """Return the logarithm of ``Σ_j exp(scores_j)`` over the spots j of the batch, ``(s, s)``."""
        if not self.training:
            return self.log_denominator
        current = torch.logsumexp(scores, dim=0)
        with torch.no_grad():
            step = 1.0 if int(self.n_batches) == 0 else self.momentum
            self.log_denominator.lerp_(current.detach().to(self.log_denominator), step)
            self.n_batches += 1
        return current


class ABFN(nn.Module):
    """Attention-Based Fusion Network (eqs. 7-9): cross-attention both ways, halved, concatenated.

    Parameters
    ----------
    width
        d, the width of each vector and of the fused one.
    n_tokens
        s; a vector is read as s tokens of width ``l = d / s``, which must be even.
    scale
        Scores are divided by ``sqrt(l)``, the width of a key, or by ``sqrt(d)`` as printed.
    softmax
        ``"spot"`` or ``"batch"``, see :class:`CrossAttention`.
    share_directions
        Use one set of W_q, W_k, W_v in both directions (the symbols of eqs. 7 and 8 are the same).
    residual
        What keeps the inputs in the fused vector: ``"none"``, as printed; ``"gene"``: the gene tokens are added to both
        Z before eq. 9, so that fusion cannot lose what the counts say; ``"mean"``: the mean of both inputs is added
        to F.
    missing
        What stands in for a modality that a spot does not have. ``"self"``: the other modality's vector (the two are
        aligned, so each is an estimate of the other). ``"token"``: a learned vector, which means something only when
        modalities were dropped in training.

    Raises
    ------
    InputError
        ``d`` is no multiple of ``s``, or ``l`` is odd.
    """

    def __init__(
        self,
        width: int = 512,
        *,
        n_tokens: int = 8,
        scale: str = "l",
        softmax: str = "spot",
        share_directions: bool = False,
        residual: str = "none",
        missing: str = "self",
    ) -> None:
        super().__init__()
        check_count("width", width)
        check_count("n_tokens", n_tokens)
        check_choice("scale", scale, SCALES)
        check_choice("softmax", softmax, SOFTMAXES)
        check_choice("missing", missing, MISSING)
        check_choice("residual", residual, RESIDUALS)
        token = width // n_tokens
        if token * n_tokens != width or token % 2:
            msg = f"ABFN needs width = n_tokens * l with l even, got width={width}, n_tokens={n_tokens}."
            raise InputError(msg)
        self.shape = (n_tokens, token)
        self.residual, self.missing = residual, missing
        factor = float(token if scale == "l" else width)
        self.image_attends = CrossAttention(token, scale=factor, softmax=softmax, n_tokens=n_tokens)  # eq. 7
        self.gene_attends = (  # eq. 8
            self.image_attends
            if share_directions
            else CrossAttention(token, scale=factor, softmax=softmax, n_tokens=n_tokens)
        )
        self.image_out = nn.Linear(token, token // 2, bias=False)  # W_I of eq. 9
        self.gene_out = nn.Linear(token, token // 2, bias=False)  # W_G of eq. 9
        if missing == "token":
            self.no_image = nn.Parameter(torch.randn(width) / math.sqrt(width))
            self.no_gene = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(
        self,
        image: Tensor | None,
        gene: Tensor | None,
        *,
        has_image: Tensor | None = None,
        has_gene: Tensor | None = None,
    ) -> Tensor:
        """Return the fused vector, ``(b, d)``.

        Parameters
        ----------
        image, gene
            ``(b, d)``; None where no spot has the modality.
        has_image, has_gene
            Which spots have it, bool ``(b,)``; None means all.
        """
        image, gene = fill_missing(
            image,
            gene,
            has_image,
            has_gene,
            no_image=self.no_image if self.missing == "token" else None,
            no_gene=self.no_gene if self.missing == "token" else None,
        )
        own, other = image.unflatten(-1, self.shape), gene.unflatten(-1, self.shape)
        z_image = self.image_attends(own, other)
        z_gene = self.gene_attends(other, own)
        if self.residual == "gene":
            z_image, z_gene = z_image + other, z_gene + other
        fused = torch.cat([self.image_out(z_image), self.gene_out(z_gene)], dim=-1).flatten(-2)  # eq. 9
        return fused + (image + gene) / 2 if self.residual == "mean" else fused


class ConcatFusion(nn.Module):
    """Concatenation of both vectors and one linear map back to d: the ablation without attention.

    Parameters
    ----------
    width
        d.
    missing
        As in :class:`ABFN`.
    """

    def __init__(self, width: int, *, missing: str = "self") -> None:
        super().__init__()
        check_choice("missing", missing, MISSING)
        self.missing = missing
        self.out = nn.Linear(2 * width, width)
        if missing == "token":
            self.no_image = nn.Parameter(torch.randn(width) / math.sqrt(width))
            self.no_gene = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(
        self,
        image: Tensor | None,
        gene: Tensor | None,
        *,
        has_image: Tensor | None = None,
        has_gene: Tensor | None = None,
    ) -> Tensor:
        """Return the fused vector, ``(b, d)``; parameters as in :meth:`ABFN.forward`."""
        image, gene = fill_missing(
            image,
            gene,
            has_image,
            has_gene,
            no_image=self.no_image if self.missing == "token" else None,
            no_gene=self.no_gene if self.missing == "token" else None,
        )
        return self.out(torch.cat([image, gene], dim=-1))  # type: ignore[no-any-return]


def fill_missing(
    image: Tensor | None,
    gene: Tensor | None,
    has_image: Tensor | None = None,
    has_gene: Tensor | None = None,
    *,
    no_image: Tensor | None = None,
    no_gene: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return both vectors, with a stand-in where a spot lacks one.

    Parameters
    ----------
    image, gene
        ``(b, d)`` or None.
    has_image, has_gene
        bool ``(b,)``; None means all.
    no_image, no_gene
        Stand-ins, ``(d,)``; None takes the other modality's vector.

    Raises
    ------
    InputError
        Both modalities are missing.
    """
    present = image if image is not None else gene
    if present is None:
        msg = "Both modalities are missing: a spot needs an image or counts."
        raise InputError(msg)
    for_image = no_image if no_image is not None else gene
    for_gene = no_gene if no_gene is not None else image
    return _stand_in(image, for_image, has_image, present), _stand_in(gene, for_gene, has_gene, present)


def _stand_in(own: Tensor | None, other: Tensor | None, has: Tensor | None, like: Tensor) -> Tensor:
    if own is None:
        stand_in = like if other is None else other
        return stand_in.expand_as(like).to(like.dtype)
    if has is None or other is None:
        return own
    return torch.where(has[:, None], own, other.to(own.dtype))
