"""The network of the multi-branch STORM: tokens with places, encoder, masks, decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.models._multibranch_parts import Decoder, ExpressionEmbedding, Latent, Tissue, mean_where, take_rows
from stfm.models.base import Model
from stfm.models.storm_multibranch_config import StormMultiBranchConfig
from stfm.nn.masking import hide_positions, show_sites
from stfm.nn.multibranch import Stack, centre_weights
from stfm.nn.patches import patchify, reorder_legacy
from stfm.nn.positions import ScaledPosition, grid_centres, within

if TYPE_CHECKING:
    from stfm.slide.genes import Vocabulary

IMAGE, GENE = 0, 1


class TissueNetwork(Model):
    """Image and expression of tiles of tissue as tokens at places in µm, encoded together or alone, and decoded.

    Parameters
    ----------
    config
        See :class:`StormMultiBranchConfig`.
    vocabulary
        Genes that the model reads and predicts.
    pretrained
        No weights are fetched.
    """

    config_class: ClassVar[type[Any]] = StormMultiBranchConfig
    config: StormMultiBranchConfig
    learned: Tensor
    paired: Tensor
    residual: Tensor
    pixel_mean: Tensor
    pixel_scale: Tensor
    centres: Tensor
    bin_centres: Tensor

    def __init__(
        self, config: StormMultiBranchConfig, vocabulary: Vocabulary | None, *, pretrained: bool = True
    ) -> None:
        super().__init__(config, vocabulary, pretrained=pretrained)
        if vocabulary is None:
            msg = (
                "The multi-branch STORM needs a vocabulary: create(name, vocabulary), for example of "
                "Vocabulary.from_panels([slide.panel])."
            )
            raise InputError(msg)
        patch, cells = 3 * config.patch_px**2, config.cells
        self.image_patch = nn.Linear(patch, config.width)
        self.expression = ExpressionEmbedding(
            len(vocabulary), config.gene_width, cells, config.width, standardise=config.standardise
        )
        self.position = ScaledPosition(config.width)
        self.encoder = Stack(
            config.width,
            config.heads,
            round(config.mlp_ratio * config.width),
            config.depth,
            specific=config.specific,
            drop_path=config.drop_path,
            bias_hidden=config.bias_hidden,
            checkpointing=config.checkpointing,
        )
        self.gene_decoder = Decoder(config, cells * cells * config.gene_width, len(vocabulary))
        self.image_decoder = Decoder(config, patch)
        self.register_buffer("learned", torch.zeros(len(vocabulary), dtype=torch.bool))
        self.register_buffer("paired", torch.zeros(len(vocabulary), dtype=torch.bool))
        self.register_buffer("residual", torch.ones(len(vocabulary)))
        self.register_buffer("pixel_mean", torch.zeros(3))
        self.register_buffer("pixel_scale", torch.ones(3))
        self.register_buffer("centres", grid_centres(config.side, config.extent_um), persistent=False)
        bins = grid_centres(config.side * cells, config.extent_um)
        self.register_buffer("bin_centres", bins, persistent=False)
        centre_weights(self)
        # A patch and a spot start at about this size; a position of size 1 would drown them, and alignment learns late.
        nn.init.constant_(self.position.norm.weight, 0.1)

    def _patches(self, tiles: Tensor) -> Tensor:
        """Return the pixels of the patches on one scale, ``(b, p, 3 * px * px)``."""
        px = self.config.tile_px
        if tiles.shape[1:] != (3, px, px):
            msg = f"tiles must be (b, 3, {px}, {px}), got {tuple(tiles.shape)}."
            raise InputError(msg)
        x = tiles.to(self.pixel_mean.dtype)
        x = x if tiles.is_floating_point() else x / 255.0
        return patchify((x.permute(0, 2, 3, 1) - self.pixel_mean) / self.pixel_scale, self.config.patch_px)

    def _image_tokens(self, patches: Tensor) -> Tensor:
        return cast("Tensor", self.image_patch(patches) + self.position(self.centres))

    def _gene_tokens(self, scaled: Tensor, tissue: Tissue) -> Tensor:
        """Return a token a site, or a token a patch of bins."""
        few = self.expression.genes(scaled)
        if self.config.expression == "spots":
            return cast("Tensor", self.expression.patch(few) + self.position(tissue.xy_um))
        owner = self._owner(tissue)
        # The 1 x 1 convolution of an empty bin is its offset.
        drawn = torch.where((owner >= 0)[:, :, None], take_rows(few, owner.clamp_min(0)), self.expression.genes.bias)
        side = self.config.side * self.config.cells
        cut = patchify(drawn.unflatten(1, (side, side)), self.config.cells)
        return cast("Tensor", self.expression.patch(cut) + self.position(self.centres))

    def _owner(self, tissue: Tissue) -> Tensor:
        """Return which site each bin belongs to, int64 ``(b, bins)``, -1 where none is near."""
        n = len(self.bin_centres)
        step = self.config.extent_um / n**0.5
        if self.config.site_um > 1.5 * step:
            way = (tissue.xy_um[:, :, None] - self.bin_centres).square().sum(dim=-1)
            nearest, owner = torch.where(tissue.present[:, :, None], way, torch.inf).min(dim=1)
            return torch.where(nearest <= (self.config.site_um / 2) ** 2, owner, -1)
        # A site no larger than a bin fills the one that it lies in; of several there the first.
        row, column = (tissue.xy_um / step).long().clamp(0, round(n**0.5) - 1).unbind(dim=2)[::-1]
        place = torch.where(tissue.present, row * round(n**0.5) + column, n)
        number = torch.arange(place.shape[1], device=place.device).expand_as(place)
        owner = torch.full((len(place), n + 1), len(number[0]), device=place.device)
        owner = owner.scatter_reduce(1, place, number, "amin")[:, :n]
        return torch.where(owner < place.shape[1], owner, -1)

    def _under(self, tissue: Tissue) -> Tensor:
        """Return which patches lie under which sites, bool ``(b, s, p)``; the one that a site lies in always does."""
        step = self.config.extent_um / self.config.side
        radius = max(self.config.site_um, 1.01 * 2**0.5 * step) / 2
        return within(tissue.xy_um, self.centres, radius) & tissue.present[:, :, None]

    def _encode_image(self, patches: Tensor) -> Tensor:
        x = self._image_tokens(patches)
        return cast("Tensor", self.encoder(x, self.centres[None], experts=(IMAGE,)))

    def _encode_gene(self, scaled: Tensor, tissue: Tissue) -> Tensor:
        x = self._gene_tokens(scaled, tissue)
        if self.config.expression == "bins":
            return cast("Tensor", self.encoder(x, self.centres[None], experts=(GENE,)))
        return cast("Tensor", self.encoder(x, tissue.xy_um, experts=(GENE,), padding=_absent(tissue)))

    def _encode_both(self, patches: Tensor, scaled: Tensor, tissue: Tissue) -> tuple[Tensor, Tensor]:
        """Encode all tokens of both modalities together; returns those of the image and those of expression."""
        parts = [self._image_tokens(patches), self._gene_tokens(scaled, tissue)]
        sizes = [part.shape[1] for part in parts]
        spots = self.config.expression == "spots"
        padding = None
        absent = _absent(tissue) if spots else None
        if absent is not None:
            padding = F.pad(absent, (sizes[0], 0))
        xy_um = self._places(tissue) if spots else self.centres[None].repeat(1, 2, 1)
        x = self.encoder(torch.cat(parts, 1), xy_um, experts=(IMAGE, GENE), sizes=sizes, padding=padding)
        image, gene = x.split(sizes, dim=1)
        return image, gene

    def _places(self, tissue: Tissue) -> Tensor:
        """Return the places of image tokens and sites, ``(b, p + s, 2)`` or ``(1, p + s, 2)``."""
        xy_um = tissue.xy_um
        return torch.cat([self.centres.expand(len(xy_um), -1, -1), xy_um], dim=1)

    def _mask(self, patches: Tensor, scaled: Tensor, tissue: Tissue) -> tuple[Latent, Tensor, Tensor, Tensor | None]:
        """Show either image or expression at each place and encode that.

        Returns
        -------
        What was encoded; where the image was shown, bool ``(b, p)``; where expression was, ``(b, p)`` or ``(b, s)``;
        and which genes were hidden there too, bool ``(b, 1, G)``, or None.
        """
        # In evaluation the same places are hidden every time, so that epochs can be compared.
        generator = None if self.training else torch.Generator().manual_seed(0)
        n, p = patches.shape[:2]
        hidden_genes = None
        if self.config.hidden_genes > 0:
            # The same genes in the whole tile, as of another panel.
            hidden_genes = torch.rand(n, 1, scaled.shape[2], generator=generator) < self.config.hidden_genes
            hidden_genes = hidden_genes.to(scaled.device)
            scaled = scaled.masked_fill(hidden_genes, 0.0)
        if self.config.expression == "spots":
            shown = show_sites(tissue.present, self.config.mask_ratio, generator).to(scaled.device)
            latent, image_shown = self._encode_shown(patches, scaled, tissue, shown)
            return latent, image_shown, shown, hidden_genes
        shown = hide_positions(n, p, self.config.mask_ratio, generator).to(scaled.device)
        place = shown.to(torch.uint8).argsort(dim=1, stable=True)
        n_image = p - int(shown[0].sum())
        image, gene = self._image_tokens(patches), self._gene_tokens(scaled, tissue)
        x = torch.cat([take_rows(image, place[:, :n_image]), take_rows(gene, place[:, n_image:])], dim=1)
        x = self.encoder(x, self.centres[None], experts=(IMAGE, GENE), sizes=(n_image, p - n_image), place=place)
        x = torch.zeros_like(x).scatter(1, place[:, :, None].expand_as(x), x)
        return self._latent_of_bins(x), ~shown, shown, hidden_genes

    def _encode_shown(
        self, patches: Tensor, scaled: Tensor, tissue: Tissue, shown: Tensor, *, blind: bool = False
    ) -> tuple[Latent, Tensor]:
        """Show the expression of some sites and the image where none of them lies; returns also where that is.

        With ``blind`` there is no image to show.
        """
        image, gene = self._image_tokens(patches), self._gene_tokens(scaled, tissue)
        image_shown = ~(self._under(tissue) & shown[:, :, None]).any(dim=1) & (not blind)
        hidden = ~torch.cat([image_shown, shown], dim=1)
        sizes = (image.shape[1], gene.shape[1])
        xy_um = self._places(tissue)
        x = self.encoder(torch.cat([image, gene], 1), xy_um, experts=(IMAGE, GENE), sizes=sizes, padding=hidden)
        return self._filled(x[:, : sizes[0]], x[:, sizes[0] :], image_shown, shown, tissue), image_shown

    def _latent_of_bins(self, x: Tensor) -> Latent:
        return Latent(x, None, x, None, self.centres[None])

    def _filled(self, image: Tensor, sites: Tensor, image_shown: Tensor, shown: Tensor, tissue: Tissue) -> Latent:
        """Put the other modality's token, and the place, where a modality was hidden."""
        under = self._under(tissue)
        xy_um = self._places(tissue)
        from_image = mean_where(image, under & image_shown[:, None])
        from_sites = mean_where(sites, (under & shown[:, :, None]).mT)
        x = torch.cat([image, sites], dim=1)
        hidden = ~torch.cat([image_shown, shown], dim=1)
        other = torch.cat([from_sites, from_image], dim=1) + self.position(xy_um)
        absent = _absent(tissue)
        return Latent(
            x=x,
            hidden=hidden,
            start=torch.where(hidden[:, :, None], other.to(x.dtype), x),
            absent=None if absent is None else F.pad(absent, (image.shape[1], 0)),
            xy_um=xy_um,
        )

    def _decoded_sites(self, latent: Latent) -> Tensor:
        """Return what the decoder of expression says of each site, before the map to genes, ``(b, s, gene_width)``."""
        out = self.gene_decoder(latent, self.position(latent.xy_um))
        return cast("Tensor", out[:, len(self.centres) :])

    def _decoded_bins(self, latent: Latent) -> Tensor:
        """Return the same of each bin, in the order of the patches, ``(b, p, bins of a patch, gene_width)``."""
        cells = self.config.cells
        out = self.gene_decoder(latent, self.position(latent.xy_um))
        out = reorder_legacy(out, cells) if self.config.legacy_reshape else out
        return cast("Tensor", out.unflatten(2, (cells * cells, -1)))

    def _owner_of_patches(self, tissue: Tissue) -> Tensor:
        side = self.config.side * self.config.cells
        return patchify(self._owner(tissue).view(-1, side, side, 1), self.config.cells)

    def _decoded_pixels(self, latent: Latent) -> Tensor:
        out = self.image_decoder(latent, self.position(latent.xy_um))[:, : len(self.centres)]
        return reorder_legacy(out, self.config.patch_px) if self.config.legacy_reshape else cast("Tensor", out)


def _absent(tissue: Tissue) -> Tensor | None:
    """Return where there is no site, or None where all are there."""
    return None if tissue.whole else ~tissue.present
