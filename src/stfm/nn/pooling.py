"""From tokens to one vector."""

from __future__ import annotations

from torch import Tensor, nn

from stfm._validate import check_choice

POOLINGS = ("mean", "cls", "max", "attention")


class TokenPooling(nn.Module):
    """Pool ``(b, t, d)`` tokens to ``(b, d)``.

    Parameters
    ----------
    kind
        ``"mean"``, ``"max"``, ``"cls"`` (the first token) or ``"attention"`` (a learned weight a token).
    width
        d; needed for ``"attention"``.
    """

    def __init__(self, kind: str = "mean", *, width: int | None = None) -> None:
        super().__init__()
        self.kind = check_choice("pooling", kind, POOLINGS)
        self.score = nn.Linear(width, 1) if kind == "attention" and width is not None else None

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return ``(b, d)``; ``padding`` is bool ``(b, t)``, True where there is no token."""
        if self.kind == "cls":
            return tokens[:, 0]
        if self.score is not None:
            scores: Tensor = self.score(tokens).squeeze(-1)
            if padding is not None:
                scores = scores.masked_fill(padding, float("-inf"))
            return (scores.softmax(dim=-1).unsqueeze(-1) * tokens).sum(dim=1)
        if self.kind == "max":
            if padding is not None:
                tokens = tokens.masked_fill(padding.unsqueeze(-1), float("-inf"))
            return tokens.amax(dim=1)
        if padding is None:
            return tokens.mean(dim=1)
        kept = (~padding).unsqueeze(-1).to(tokens.dtype)
        return (tokens * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1.0)
