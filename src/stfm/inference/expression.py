"""Expression from frozen image features: standardise, PCA, ridge (or an MLP on top). Arrays in, arrays out.

Every choice (penalty, rank, number of components, epochs) is made by leaving out one training section after the other;
the sections that are tested play no part in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stfm._errors import DataIntegrityError, InputError, MissingKeyError
from stfm._validate import check_choice, check_count, resolve_rng
from stfm.nn.ridge import ALPHAS, RULES, Basis, Choice, choose, held_out, solve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from stfm.inference.expression_mlp import MLPConfig

__all__ = ["METHODS", "RANKS", "ExpressionPredictor", "fit_expression"]

Method = Literal["ridge", "mlp"]
METHODS = ("ridge", "mlp")
Rule = Literal["best", "one_se"]
#: ranks of the coefficients that are tried; None leaves them as they are
RANKS = (None, 3, 6, 12, 24)

_CONFIG = "config.json"
_WEIGHTS = "predictor.safetensors"
_KIND = "stfm-expression-predictor"


@dataclass(frozen=True)
class ExpressionPredictor:
    """A fitted map from image features to expression, ``log1p(1e4 c / sum c)``.

    Attributes
    ----------
    genes
        Genes it predicts, in order.
    arrays
        Its numbers: ``center`` and ``scale`` of the features ``(f,)``, ``components`` ``(k, f)``, ``weights``
        ``(k, g)``, ``intercept`` ``(g,)``, and those of an MLP (``mlp.*``).
    choice
        What was chosen on held-out training sections, and the score there.
    features
        How the features are made: encoder, hash of its weights, contexts, rings.
    seen
        Studies, slides and patients it was fitted on.
    """

    genes: tuple[str, ...]
    arrays: Mapping[str, NDArray[np.float32]]
    choice: Mapping[str, Any]
    features: Mapping[str, Any] = field(default_factory=dict)
    seen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """``"ridge"`` or ``"mlp"``."""
        return str(self.choice["method"])

    @property
    def n_features(self) -> int:
        """Number of features it reads."""
        return len(self.arrays["center"])

    def predict(self, features: ArrayLike) -> NDArray[np.float32]:
        """Return predicted expression, float32 ``(n, g)``, from features ``(n, f)``; nothing is clipped."""
        values = np.asarray(features, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != self.n_features:
            msg = f"the predictor reads {self.n_features} features a spot, got shape {values.shape}."
            raise InputError(msg)
        a = self.arrays
        scores = np.asarray(((values - a["center"]) / a["scale"]) @ a["components"].T, dtype=np.float32)
        predicted = np.asarray(scores @ a["weights"] + a["intercept"], dtype=np.float32)
        if self.method == "mlp":
            from stfm.inference.expression_mlp import correction

            predicted += correction(a, scores)
        return predicted

    def save(self, folder: str | Path) -> None:
        """Write ``config.json``, ``genes.txt`` and ``predictor.safetensors`` to a folder."""
        from safetensors.numpy import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({k: np.ascontiguousarray(v) for k, v in self.arrays.items()}, path / _WEIGHTS)
        (path / "genes.txt").write_text("\n".join(self.genes) + "\n", encoding="utf-8")
        config = {"kind": _KIND, "choice": self.choice, "features": self.features, "seen": self.seen}
        (path / _CONFIG).write_text(json.dumps(config, indent=2, default=_plain), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ExpressionPredictor:
        """Read what :meth:`save` wrote."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(folder).expanduser()
        missing = [name for name in (_CONFIG, "genes.txt", _WEIGHTS) if not (path / name).is_file()]
        if missing:
            msg = f"{path} holds no fitted predictor ({', '.join(missing)} missing); give the folder it was saved to."
            raise MissingKeyError(msg)
        try:
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
            arrays = load_file(path / _WEIGHTS)
        except (json.JSONDecodeError, SafetensorError) as error:
            msg = f"{path} is damaged ({error}); save the predictor again."
            raise DataIntegrityError(msg) from error
        if config.get("kind") != _KIND:
            msg = f"{path} holds something else than a predictor of expression (a model? load it with sf.models.load)."
            raise DataIntegrityError(msg)
        genes = tuple((path / "genes.txt").read_text(encoding="utf-8").split("\n")[:-1])
        if len(genes) != len(arrays["intercept"]):
            msg = f"{path}: genes.txt has {len(genes)} genes, the weights {len(arrays['intercept'])}; save it again."
            raise DataIntegrityError(msg)
        if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            msg = f"{path}: {broken[0]} holds numbers that are not finite; save the predictor again."
            raise DataIntegrityError(msg)
        return cls(genes, arrays, config["choice"], config["features"], config["seen"])


