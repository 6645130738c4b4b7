"""The contract of every model, and how models are saved and loaded."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stfm._errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning
from stfm._keys import UNNAMED
from stfm._validate import check_choice
from stfm._version import __version__
from stfm.models._card import About, licences, model_card
from stfm.models._half import DTYPES, stored
from stfm.models._slots import check_saveable, published_inside
from stfm.slide.genes import Vocabulary
from stfm.weights.state import check_finite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from stfm.models.inputs import InputSpec, SlideInputs
    from stfm.nn.batch import Batch

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
GENES_FILE = "genes.txt"
HISTORY_FILE = "history.csv"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class Embedding:
    """What a model makes of a batch: tensors ``(b, d)``; a part whose modality is absent is None."""

    joint: Tensor
    image: Tensor | None = None
    gene: Tensor | None = None
    niche: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """Expected log-normalised expression and its deviation, tensors ``(b, G)``."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class TunedParts:
    """What of a model is tuned where not all of it is.

    Attributes
    ----------
    blocks
        Name of the part whose attention takes low-rank additions.
    heads
        By stage, how the names of the parameters of its heads begin.
    """

    blocks: str
    heads: Mapping[str, tuple[str, ...]]


@dataclass
class Seen:
    """What a model was trained on; evaluation on any of it is told."""

    studies: list[str] = field(default_factory=list)
    slides: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    platforms: list[str] = field(default_factory=list)
    species: list[str] = field(default_factory=list)
    n_spots: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    #: trained models that it was made from by further training, the latest last: name and hash of the weights
    adapted_from: list[dict[str, str]] = field(default_factory=list)
    #: recipe by which the model is trained further, where it is another one
    further: dict[str, Any] = field(default_factory=dict)

    def has(self, slide: Any) -> bool:
        """Return whether a slide is among them: not one that nobody named, nor one of another study."""
        same = not self.studies or slide.study is None or slide.study in self.studies
        return same and slide.name != UNNAMED and slide.name in self.slides

    def add(self, slides: Sequence[Any]) -> None:
        """Add slides, with where they come from, once each: a second stage sees no other spots."""
        for slide in slides:
            if slide.name not in self.slides:
                self.n_spots += slide.n_obs
            found = (
                (self.studies, slide.study), (self.slides, slide.name), (self.patients, slide.patient),
                (self.platforms, slide.platform), (self.species, slide.species),
            )  # fmt: skip
            for names, name in found:
                if name is not None and name not in names:
                    names.append(name)


