"""What every encoder offers: a width, a mode (frozen, full, LoRA), input normalisation inside."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import DataIntegrityError, InputError, MissingKeyError
from stfm._validate import check_choice
from stfm.encoders.spec import MODES, EncoderSpec
from stfm.nn.lora import apply_lora

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stfm.slide.genes import Vocabulary

__all__ = ["Encoder", "GeneEncoder", "ImageEncoder"]


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
            A ``.safetensors`` file, a PyTorch file (opened with ``weights_only=True``) or a state dict.

        Raises
        ------
        DataIntegrityError
            The file is of another architecture; the message names what is missing.
        """
        state = read_state(source) if isinstance(source, (str, Path)) else dict(source)
        convert = getattr(self.backbone, "convert_state", None)
        if convert is not None:
            state = convert(state)
        own = self.backbone.state_dict()
        missing = [k for k in own if k not in state and "lora_" not in k]
        wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
        extra = [k for k in state if k not in own]
        if missing or wrong or extra:
            where = source if isinstance(source, (str, Path)) else "state dict"
            parts = [
                f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for what, keys in (("missing", missing), ("of another shape", wrong), ("unknown", extra))
                if keys
            ]
            msg = f"{where} does not hold weights of encoder {self.spec.name!r}: {'; '.join(parts)}."
            raise DataIntegrityError(msg)
        self.backbone.load_state_dict(state, strict=False)
        return self

    def fingerprint(self) -> str:
        """Return a hash of the architecture and every weight: equal hashes give equal features."""
        digest = hashlib.sha256(f"{self.spec}{self.width}{self.extra_repr()}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

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
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return ``(b, width)`` from uint8 or float (0..1) tiles ``(b, 3, h, w)``."""
        return self.backbone(self.prepare(tiles))  # type: ignore[no-any-return]

    def prepare(self, tiles: Tensor) -> Tensor:
        """Return the tiles as the backbone reads them: float, resized, normalised."""
        if tiles.ndim != 4 or tiles.shape[1] != 3:
            msg = f"tiles must be (b, 3, h, w), got {tuple(tiles.shape)}."
            raise InputError(msg)
        x = tiles.to(self.mean.dtype)
        if not tiles.is_floating_point():
            x = x / 255.0
        size = self.spec.input_px
        if size is not None and x.shape[-2:] != (size, size):
            x = F.interpolate(x, size=(size, size), mode=self.spec.interpolation, align_corners=False, antialias=True)
            x = x.clamp(0.0, 1.0)
        return (x - self.mean) / self.std


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


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file (safetensors, or PyTorch with ``weights_only=True``)."""
    path = Path(path).expanduser()
    if not path.is_file():
        msg = f"There is no weights file {path}."
        raise MissingKeyError(msg)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            msg = f"{path} is not a readable safetensors file ({error}); fetch it again."
            raise DataIntegrityError(msg) from error
    from pickle import UnpicklingError

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        msg = f"{path} cannot be opened safely ({type(error).__name__}); convert it to safetensors."
        raise DataIntegrityError(msg) from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return strip_prefix(state, ("module.", "backbone."))


def strip_prefix(state: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict without prefixes that every key carries."""
    out = dict(state)
    for prefix in prefixes:
        if out and all(key.startswith(prefix) for key in out):
            out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out