def fit_expression(
    features: Sequence[NDArray[np.float32]],
    targets: Sequence[NDArray[np.float32]],
    genes: Sequence[str],
    *,
    method: Method = "ridge",
    n_components: int | Sequence[int] = 256,
    alphas: Sequence[float] = ALPHAS,
    ranks: Sequence[int | None] = RANKS,
    rule: Rule = "best",
    coords: Sequence[NDArray[np.float64]] | None = None,
    mlp: MLPConfig | None = None,
    rng: int | np.random.Generator | None = 0,
    described: Mapping[str, Any] | None = None,
    seen: Mapping[str, Any] | None = None,
) -> ExpressionPredictor:
    """Fit a predictor of expression on training sections.

    Parameters
    ----------
    features
        Features of each training section, ``(n_i, f)``.
    targets
        ``log1p(1e4 c / sum c)`` of each training section, ``(n_i, g)``.
    genes
        Names of the ``g`` genes.
    method
        ``"ridge"``, or ``"mlp"``: the paper's MLP on frozen features; by default it corrects the ridge solution.
    n_components
        Principal components of the standardised features, or several numbers to choose from.
    alphas
        Ridge penalties to choose from, as multiples of the mean variance of the components.
    ranks
        Ranks of the coefficients to choose from; None leaves them as they are.
    rule
        ``"best"`` takes the setting with the best mean r on held-out sections; ``"one_se"`` the largest penalty within
        one standard error of it, which carries over better to other patients.
    coords
        Coordinates of each section; with one training section only, blocks of it are left out instead of sections.
    mlp
        Size and schedule of the MLP.
    rng
        Seed or generator of the MLP.
    described
        How the features are made, kept in the predictor.
    seen
        Studies, slides and patients of the sections, kept in the predictor.

    Returns
    -------
    The predictor; its ``choice`` holds what was chosen and the mean r on held-out sections.

    Raises
    ------
    InputError
        Tables that do not belong together or are not finite, or too few spots.
    """
    check_choice("method", method, METHODS)
    check_choice("rule", rule, RULES)
    sections = _checked(features, targets, genes)
    sizes = [n_components] if isinstance(n_components, (int, np.integer)) else list(n_components)
    for size in sizes:
        check_count("n_components", size)
    folds = held_out([len(x) for x, _ in sections], coords)
    x = np.concatenate([part for part, _ in sections])
    y = np.concatenate([part for _, part in sections]).astype(np.float64)
    bases = [Basis.of(x[train], max(sizes)) for train, _ in folds]
    choice = choose(x, y, folds, bases, Choice.grid(sizes, alphas, ranks), rule)
    basis = Basis.of(x, max(sizes))
    weights, intercept = solve(basis, y, choice)
    k = len(weights)
    arrays = {
        "center": basis.center, "scale": basis.scale, "components": basis.components[:k],
        "weights": weights, "intercept": intercept,
    }  # fmt: skip
    chosen = {
        "method": method,
        **choice.described(),
        "rule": rule,
        "held_out": "sections" if len(sections) > 1 else "blocks",
    }
    if method == "mlp":
        from stfm.inference.expression_mlp import MLPConfig, fit_mlp

        extra, report = fit_mlp(x, y, folds, bases, choice, basis, mlp or MLPConfig(), resolve_rng(rng))
        if not (mlp or MLPConfig()).on_ridge:
            arrays |= {"weights": np.zeros_like(weights), "intercept": np.zeros_like(intercept)}
        arrays |= extra
        chosen |= report
    as_float = {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in arrays.items()}
    return ExpressionPredictor(tuple(map(str, genes)), as_float, chosen, dict(described or {}), dict(seen or {}))


def _checked(
    features: Sequence[Any], targets: Sequence[Any], genes: Sequence[str]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    if not len(features) or len(features) != len(targets):
        msg = f"one table of features a section and one of targets, got {len(features)} and {len(targets)}."
        raise InputError(msg)
    sections = [(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in zip(features, targets, strict=True)]
    for i, (x, y) in enumerate(sections):
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or x.shape[1] != sections[0][0].shape[1]:
            msg = f"section {i}: features {x.shape} and targets {y.shape} do not belong together."
            raise InputError(msg)
        if y.shape[1] != len(genes):
            msg = f"section {i}: {y.shape[1]} targets for {len(genes)} genes."
            raise InputError(msg)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            msg = f"section {i}: features or targets hold nan or infinite values."
            raise InputError(msg)
    total = sum(len(x) for x, _ in sections)
    if total < 10:
        msg = f"{total} training spots are too few to fit and to choose on; give at least 10."
        raise InputError(msg)
    return sections


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