class Model(nn.Module, ABC):
    """A model of spots.

    Parameters
    ----------
    config
        Frozen dataclass of plain values; it goes to JSON and back.
    vocabulary
        Genes that the model reads; None for a model of H&E alone.
    pretrained
        Whether encoders fetch the weights that the config names. Off when the weights come from a saved model.
    """

    #: name of the family in the registry
    family: ClassVar[str]
    #: whether a new model needs a vocabulary
    reads_genes: ClassVar[bool] = True
    #: stages of pretraining, in order
    stages: ClassVar[tuple[str, ...]] = ()
    #: what ``tl.train(tune="head" | "lora")`` trains; None where a model is tuned in full only
    tuned_parts: ClassVar[TunedParts | None] = None
    #: those of them that need H&E and counts of every slide
    paired_stages: ClassVar[tuple[str, ...]] = ("align",)

    @property
    def stage(self) -> str | None:
        """The stage that :meth:`losses` trains; None for a model that has none."""
        return None

    @stage.setter
    def stage(self, stage: str) -> None:
        msg = f"{self.family!r} is trained in one stage; it has no {stage!r}."
        raise InputError(msg)

    config_class: ClassVar[type[Any]]

    def __init__(self, config: Any, vocabulary: Vocabulary | None, *, pretrained: bool = True) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            msg = f"{type(self).__name__} is configured by {self.config_class.__name__}, got {type(config).__name__}."
            raise InputError(msg)
        self.config = config
        self.vocabulary = vocabulary
        self.pretrained = pretrained
        self.seen = Seen()
        self.about = About()
        self.history: pd.DataFrame | None = None

    @property
    @abstractmethod
    def inputs(self) -> InputSpec:
        """What the model wants to see of every spot."""

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the named scalars of the objective; ``"loss"`` is their weighted sum."""

    @abstractmethod
    def embed(self, batch: Batch) -> Embedding:
        """Return the embedding of every spot; either modality may be missing."""

    def predict(self, batch: Batch, *, own: bool = False) -> Prediction:
        """Return expected expression of every spot on the model's vocabulary, of a model that writes expression.

        Parameters
        ----------
        batch
            With H&E, with counts of some spots (``measured``), or both.
        own
            Whether the counts of the spot itself may be used, or those of its neighbours alone.
        """
        msg = (
            f"{self.family!r} writes no expression; fit a predictor on its features with "
            "sf.tl.fit_expression(reference, features=model)."
        )
        raise InputError(msg)

    def written_genes(self) -> NDArray[np.bool_]:
        """Return which genes of the vocabulary :meth:`predict` has learned to write, bool ``(G,)``; none by default."""
        return np.zeros(0 if self.vocabulary is None else len(self.vocabulary), dtype=bool)

    def paired_genes(self) -> NDArray[np.bool_]:
        """Return which genes a training slide with H&E had measured, bool ``(G,)``.

        The others that :meth:`written_genes` tells are known from counts alone: H&E says of them what their embedding
        shares with that of the others, which is an extrapolation.
        """
        return self.written_genes()

    def layers(self) -> list[list[nn.Module]]:
        """Return the parts from input to output, for learning rates that fall with depth; none by default."""
        return []

    def fit_inputs(self, slides: Sequence[SlideInputs]) -> None:
        """Fit what is estimated from the training slides before the first step; nothing by default."""

    def calibrate(self, slides: Sequence[SlideInputs], *, held_out: bool) -> None:
        """Fit the size of the errors after the last step; nothing by default.

        Parameters
        ----------
        slides
            Validation slides, or the training slides where there are none.
        held_out
            Whether the model did not learn from them.
        """

    def adapt_inputs(self, slides: Sequence[SlideInputs]) -> None:
        """Take what changes from the slides that a trained model goes on with; nothing by default."""

    def ready(self, slides: Sequence[SlideInputs]) -> None:
        """Do once for slides what would be done in each batch; without any, forget them. Nothing by default."""

    def frozen_image_encoder(self, level: str) -> nn.Module | None:
        """Return the encoder of ``"spot"`` or ``"niche"`` tiles if it is frozen, so that its features can be kept."""
        return None

    @property
    def flippable(self) -> bool:
        """Whether a tile may be turned and mirrored while the spots around its middle stay where they are."""
        return True

    @property
    def n_parameters(self) -> int:
        """Number of parameters, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    def weights_sha256(self) -> str:
        """Return the hash of names and values of all weights and buffers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path, *, dtype: str = "fp32") -> Path:
        """Write the model to a folder: configuration, weights, genes, history and a model card.

        Parameters
        ----------
        folder
            Made if it is not there; a model that lies in it is replaced.
        dtype
            ``"fp32"``, which comes back bit for bit, or ``"fp16"``, which takes half the bytes: matrices are rounded to
            three digits; vectors, and whatever fp16 cannot hold, stay as they are. A model is fp32 again once loaded.

        Returns
        -------
        The folder.
        """
        from safetensors.torch import save_file

        check_choice("dtype", dtype, DTYPES)
        self.about.check()
        check_saveable(self.config)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The configuration goes last: a folder that has it is whole.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        save_file(stored(self.state_dict(), dtype), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if self.vocabulary is not None:
            self.vocabulary.save(folder / GENES_FILE)
        if self.history is not None:
            self.history.to_csv(folder / HISTORY_FILE, index=False)
        card = model_card(
            self.family,
            n_parameters=self.n_parameters,
            n_genes=0 if self.vocabulary is None else len(self.vocabulary),
            config=shared_config(self.config),
            seen=asdict(self.seen),
            history=self.history,
            about=self.about,
            dtype=dtype,
            inside=published_inside(self.config),
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        description = {
            "family": self.family,
            "stfm_version": __version__,
            "dtype": dtype,
            "config": shared_config(self.config),
            "seen": asdict(self.seen),
            "about": asdict(self.about),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=1, default=str), encoding="utf-8")
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool = False,
        dtype: str = "fp32",
        message: str = "Upload of a model by stfm",
        revision: str | None = None,
    ) -> str:
        """Share the model on the Hugging Face hub: the folder that :meth:`save` writes, with its card.

        Say first what the card should say: ``model.about.licence``, ``.text`` and ``.results``. A model made with
        weights of others holds them: that is told, with their licence.

        Parameters
        ----------
        repo_id
            ``"<owner>/<repo>"``; made where it is not there.
        token
            With the right to write; None takes the one of ``HF_TOKEN`` or ``hf auth login``.
        private
            Whether a repository that is made is private.
        dtype
            Of the weights, as in :meth:`save`.
        message
            Of the commit.
        revision
            Branch to upload to; None is the main one.

        Returns
        -------
        The address of the repository.

        Raises
        ------
        MissingDependencyError
            huggingface_hub is not installed.
        InputError
            The hub cannot be reached, or refuses.
        """
        from tempfile import TemporaryDirectory

        from stfm.weights.hub import push_folder

        if inside := licences(published_inside(self.config)):
            msg = f"The model holds weights of {', '.join(inside)}; see that you may pass them on."
            warnings.warn(msg, StfmWarning, stacklevel=2)
        with TemporaryDirectory() as folder:
            return push_folder(
                self.save(folder, dtype=dtype), repo_id, token=token, private=private, message=message,
                revision=revision,
            )  # fmt: skip

    @classmethod
    def load(cls, folder: str | Path) -> Model:
        """Load a model of this family that :meth:`save` wrote, in evaluation mode; from fp32 bit for bit."""
        folder = Path(folder)
        description = read_description(folder)
        if description["family"] != cls.family:
            msg = (
                f"{folder} holds a {description['family']!r} model, not a {cls.family!r} one; "
                "load it with sf.models.load, which finds the right class."
            )
            raise DataIntegrityError(msg)
        genes = folder / GENES_FILE
        vocabulary = Vocabulary.load(genes) if genes.exists() else None
        model = cls(config_from_dict(cls.config_class, description["config"]), vocabulary, pretrained=False)
        model.load_weights(folder / WEIGHTS_FILE)
        model.seen = Seen(**description["seen"])
        model.about = About(**description.get("about", {}))
        if (folder / HISTORY_FILE).exists():
            import pandas as pd

            model.history = pd.read_csv(folder / HISTORY_FILE)
        return model.eval()

    def load_weights(self, path: str | Path) -> None:
        """Fill the model from a safetensors file whose names and shapes must agree and whose numbers must be finite."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        if not path.exists():
            msg = f"{path} does not exist; a saved model is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
            raise MissingKeyError(msg)
        try:
            state = load_file(path)
        except SafetensorError as error:
            msg = f"{path} is no whole safetensors file ({error}); save or fetch it again."
            raise DataIntegrityError(msg) from error
        self.make_room(state)
        own = self.state_dict()
        wrong = [k for k in {*own, *state} if k not in own or k not in state or own[k].shape != state[k].shape]
        if wrong:
            msg = (
                f"{path} is a checkpoint of another architecture: {len(wrong)} of {len(own)} tensors differ "
                f"in name or shape, {sorted(wrong)[0]!r} first. Load it with the configuration that it was saved with."
            )
            raise DataIntegrityError(msg)
        check_finite(state, str(path))
        self.load_state_dict(state)

    def make_room(self, state: dict[str, Tensor]) -> None:
        """Add the parts that a model only got from data, as they stand in ``state``; none by default."""


