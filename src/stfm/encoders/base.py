"""What every encoder offers: a width, a mode (frozen, full, LoRA), input normalisation inside."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from stfm._errors import InputError, MissingKeyError
from stfm._validate import check_choice, did_you_mean
from stfm.encoders.checkpoint import load_strictly
from stfm.encoders.scale import ON_MPP, fit_scale
from stfm.encoders.spec import MODES, EncoderSpec
from stfm.nn.lora import apply_lora

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stfm.slide.genes import Vocabulary

__all__ = ["Encoder", "GeneEncoder", "ImageEncoder"]

#: what float tiles reach at most; above 1, since augmentation may pass white a little
_BRIGHTEST = 2.0


class Encoder(nn.Module):
    """A backbone in one of three modes.

    Parameters
    ----------
    spec
        What the encoder is.
    backbone
        The network itself, its parameters named as in the published checkpoint.
    width
        Width of the vector it returns.
    """

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, *, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.width = width
        self.mode = "full"

    @property
    def frozen(self) -> bool:
        """Whether training leaves it as it is."""
        return self.mode == "frozen"

    def set_mode(self, mode: str, *, lora_rank: int = 8, lora_alpha: float = 16.0) -> Encoder:
        """Choose what training changes; returns the encoder.

        Parameters
        ----------
        mode
            ``"full"``: every weight; ``"frozen"``: none, and dropout and batch statistics stay in evaluation;
            ``"lora"``: a low-rank addition to each linear layer.
        lora_rank, lora_alpha
            Of the low-rank additions.
        """
        check_choice("mode", mode, MODES)
        if self.mode == "lora" and mode == "full":
            msg = f"Encoder {self.spec.name!r} has low-rank additions; build it again to train it in full."
            raise InputError(msg)
        if mode == "lora" and self.mode != "lora":
            apply_lora(self.backbone, rank=lora_rank, alpha=lora_alpha)
        else:
            self.requires_grad_(mode == "full")
        self.mode = mode
        return self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:  # noqa: FBT001, FBT002 - signature of torch
        """Set training mode; a frozen encoder stays in evaluation."""
        return super().train(mode and not self.frozen)

    def load_weights(self, source: str | Path | Mapping[str, Tensor]) -> Encoder:
        """Load a checkpoint in the published layout into the backbone.

        Parameters
        ----------
        source
            A ``.safetensors`` file, a PyTorch file (opened with ``weights_only=True``), a state dict,
            ``"hub:owner/repository/file"`` on the Hugging Face hub, or a URL.

        Raises
        ------
        DataIntegrityError
            The file is of another architecture, or holds NaN or infinity; the message names what is missing or wrong.
        """
        load_strictly(self.backbone, source, name=self.spec.name, gated=self.spec.gated)
        return self

    def published_state(self, layout: str | None = None) -> dict[str, Tensor]:
        """Return the weights under the parameter names of a public layout.

        Parameters
        ----------
        layout
            Name of one of :attr:`layouts`; None: the names that stfm uses.
        """
        state = self.backbone.state_dict()
        if layout is None:
            return state
        maps = {one.name: one for one in getattr(self.backbone, "layouts", ())}
        if layout not in maps:
            msg = f"Encoder {self.spec.name!r} has no layout {layout!r}. {did_you_mean(layout, list(maps))}"
            raise MissingKeyError(msg)
        written: dict[str, Tensor] = maps[layout].write(state)
        return written

    @property
    def layouts(self) -> list[str]:
        """Names of the public layouts that :meth:`load_weights` reads."""
        return [one.name for one in getattr(self.backbone, "layouts", ())]

    def fingerprint(self) -> str:
        """Return a hash of the architecture and every weight: equal hashes give equal features."""
        digest = hashlib.sha256(f"{self._described()}{self.width}{self.extra_repr()}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _described(self) -> str:
        """Return what decides the features, alike before and after a way through JSON."""
        return json.dumps(self.spec.seen(), sort_keys=True, default=str)

    def extra_repr(self) -> str:
        """Return name, width and mode."""
        return f"{self.spec.name!r}, width={self.width}, mode={self.mode!r}"


class ImageEncoder(Encoder):
    """Image encoder: resizes and normalises inside, so that it is fed with the tiles as they are.

    Parameters
    ----------
    spec
        Input size, channel statistics and how to resize.
    backbone
        Normalised ``(b, 3, h, w)`` -> ``(b, width)``.
    width
        Width of the vector it returns.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, *, width: int) -> None:
        super().__init__(spec, backbone, width=width)
        self.on_mpp = "resample"
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    def forward(self, tiles: Tensor, mpp: float | Tensor | None = None) -> Tensor:
        """Return ``(b, width)``.

        Parameters
        ----------
        tiles
            uint8 or float (0..1) tiles ``(b, 3, h, w)``.
        mpp
            µm/px of the tiles, of all or of each ``(b,)``. Tiles at another scale than the encoder's are treated as
            :meth:`set_on_mpp` says (:func:`stfm.encoders.fit_scale`); None: nothing is known of the scale.

        Raises
        ------
        InputError
            Tiles of another shape, float tiles in 0..255, or a scale that cannot be used.
        """
        if not isinstance(mpp, torch.Tensor):
            return self._encode(tiles, mpp)
        if mpp.numel() not in (1, len(tiles)):
            msg = f"mpp must be a number, or one for each of {len(tiles)} tiles; got {mpp.numel()}."
            raise InputError(msg)
        if self.spec.mpp is None or self.on_mpp == "ignore":
            return self._encode(tiles, None)
        kinds, place = mpp.flatten().unique(return_inverse=True)
        if len(kinds) == 1:
            return self._encode(tiles, float(kinds[0]))
        rows = [(place == i).nonzero().flatten() for i in range(len(kinds))]
        parts = [self._encode(tiles[row], float(kind)) for row, kind in zip(rows, kinds, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _encode(self, tiles: Tensor, mpp: float | None) -> Tensor:
        views, n = fit_scale(self._pixels(tiles), self.spec, mpp, on_mpp=self.on_mpp)
        views = (views - self.mean) / self.std
        if n == 1:
            return self.backbone(views)  # type: ignore[no-any-return]
        # One view of all tiles at a time, so that memory does not grow with the size of a tile.
        total: Tensor = sum(self.backbone(one) for one in views.unflatten(0, (-1, n)).unbind(1))
        return total / n

    def prepare(self, tiles: Tensor) -> Tensor:
        """Return the tiles as the backbone reads them: float, resized, normalised."""
        return (fit_scale(self._pixels(tiles), self.spec)[0] - self.mean) / self.std

    def set_on_mpp(self, on_mpp: str) -> ImageEncoder:
        """Choose what happens to tiles at another µm/px: ``"resample"``, ``"error"``, ``"ignore"``."""
        self.on_mpp = check_choice("on_mpp", on_mpp, ON_MPP)
        return self

    def extra_repr(self) -> str:
        """Return name, width, mode and what is done about another scale."""
        return f"{super().extra_repr()}, on_mpp={self.on_mpp!r}"

    def _pixels(self, tiles: Tensor) -> Tensor:
        if tiles.ndim != 4 or tiles.shape[1] != 3:
            msg = f"tiles must be (b, 3, h, w), got {tuple(tiles.shape)}."
            raise InputError(msg)
        x = tiles.to(self.mean.dtype)
        if not tiles.is_floating_point():
            return x / 255.0
        if _may_look(tiles) and tiles.amax() > _BRIGHTEST:
            msg = (
                f"float tiles must lie in 0..1, and these reach {float(tiles.amax()):g}; "
                "give uint8 tiles, or divide them by 255."
            )
            raise InputError(msg)
        return x


class GeneEncoder(Encoder):
    """Gene encoder: log-normalised counts on the model's vocabulary in.

    Parameters
    ----------
    spec
        What the encoder is.
    backbone
        ``(x, mask)`` -> ``(b, width)``; may offer ``fit(x, mask)`` and ``bind(vocabulary)``.
    width
        Width of the vector it returns.
    n_genes
        G, the length of the vocabulary.
    """

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, *, width: int, n_genes: int) -> None:
        super().__init__(spec, backbone, width=width)
        self.n_genes = n_genes

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, width)``.

        Parameters
        ----------
        x
            ``log1p(1e4 c / sum c)``, ``(b, G)``.
        mask
            Which genes were measured, bool ``(b, G)`` or ``(G,)``; None means all.
        """
        if x.ndim != 2 or x.shape[1] != self.n_genes:
            msg = f"counts must be (b, {self.n_genes}), the genes of the model's vocabulary; got {tuple(x.shape)}."
            raise InputError(msg)
        if mask is not None and mask.ndim == 1:
            mask = mask.expand(len(x), -1)
        return self.backbone(x, mask)  # type: ignore[no-any-return]

    @property
    def needs_fit(self) -> bool:
        """Whether some of it is computed from training slides (scales, principal components)."""
        return hasattr(self.backbone, "fit")

    def fit(self, x: Tensor, mask: Tensor | None = None) -> GeneEncoder:
        """Compute what is taken from data: ``x`` is ``(n, G)`` of training spots."""
        if self.needs_fit:
            cast("Any", self.backbone).fit(x, mask)
        return self

    def bind(self, vocabulary: Vocabulary) -> GeneEncoder:
        """Tell an encoder with a gene table of its own which genes it will see."""
        bind = getattr(self.backbone, "bind", None)
        if bind is not None:
            bind(vocabulary)
        return self


def _may_look(tiles: Tensor) -> bool:
    """Return whether the values of tiles may be looked at here.

    A look makes the host wait for the device, which training on one must not; a compiled graph would break at it;
    and on the meta device there are no values.
    """
    if torch.compiler.is_compiling() or tiles.is_meta or not tiles.numel():
        return False
    return tiles.device.type == "cpu" or not torch.is_grad_enabled()
