"""The MLP on frozen features (ST-Align, section on gene expression), as a correction of ridge or by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from stfm._validate import check_count, check_positive
from stfm.metrics.expression import gene_pearson
from stfm.nn.ridge import Basis, solve

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from stfm.nn.ridge import Choice, Fold

__all__ = ["MLPConfig", "correction", "fit_mlp"]


@dataclass(frozen=True)
class MLPConfig:
    """Size and schedule of the MLP.

    Attributes
    ----------
    hidden
        Units of the hidden layer.
    dropout
        Of inputs and hidden units.
    learning_rate, weight_decay
        Of AdamW.
    batch_size
        Spots a step.
    max_epochs
        Epochs that are tried; how many are used is chosen on held-out sections.
    n_members
        Networks from different seeds whose outputs are averaged.
    on_ridge
        True: the network adds to the ridge solution, so that zero epochs are ridge itself. False: the network alone,
        as in the paper.
    """

    hidden: int = 256
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 64
    max_epochs: int = 30
    n_members: int = 3
    on_ridge: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden", "batch_size", "max_epochs", "n_members"):
            check_count(name, getattr(self, name))
        check_positive("learning_rate", self.learning_rate)


class _Net(nn.Module):
    """One hidden layer; the last layer starts at zero, so that training starts from what it corrects."""

    def __init__(self, n_inputs: int, n_genes: int, config: MLPConfig) -> None:
        super().__init__()
        self.first = nn.Linear(n_inputs, config.hidden)
        self.last = nn.Linear(config.hidden, n_genes)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.dropout(nn.functional.gelu(self.first(self.dropout(x)))))
        return out


def fit_mlp(
    x: NDArray[np.float32],
    y: NDArray[np.float64],
    folds: Sequence[Fold],
    bases: Sequence[Basis],
    choice: Choice,
    basis: Basis,
    config: MLPConfig,
    rng: np.random.Generator,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Choose the number of epochs on held-out sections, then train on all of them.

    Returns
    -------
    The arrays of the network (``mlp.*``), and what was chosen.
    """
    seeds = [int(s) for s in rng.integers(2**31 - 1, size=config.n_members)]
    curve = np.zeros(config.max_epochs + 1)
    for (train, test), inner in zip(folds, bases, strict=True):
        base, (z, goal, unit) = _ridge(inner, y[train], choice), _training_data(inner, y[train], choice, config)
        held = inner.project(x[test])[:, : z.shape[1]]
        start = base(held) if config.on_ridge else np.broadcast_to(y[train].mean(axis=0), y[test].shape)
        inputs = torch.from_numpy((held / _spread(inner, z.shape[1])).astype(np.float32))
        for epoch, net in _train(z, goal, config, seeds[0], config.max_epochs):
            with torch.inference_mode():
                added = net.eval()(inputs).numpy() * unit
            curve[epoch] += gene_pearson(y[test], start + added).mean() / len(folds)
    first = 0 if config.on_ridge else 1
    epochs = first + int(np.argmax(curve[first:]))
    z, goal, unit = _training_data(basis, y, choice, config)
    arrays: dict[str, NDArray[np.float32]] = {}
    nets = [_last(_train(z, goal, config, seed, epochs)) for seed in seeds]
    for name in ("first.weight", "first.bias", "last.weight", "last.bias"):
        arrays[f"mlp.{name}"] = np.stack([net.state_dict()[name].numpy() for net in nets])
    arrays["mlp.unit"] = unit.astype(np.float32)
    arrays["mlp.spread"] = np.float32(_spread(basis, z.shape[1])).reshape(1)
    arrays["mlp.offset"] = np.zeros(y.shape[1], np.float32) if config.on_ridge else y.mean(axis=0).astype(np.float32)
    return arrays, {"epochs": epochs, "mlp_held_out_r": float(curve[epochs]), "on_ridge": config.on_ridge}


def correction(arrays: Mapping[str, NDArray[np.float32]], scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what the networks add, float32 ``(n, g)``, averaged over them."""
    inputs = torch.from_numpy(np.ascontiguousarray(scores / arrays["mlp.spread"], dtype=np.float32))
    first, bias = (torch.from_numpy(arrays[f"mlp.first.{part}"]) for part in ("weight", "bias"))
    last, last_bias = (torch.from_numpy(arrays[f"mlp.last.{part}"]) for part in ("weight", "bias"))
    with torch.inference_mode():
        hidden = nn.functional.gelu(torch.einsum("ni,mhi->mnh", inputs, first) + bias[:, None])
        added = (torch.einsum("mnh,mgh->mng", hidden, last) + last_bias[:, None]).mean(dim=0).numpy()
    result: NDArray[np.float32] = added * arrays["mlp.unit"] + arrays["mlp.offset"]
    return result


def _spread(basis: Basis, k: int) -> float:
    """Root mean square of the scores: one number, so that the leading components keep their weight."""
    return float(np.sqrt(basis.power[:k].mean() / len(basis.scores)))


def _ridge(basis: Basis, y: NDArray[np.float64], choice: Choice) -> Any:
    weights, intercept = solve(basis, y, choice)
    return lambda z: z[:, : len(weights)] @ weights + intercept


def _training_data(
    basis: Basis, y: NDArray[np.float64], choice: Choice, config: MLPConfig
) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Return inputs, goals in units of each gene's deviation, and these units."""
    k = min(choice.n_components, len(basis.power))
    z = basis.scores[:, :k]
    start = _ridge(basis, y, choice)(z) if config.on_ridge else y.mean(axis=0)
    unit = np.maximum(y.std(axis=0), 1e-6)
    inputs = torch.from_numpy((z / _spread(basis, k)).astype(np.float32))
    return inputs, torch.from_numpy(((y - start) / unit).astype(np.float32)), unit


def _train(z: Tensor, goal: Tensor, config: MLPConfig, seed: int, epochs: int) -> Iterator[tuple[int, _Net]]:
    """Yield the network before training and after each epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Net(z.shape[1], goal.shape[1], config)
        state = torch.get_rng_state()
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    yield 0, net
    for epoch in range(1, epochs + 1):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            net.train()
            for rows in torch.randperm(len(z)).split(config.batch_size):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.mse_loss(net(z[rows]), goal[rows]).backward()
                optimizer.step()
            state = torch.get_rng_state()
        yield epoch, net


def _last(steps: Iterator[tuple[int, _Net]]) -> _Net:
    *_, (_, net) = steps
    return net.eval()