def shared_config(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values; of a file of weights only its name, since folders are nobody's business.

    The weights themselves are saved with the model, so that the file is not needed again.
    """
    values = asdict(config)
    for part in values.values():
        weights = part.get("weights") if isinstance(part, dict) else None
        if isinstance(weights, str) and not weights.startswith(("hub:", "http://", "https://")):
            part["weights"] = Path(weights).name
    return values


def config_from_dict(config_class: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a frozen config from JSON: unknown names are refused, lists become tuples."""
    known = set(config_class.__dataclass_fields__)
    if unknown := sorted(set(values) - known):
        msg = f"{config_class.__name__} has no field {unknown[0]!r}; it has: {', '.join(sorted(known))}."
        raise InputError(msg)
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_description(folder: Path) -> dict[str, Any]:
    """Read and check ``config.json`` of a saved model."""
    path = folder / CONFIG_FILE
    if not path.exists():
        msg = f"{folder} is no saved model: there is no {CONFIG_FILE} in it. Models are saved with model.save(folder)."
        raise MissingKeyError(msg)
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        msg = f"{path} is not valid JSON ({error}); save the model again."
        raise DataIntegrityError(msg) from error
    missing = {"family", "config", "seen"} - set(description)
    if missing:
        msg = f"{path} lacks {sorted(missing)[0]!r}; it is not the configuration of an stfm model."
        raise DataIntegrityError(msg)
    return description
