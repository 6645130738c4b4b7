"""ABFN (eqs. 7-9) against exact values, and the small maps around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stfm._errors import InputError
from stfm.nn.fusion import ABFN, ConcatFusion, CrossAttention, fill_missing
from stfm.nn.heads import MLPHead, Projection
from stfm.nn.lora import LoRALinear, apply_lora
from stfm.nn.pooling import TokenPooling
from stfm.nn.transformer import TransformerEncoder


def vectors(n: int = 5, width: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, width, generator=generator))  # type: ignore[return-value]


def test_one_token_is_a_linear_map():
    """s = 1: the softmax is 1, so Z^I = f_G W_v exactly."""
    image, gene = vectors()
    abfn = ABFN(32, n_tokens=1)
    expected = torch.cat(
        [
            gene @ abfn.image_attends.value.weight.T @ abfn.image_out.weight.T,
            image @ abfn.gene_attends.value.weight.T @ abfn.gene_out.weight.T,
        ],
        dim=-1,
    )
    torch.testing.assert_close(abfn(image, gene), expected)


def test_uniform_scores_give_the_mean_of_the_key_tokens():
    attention = CrossAttention(8, scale=8, softmax="spot", n_tokens=4)
    with torch.no_grad():
        attention.query.weight.zero_()
        attention.value.weight.copy_(torch.eye(8))
    own, other = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(own, other), other.mean(dim=1, keepdim=True).expand(3, 4, 8))


def test_equation_written_out():
    image, gene = vectors(n=2, width=8)
    for scale, root in (("l", math.sqrt(4)), ("d", math.sqrt(8))):
        abfn = ABFN(8, n_tokens=2, scale=scale)
        attends = abfn.image_attends
        f, g = image.view(2, 2, 4), gene.view(2, 2, 4)
        w_q, w_k, w_v = (m.weight.T for m in (attends.query, attends.key, attends.value))
        scores = (f @ w_q) @ (g @ w_k).mT / root
        z = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True) @ (g @ w_v)
        torch.testing.assert_close(attends(f, g), z)
        halves = abfn(image, gene).view(2, 2, 4)[..., :2]
        torch.testing.assert_close(halves, z @ abfn.image_out.weight.T)


def test_width_and_names_of_the_halves():
    abfn = ABFN(512)
    assert abfn.image_out.weight.shape == (32, 64)
    assert sum(p.numel() for p in abfn.parameters()) == 6 * 64 * 64 + 2 * 64 * 32
    assert sum(p.numel() for p in ABFN(512, share_directions=True).parameters()) == 3 * 64 * 64 + 2 * 64 * 32
    assert abfn(*vectors(width=512)).shape == (5, 512)


@pytest.mark.parametrize(("width", "n_tokens"), [(30, 4), (24, 8)])
def test_width_must_divide_into_even_tokens(width: int, n_tokens: int):
    with pytest.raises(InputError, match="l even"):
        ABFN(width, n_tokens=n_tokens)


def test_spots_do_not_see_each_other():
    image, gene = vectors()
    abfn = ABFN(32, n_tokens=4).eval()
    torch.testing.assert_close(abfn(image[1:3], gene[1:3]), abfn(image, gene)[1:3])


def test_softmax_over_the_batch_is_the_printed_one_in_training():
    image, gene = vectors()
    attention = CrossAttention(8, scale=8, softmax="batch", n_tokens=4).train()
    f, g = image.view(5, 4, 8), gene.view(5, 4, 8)
    scores = attention.query(f) @ attention.key(g).mT / math.sqrt(8)
    expected = torch.exp(scores) / torch.exp(scores).sum(0, keepdim=True) @ attention.value(g)
    torch.testing.assert_close(attention(f, g), expected)
    attention.eval()  # the first batch sets the running denominator
    torch.testing.assert_close(attention(f, g), expected)
    torch.testing.assert_close(attention(f[:1], g[:1]), expected[:1])


def test_residual_keeps_the_inputs():
    image, gene = vectors()
    abfn = ABFN(32, n_tokens=4, residual="mean")
    with torch.no_grad():
        abfn.image_out.weight.zero_()
        abfn.gene_out.weight.zero_()
    torch.testing.assert_close(abfn(image, gene), (image + gene) / 2)


@pytest.mark.parametrize("make", [ABFN, ConcatFusion])
def test_missing_modality(make):
    image, gene = vectors()
    fusion = make(32, missing="self")
    torch.testing.assert_close(fusion(image, None), fusion(image, image))
    torch.testing.assert_close(fusion(None, gene), fusion(gene, gene))
    tokens = make(32, missing="token")
    torch.testing.assert_close(tokens(image, None), tokens(image, tokens.no_gene.expand_as(image)))
    with pytest.raises(InputError, match="Both modalities are missing"):
        fusion(None, None)


def test_missing_by_spot():
    image, gene = vectors()
    has = torch.tensor([True, False, True, True, False])
    filled, same = fill_missing(image, gene, has_image=has)
    torch.testing.assert_close(filled[1], gene[1])
    torch.testing.assert_close(filled[0], image[0])
    assert same is gene
    stand_in = torch.zeros(32)
    filled, _ = fill_missing(image, gene, has_image=has, no_image=stand_in)
    torch.testing.assert_close(filled[~has], torch.zeros(2, 32))


def test_projection_kinds():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 100 + 5
    assert Projection(10, 4)(x).shape == (6, 4)
    assert Projection(10, 4, kind="mlp", norm="layer", dropout=0.1)(x).shape == (6, 4)
    assert Projection(10, 10, kind="none")(x) is x
    normed = Projection(10, 10, kind="none", norm="batch")(x)
    torch.testing.assert_close(normed.std(dim=0, correction=0), torch.ones(10), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="projection='none' needs encoders of the shared width 4"):
        Projection(10, 4, kind="none")


def test_mlp_head():
    head = MLPHead(10, 3, hidden=(8, 8), norm="batch").eval()
    assert head(torch.zeros(2, 10)).shape == (2, 3)


def test_lora_changes_nothing_before_training_and_keeps_names():
    net = TransformerEncoder(16, 4, 32, 2, dropout=0.0)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    before, names = net(x), set(net.state_dict())
    assert apply_lora(net, rank=2) == 6
    torch.testing.assert_close(net(x), before)
    assert names <= set(net.state_dict())
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    with torch.no_grad():
        layer = net.layers[0].linear1
        assert isinstance(layer, LoRALinear)
        layer.lora_b.fill_(0.1)
    assert not torch.allclose(net.eval()(x), before)
    with pytest.raises(InputError, match="no linear layers"):
        apply_lora(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("kind", ["mean", "max", "attention", "cls"])
def test_pooling_leaves_padding_out(kind: str):
    tokens = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[:, 4:] = True
    pooling = TokenPooling(kind, width=8)
    torch.testing.assert_close(pooling(tokens, padding), pooling(tokens[:, :4]))


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_is_that_of_torch(norm_first: bool):
    ours = TransformerEncoder(16, 4, 32, 2, norm_first=norm_first).eval()
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, activation="gelu", batch_first=True, norm_first=norm_first, dropout=0.1
    )
    norm = nn.LayerNorm(16) if norm_first else None
    theirs = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    kept = ~padding
    torch.testing.assert_close(
        ours(x, padding)[kept], theirs(x, src_key_padding_mask=padding)[kept], atol=1e-5, rtol=1e-4
    )
