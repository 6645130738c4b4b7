from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stfm._errors import DataIntegrityError, InputError, MissingKeyError
from stfm.models import create, load
from stfm.models._multibranch_parts import Tissue, sites_of_bins
from stfm.models._squall_layout import expected_shapes
from stfm.models.registry import MODELS
from stfm.nn.attention import Attention
from stfm.nn.batch import Batch
from stfm.nn.lora import LoRALinear
from stfm.slide.genes import Vocabulary

N_GENES = 60
NARROW = {"width": 32, "depth": 3, "specific": 2, "heads": 4, "gene_width": 8, "decoder_depth": 1}
BINS = NARROW | {"tile_px": 64, "n_bins": 16}  # 4 x 4 patches of 16 px, and of 4 x 4 bins
BOTH = pytest.mark.parametrize("name", ["storm-multibranch", "storm-multibranch-small"])


def make(name: str, vocabulary, seed: int = 0, **changes):
    torch.manual_seed(seed)
    values = BINS if name == "storm-multibranch" else NARROW | {"hidden_genes": 0.0, "replay": 0.0}
    return create(name, vocabulary, **{**values, **changes})


def tissue_of_bins(model, n: int = 4, seed: int = 0) -> Tissue:
    """Tiles that are covered with bins."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    bins = 3 * torch.rand(n, config.n_bins, config.n_bins, N_GENES, generator=generator)
    counts, xy_um = sites_of_bins(bins, config.extent_um)
    tiles = torch.randint(0, 256, (n, 3, config.tile_px, config.tile_px), generator=generator, dtype=torch.uint8)
    return Tissue(tiles, counts, xy_um, torch.ones(n, counts.shape[1], dtype=torch.bool))


def tissue_of_spots(model, n: int = 6, sites: int = 3, seed: int = 0) -> Tissue:
    """Tiles with several spots in them, some of which are missing."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    xy_um = config.extent_um * torch.rand(n, sites, 2, generator=generator)
    xy_um[:, 0] = config.extent_um / 2
    present = torch.rand(n, sites, generator=generator) < 0.7
    present[:, 0] = True
    tiles = torch.randint(0, 256, (n, 3, config.tile_px, config.tile_px), generator=generator, dtype=torch.uint8)
    return Tissue(tiles, 3 * torch.rand(n, sites, N_GENES, generator=generator), xy_um, present)


def tissue_of(model, **options) -> Tissue:
    return (tissue_of_bins if model.config.expression == "bins" else tissue_of_spots)(model, **options)


def inputs_of(model, tissue: Tissue) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and scaled expression, which gradients can be taken of."""
    patches = model._patches(tissue.tiles).requires_grad_()
    return patches, model.expression.scaled(tissue.counts, tissue.gene_mask).requires_grad_()


class TestPublishedSize:
    @pytest.fixture
    def published(self):
        genes = Vocabulary(np.array([f"GENE{i}" for i in range(15_757)]))
        with torch.device("meta"):
            return create("squall", genes)

    def test_counts_exactly(self, published):
        decoders = [p for part in (published.gene_decoder, published.image_decoder) for p in part.parameters()]
        n_decoders = sum(p.numel() for p in decoders)
        assert published.n_parameters == 555_415_949
        assert n_decoders == 109_794_317
        assert published.n_parameters - n_decoders == 445_621_632

    def test_has_the_published_tokens(self, published):
        assert published.config.side**2 == 196
        assert published.config.cells == 4
        assert published.config.extent_um == 112.0  # 0.5 µm a px, 2 µm a bin
        assert len(published.encoder.blocks) == 24
        assert [len(b.block.experts) for b in published.encoder.blocks] == [2] * 16 + [1] * 8

    def test_alias(self):
        assert MODELS.get("squall") is MODELS.get("storm-multibranch")


@BOTH
def test_initial_weights_are_centred(name: str, vocabulary):
    model = make(name, vocabulary, width=64)
    for part in (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.numel() > 1000):
        assert abs(float(part.weight.detach().mean())) < 5 * 0.02 / part.weight.numel() ** 0.5
        assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.12)
        assert part.bias is None or not part.bias.any()


class TestMasking:
    def test_each_patch_of_bins_shows_one_modality(self, vocabulary):
        model = make("storm-multibranch", vocabulary)
        tissue = tissue_of_bins(model)
        latent, image_shown, gene_shown, _ = model._mask(*inputs_of(model, tissue), tissue)
        assert torch.equal(image_shown, ~gene_shown)
        assert image_shown.sum(dim=1).eq(8).all()
        assert latent.x.shape == (4, 16, 32)

    def test_patches_under_a_shown_spot_are_hidden(self, vocabulary):
        model = make("storm-multibranch-small", vocabulary)
        tissue = tissue_of_spots(model)
        _, image_shown, gene_shown, _ = model._mask(*inputs_of(model, tissue), tissue)
        under = model._under(tissue)
        assert under[tissue.present].any(dim=1).all()
        assert not (image_shown[:, None] & under & gene_shown[:, :, None]).any()
        bare = ~(under & gene_shown[:, :, None]).any(dim=1)
        assert torch.equal(image_shown, bare)
        assert int(gene_shown.sum()) == round(0.5 * int(tissue.present.sum()))

    @BOTH
    @pytest.mark.parametrize("decoder", ["self", "cross"])
    def test_what_is_hidden_is_not_read(self, name: str, decoder: str, vocabulary):
        model = make(name, vocabulary, decoder=decoder)
        tissue = tissue_of(model)
        patches, scaled = inputs_of(model, tissue)
        latent, image_shown, gene_shown, _ = model._mask(patches, scaled, tissue)
        outputs = [d(latent, model.position(latent.xy_um)).sum() for d in (model.gene_decoder, model.image_decoder)]
        to_patches, to_genes = torch.autograd.grad(sum(outputs), (patches, scaled))
        assert to_patches[~image_shown].abs().max() == 0
        assert (to_patches[image_shown].abs().amax(dim=1) > 0).all()
        if name == "storm-multibranch":
            hidden = gene_shown.logical_not()[:, :, None].expand(-1, -1, 16)
            by_patch = torch.zeros(4, 256, N_GENES).scatter(
                1, model._owner_of_patches(tissue).flatten(1).expand(4, -1)[:, :, None].expand(-1, -1, N_GENES),
                torch.ones(4, 256, N_GENES) * hidden.flatten(1)[:, :, None],
            )  # fmt: skip
            assert to_genes[by_patch.bool()].abs().max() == 0
            assert to_genes[~by_patch.bool()].abs().max() > 0
        else:
            assert to_genes[~gene_shown].abs().max() == 0
            assert (to_genes[gene_shown].abs().amax(dim=1) > 0).all()

    @BOTH
    def test_losses_look_at_what_was_hidden(self, name: str, vocabulary):
        """The targets are the hidden ones: a change of what was shown changes no target."""
        model = make(name, vocabulary).eval()
        tissue = tissue_of(model)
        patches, scaled = inputs_of(model, tissue)
        latent, image_shown, gene_shown, _ = model._mask(patches, scaled, tissue)
        predicted = model._decoded_pixels(latent).detach()
        losses = model._mask_losses(patches, scaled, tissue)
        expected = torch.nn.functional.smooth_l1_loss(predicted[~image_shown], patches[~image_shown])
        torch.testing.assert_close(losses["image"], expected)
        if name == "storm-multibranch-small":
            hidden = tissue.present & ~gene_shown
            predicted = model.gene_decoder.genes(model._decoded_sites(latent)[hidden])
            expected = torch.nn.functional.smooth_l1_loss(predicted, scaled[hidden])
            torch.testing.assert_close(losses["gene"], expected)

    def test_the_same_is_hidden_in_every_evaluation(self, vocabulary, make_batch):
        model = make("storm-multibranch-small", vocabulary)
        batch = make_batch(model)
        model.eval()
        with torch.no_grad():
            assert model.losses(batch)["gene"] == model.losses(batch)["gene"]
        model.train()
        assert model.losses(batch)["gene"] != model.losses(batch)["gene"]

    def test_bins_lie_where_they_were_measured(self, vocabulary):
        model = make("storm-multibranch", vocabulary)
        tissue = tissue_of_bins(model, n=2)
        assert model._owner(tissue)[0].tolist() == list(range(256))
        # one spot of 40 µm in the middle covers the bins in it and no others
        model = make("storm-multibranch", vocabulary, spot_um=40.0)
        owner = model._owner(tissue._replace(xy_um=torch.full((1, 1, 2), 56.0), present=torch.ones(2, 1).bool()))
        inside = (model.bin_centres - 56).square().sum(dim=1) <= 20**2
        assert torch.equal(owner >= 0, inside.expand(2, -1))

    def test_legacy_reshape_moves_what_is_predicted(self, vocabulary):
        proper, legacy = (make("storm-multibranch", vocabulary, legacy_reshape=flag).eval() for flag in (False, True))
        tissue = tissue_of_bins(proper)
        with torch.no_grad():
            a, b = (m._mask_losses(*inputs_of(m, tissue), tissue) for m in (proper, legacy))
        assert a["image"] != b["image"]
        assert a["gene"] != b["gene"]


@BOTH
def test_genes_that_were_not_measured_are_out_of_the_loss(name: str, vocabulary):
    """Their gradient is exactly zero, in what is read as in what is predicted, whatever their numbers."""
    model = make(name, vocabulary).train()
    tissue = tissue_of(model)
    mask = torch.ones(len(tissue.present), N_GENES, dtype=torch.bool)
    mask[:, ::3] = False
    counts = torch.where(mask[:, None], tissue.counts, 1e6)
    model.tissue_losses(tissue._replace(counts=counts, gene_mask=mask[:, None]))["loss"].backward()
    absent, there = slice(0, None, 3), [i for i in range(N_GENES) if i % 3]
    out, read = model.gene_decoder.genes, model.expression.genes
    assert out.weight.grad[absent].abs().max() == 0
    assert out.bias.grad[absent].abs().max() == 0
    assert read.weight.grad[:, absent].abs().max() == 0
    assert (out.weight.grad[there].abs().amax(dim=1) > 0).all()
    assert (read.weight.grad[:, there].abs().amax(dim=0) > 0).all()


def test_a_gene_that_one_slide_lacks_is_learned_from_the_other(vocabulary, make_batch):
    model = make("storm-multibranch-small", vocabulary).train()
    model.stage = "mask"
    mask = torch.ones(8, N_GENES, dtype=torch.bool)
    mask[:4, 0] = False
    model.losses(replace(make_batch(model), gene_mask=mask))["gene"].backward()
    assert model.gene_decoder.genes.weight.grad[0].abs().max() > 0


class TestStages:
    @BOTH
    def test_each_computes_and_trains_its_own(self, name: str, vocabulary, make_batch):
        model = make(name, vocabulary).train()
        batch = make_batch(model)
        expected = {"mask": {"gene", "image"}, "align": {"contrastive", "matching"}}
        expected["both"] = expected["mask"] | expected["align"]
        for stage in (*model.stages, "both"):
            model.stage = stage
            model.zero_grad()
            losses = model.losses(batch)
            assert set(losses) == {"loss"} | expected[stage]
            torch.testing.assert_close(losses["loss"], sum(losses[k] for k in expected[stage]))
            losses["loss"].backward()
            assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
            frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
            assert all("decoder" in n for n in frozen)
            assert bool(frozen) == (stage == "align")
        with pytest.raises(InputError, match="stage='tune' is unknown"):
            model.stage = "tune"

    def test_alignment_can_go_on_masking(self, vocabulary, make_batch):
        model = make("storm-multibranch-small", vocabulary, replay=0.5)
        model.stage = "align"
        losses = model.losses(make_batch(model))
        assert set(losses) == {"loss", "gene", "image", "contrastive", "matching"}
        expected = 0.5 * (losses["gene"] + losses["image"]) + losses["contrastive"] + losses["matching"]
        torch.testing.assert_close(losses["loss"], expected)
        assert all(p.requires_grad for p in model.parameters())

    def test_a_weight_of_zero_leaves_a_loss_and_its_decoder_out(self, vocabulary, make_batch):
        model = make("storm-multibranch-small", vocabulary, pixel_weight=0.0, matching_weight=0.0)
        assert set(model.losses(make_batch(model))) == {"loss", "gene", "contrastive"}
        assert not any(p.requires_grad for p in model.image_decoder.parameters())
        model = make("storm-multibranch-small", vocabulary, pixel_weight=0.0, gene_weight=0.0)
        model.stage = "mask"
        with pytest.raises(InputError, match="All losses of stage 'mask' have weight 0"):
            model.losses(make_batch(model))

    @pytest.mark.slow
    def test_loss_falls(self, vocabulary, make_batch):
        model = make("storm-multibranch-small", vocabulary).train()
        colour = torch.randint(40, 216, (16, 3, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        batch = replace(make_batch(model, n=16), spot_tiles=colour.expand(-1, -1, 112, 112).contiguous())
        model.pixel_mean.fill_(0.5)
        model.pixel_scale.fill_(0.2)
        model.expression.fit(batch.counts)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        values = []
        for _ in range(30):
            optimiser.zero_grad()
            losses = model.losses(batch)
            losses["loss"].backward()
            optimiser.step()
            values.append({k: v.item() for k, v in losses.items()})
        for name in ("loss", "gene", "image", "contrastive", "matching"):
            assert np.mean([v[name] for v in values[-5:]]) < 0.95 * values[0][name]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_the_published_form_with_checkpointing(precision: str, vocabulary):
    """Narrow, but the published form: image of bins, two thirds of the blocks specific, two decoders."""
    gradients = []
    for checkpointing in (True, False):
        model = make("storm-multibranch", vocabulary, checkpointing=checkpointing, drop_path=0.0).train()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model.tissue_losses(tissue_of_bins(model))["loss"]
        loss.backward()
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        gradients.append([p.grad.clone() for p in model.parameters()])
        before = model.weights_sha256()
        torch.optim.AdamW(model.parameters(), lr=1e-4).step()
        assert model.weights_sha256() != before
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


class TestSites:
    def test_spots_in_the_tile_are_read(self, vocabulary):
        model = make("storm-multibranch-small", vocabulary, window=3, tile_um=112.0).eval()
        assert model.inputs.window == 3
        batch = Batch(
            spot_tiles=torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8),
            counts=torch.rand(4, N_GENES),
            xy_um=torch.tensor([[1000.0, 2000.0], [1030.0, 1980.0], [1100.0, 2000.0], [1000.0, 2040.0]]),
            window=torch.tensor([[0, 1, 2], [3, 0, -1]]),
        )
        tissue = model.read(batch)
        assert tissue.tiles.shape[0] == 2
        assert tissue.xy_um[0].tolist() == [[56, 56], [86, 36], [156, 56]]
        assert tissue.present.tolist() == [[True, True, False], [True, True, False]]
        assert torch.equal(tissue.counts[1, 1], batch.counts[0])

        def joint(changed: Batch) -> torch.Tensor:
            with torch.no_grad():
                return model.embed(changed).joint

        whole = joint(batch)
        outside, inside = batch.counts.clone(), batch.counts.clone()
        outside[2], inside[1] = 9.0, 9.0
        torch.testing.assert_close(joint(replace(batch, counts=outside)), whole)
        assert float((joint(replace(batch, counts=inside)) - whole)[0].abs().max()) > 1e-5
        torch.testing.assert_close(joint(batch.take(torch.tensor([1]))), whole[1:])
        assert set(model.train().losses(batch)) == {"loss", "gene", "image", "contrastive", "matching"}
        with pytest.raises(InputError, match="windows without coordinates"):
            model.embed(replace(batch, xy_um=None))

    @BOTH
    def test_losses_with_spots_that_are_not_there(self, name: str, vocabulary):
        model = make(name, vocabulary).train()
        tissue = tissue_of(model)
        absent = tissue.present.clone()
        absent[:, 1:] = False
        model.tissue_losses(tissue._replace(present=absent))["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_one_resolution_for_each_platform(self, vocabulary):
        sizes = {p: create("storm-multibranch-small", vocabulary, platform=p).inputs for p in ("ST", "xenium")}
        assert sizes["ST"].spot_um == 224.0
        assert sizes["xenium"].spot_um == 56.0
        assert create("storm-multibranch-small", vocabulary, tile_um=80.0).inputs.spot_um == 80.0


class TestPrediction:
    @BOTH
    @pytest.mark.parametrize("decoder", ["self", "cross"])
    def test_from_the_image(self, name: str, decoder: str, vocabulary, make_batch):
        model = make(name, vocabulary, decoder=decoder, standardise="zscore", window=1).eval()
        model.expression.scaler.mean.fill_(2.0)
        batch = make_batch(model)
        with torch.no_grad():
            predicted = model.predict(batch).mean
            assert predicted.shape == (8, N_GENES)
            assert abs(float(predicted.mean()) - 2.0) < 0.5  # in the units of the counts
            torch.testing.assert_close(model.predict(batch.without("gene")).mean, predicted)
            assert not torch.equal(predicted[1], predicted[0])
        with pytest.raises(InputError, match="not trained to denoise"):
            model.predict(batch, own=True)
        with pytest.raises(InputError, match="The batch has no image"):
            model.predict(batch.without("image"))

    def test_is_what_masking_trains(self, vocabulary, make_batch):
        """With every site hidden, a step of masking predicts what ``predict`` returns."""
        model = make("storm-multibranch-small", vocabulary).eval()
        batch = make_batch(model)
        tissue = model.read(batch)
        with torch.no_grad():
            latent, _ = model._encode_shown(*inputs_of(model, tissue), tissue, ~tissue.present)
            expected = model.gene_decoder.genes(model._decoded_sites(latent)[:, 0])
            torch.testing.assert_close(model.predict(batch).mean, expected)

    @BOTH
    def test_own_counts(self, name: str, vocabulary, make_batch):
        model = make(name, vocabulary, hidden_genes=0.3, window=1).eval()
        batch = make_batch(model)
        other = replace(batch, counts=batch.counts.flip(0))
        with torch.no_grad():
            assert torch.equal(model.predict(batch).mean, model.predict(other).mean)
            assert not torch.equal(model.predict(batch, own=True).mean, model.predict(other, own=True).mean)
            assert torch.isfinite(model.predict(batch.without("image"), own=True).mean).all()

    def test_neighbours_that_were_measured(self, vocabulary):
        model = make("storm-multibranch-small", vocabulary, window=2, tile_um=112.0).eval()
        batch = Batch(
            spot_tiles=torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8),
            counts=torch.rand(3, N_GENES),
            xy_um=torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]]),
            window=torch.tensor([[0, 1], [2, 0]]),
            measured=torch.tensor([False, True, False]),
        )
        changed = batch.counts.clone()
        changed[[0, 2]] = 7.0  # not measured: not read
        with torch.no_grad():
            first = model.predict(batch).mean
            torch.testing.assert_close(model.predict(replace(batch, counts=changed)).mean, first)
            changed[1] = 7.0
            second = model.predict(replace(batch, counts=changed)).mean
        assert not torch.equal(second[0], first[0])
        torch.testing.assert_close(second[1], first[1])

    def test_genes_hidden_where_expression_is_shown(self, vocabulary, make_batch):
        model = make("storm-multibranch-small", vocabulary, hidden_genes=0.5).train()
        model.stage = "mask"
        tissue = tissue_of_spots(model)
        patches, scaled = inputs_of(model, tissue)
        latent, _, gene_shown, hidden = model._mask(patches, scaled, tissue)
        (gradient,) = torch.autograd.grad(latent.start.sum(), scaled)
        assert 0.3 < float(hidden.float().mean()) < 0.7
        assert gradient.masked_select(hidden).abs().max() == 0
        assert gradient[gene_shown].abs().max() > 0
        assert set(model.losses(make_batch(model))) == {"loss", "gene", "filled", "image"}

    def test_deviation_is_the_error_that_training_left(self, vocabulary, make_batch):
        model = make("storm-multibranch-small", vocabulary, standardise="zscore").train()
        model.stage = "mask"
        batch = make_batch(model, n=32)
        model.expression.fit(batch.counts)
        for _ in range(80):
            model.losses(batch)
        deviation = model.eval().predict(batch).deviation
        assert deviation.shape == (32, N_GENES)
        spread = batch.counts.std(dim=0)  # an untrained model predicts about the mean
        assert float((deviation[0] / spread).median()) == pytest.approx(1.0, abs=0.2)

    def test_deviation_from_slides_that_were_held_out(self, vocabulary, make_batch):
        from types import SimpleNamespace

        model = make("storm-multibranch-small", vocabulary).eval()
        batch = make_batch(model, n=12)
        slide = SimpleNamespace(
            has_gene=True,
            has_image=True,
            n_obs=12,
            measured_genes=np.arange(N_GENES) < 30,
            batch=lambda index: batch.take(torch.from_numpy(index)),
            expression=lambda index: batch.counts[torch.from_numpy(index)].numpy(),
        )
        model.calibrate([slide], held_out=True)
        assert torch.equal(model.residual, torch.ones(N_GENES))  # it has learned nothing yet
        model.learned.fill_(True)
        model.calibrate([slide], held_out=False)
        assert torch.equal(model.residual, torch.ones(N_GENES))
        model.calibrate([slide], held_out=True)
        with torch.no_grad():
            prediction = model.predict(batch)
        error = (batch.counts - prediction.mean).square().mean(dim=0).sqrt()
        torch.testing.assert_close(prediction.deviation[0, :30], error[:30])
        assert torch.equal(prediction.deviation[0, 30:], torch.ones(30))

    def test_genes_that_were_learned(self, vocabulary):
        from types import SimpleNamespace

        model = make("storm-multibranch-small", vocabulary)
        assert not model.written_genes().any()
        rng = np.random.default_rng(0)
        halves = np.arange(N_GENES) < 20, (np.arange(N_GENES) >= 10) & (np.arange(N_GENES) < 30)
        slides = [
            SimpleNamespace(
                has_gene=True, has_image=shown, n_obs=9, match=SimpleNamespace(mask=mask), measured_genes=mask,
                expression=lambda index: rng.random((len(index), N_GENES), dtype=np.float32),
                tiles=lambda index, level: rng.integers(0, 256, (len(index), 4, 4, 3), dtype=np.uint8),
            )
            for mask, shown in zip(halves, (False, True), strict=True)
        ]  # fmt: skip
        model.fit_inputs(slides)
        assert model.written_genes().nonzero()[0].tolist() == list(range(30))
        assert model.paired_genes().nonzero()[0].tolist() == list(range(10, 30))


class TestFineTuning:
    def test_low_rank_additions_to_queries_and_values(self, vocabulary, make_batch, tmp_path):
        full = make("storm-multibranch-small", vocabulary).eval()
        model = full.adapted("lora")
        batch = make_batch(model)
        with torch.no_grad():
            assert torch.equal(model.embed(batch).joint, full.embed(batch).joint)
        for part in (m for m in model.encoder.modules() if isinstance(m, Attention)):
            assert isinstance(part.q, LoRALinear)
            assert isinstance(part.v, LoRALinear)
            assert not isinstance(part.k, LoRALinear)
            assert part.q.lora_a.shape == (4, 32)
            assert part.q.scaling == 2.0
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in n or n.startswith(("gene_decoder.", "image_decoder.")) for n in trained)
        assert len([n for n in trained if "lora_" in n]) == 4 * 3
        model.train().losses(batch)["loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        model.eval().save(tmp_path / "low")
        again = load(tmp_path / "low")
        assert again.weights_sha256() == model.weights_sha256()
        with torch.no_grad():
            assert torch.equal(again.embed(batch).joint, model.embed(batch).joint)
            assert not torch.equal(model.embed(batch).joint, full.embed(batch).joint)
        with pytest.raises(InputError, match="low-rank additions already"):
            model.adapted("head")

    def test_decoders_alone(self, vocabulary, make_batch):
        model = make("storm-multibranch-small", vocabulary).adapted("head")
        assert set(model.losses(make_batch(model))) == {"loss", "gene", "image"}
        assert all(p.requires_grad == ("decoder" in n) for n, p in model.named_parameters())
        with pytest.raises(InputError, match="take stage='mask'"):
            model.stage = "align"


class TestPublishedLayout:
    @pytest.fixture
    def model(self, vocabulary):
        return make("storm-multibranch", vocabulary, legacy_reshape=True).eval()

    @pytest.fixture
    def state(self, model) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return {n: 0.05 * torch.randn(s, generator=generator) for n, s in expected_shapes(model).items()}

    def write(self, state, path):
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, path)
        return path

    def test_shapes(self, model):
        shapes = expected_shapes(model)
        assert shapes["encoder.patch_embed_rgb.proj.weight"] == (32, 3, 16, 16)
        assert shapes["encoder.patch_embed_expr.conv.weight"] == (8, N_GENES, 1, 1)
        assert shapes["encoder.patch_embed_expr.proj.weight"] == (32, 8, 4, 4)
        assert shapes["encoder.blocks.0.attn.qkv.weight"] == (96, 32)
        assert "encoder.blocks.1.mlp_expr.fc2.bias" in shapes
        assert "encoder.blocks.2.mlp.fc2.bias" in shapes
        n_fitted = 5 * N_GENES + 6
        assert (
            sum(int(np.prod(s)) for s in shapes.values())
            == sum(t.numel() for t in model.state_dict().values()) - n_fitted
        )

    @pytest.mark.parametrize("kind", ["safetensors", "torch"])
    def test_every_value_finds_its_place(self, kind: str, model, state, tmp_path):
        if kind == "safetensors":
            path = self.write(state, tmp_path / "squall.safetensors")
        else:
            path = tmp_path / "squall.pth"
            torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
        model.load_published(path)
        own = dict(model.named_parameters())
        q, k, v = state["encoder.blocks.1.attn.qkv.weight"].chunk(3)
        for letter, value in zip("qkv", (q, k, v), strict=True):
            assert torch.equal(own[f"encoder.blocks.1.block.attention.{letter}.weight"], value)
        assert torch.equal(own["encoder.blocks.1.block.experts.1.3.bias"], state["encoder.blocks.1.mlp_expr.fc2.bias"])
        assert torch.equal(own["gene_decoder.genes.bias"], state["decoder_expr.conv.bias"])
        assert torch.equal(own["image_decoder.out.weight"], state["decoder_rgb.head.weight"])

    def test_patches_are_those_of_the_convolutions(self, model, state, tmp_path):
        model.load_published(self.write(state, tmp_path / "squall.safetensors"))
        tissue = tissue_of_bins(model)
        place = model.position(model.centres)

        def conv(x: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = state[f"encoder.{name}.weight"], state[f"encoder.{name}.bias"]
            return torch.nn.functional.conv2d(x, weight, bias, stride=weight.shape[-1])

        with torch.no_grad():
            image = conv(tissue.tiles / 255, "patch_embed_rgb.proj").flatten(2).mT
            torch.testing.assert_close(model._image_tokens(model._patches(tissue.tiles)), image + place)
            bins = tissue.counts.unflatten(1, (16, 16)).permute(0, 3, 1, 2)
            gene = conv(conv(bins, "patch_embed_expr.conv"), "patch_embed_expr.proj").flatten(2).mT
            torch.testing.assert_close(model._gene_tokens(tissue.counts, tissue), gene + place, atol=1e-5, rtol=1e-4)

    def test_other_names_are_translated(self, model, state, tmp_path):
        other = {k.replace("patch_embed_rgb", "rgb_embed").replace("mlp_expr", "gene_mlp"): v for k, v in state.items()}
        path = self.write(other, tmp_path / "squall.safetensors")
        with pytest.raises(DataIntegrityError, match="not in the published layout.*translate them with names="):
            model.load_published(path)
        model.load_published(path, names={"rgb_embed": "patch_embed_rgb", r"\bgene_mlp\b": "mlp_expr"})
        with pytest.raises(InputError, match="no regular expression"):
            model.load_published(path, names={"(": "x"})

    def test_wrong_files_are_refused_in_words(self, model, state, vocabulary, tmp_path):
        before = model.weights_sha256()
        path = tmp_path / "squall.safetensors"
        some = {k: v for k, v in state.items() if "decoder_rgb" not in k} | {"classifier.weight": torch.zeros(2, 2)}
        with pytest.raises(DataIntegrityError, match=r"missing \(decoder_rgb.*; 1 unknown \(classifier.weight\)"):
            model.load_published(self.write(some, path))
        wide = state | {"encoder.norm.weight": torch.ones(64)}
        with pytest.raises(DataIntegrityError, match=r"1 tensors differ, encoder.norm.weight first \(\(64,\)"):
            model.load_published(self.write(wide, path))
        with pytest.raises(DataIntegrityError, match="hold.* nan or infinite"):
            model.load_published(self.write(state | {"encoder.norm.weight": torch.full((32,), torch.nan)}, path))
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataIntegrityError, match="not a readable safetensors"):
            model.load_published(path)
        with pytest.raises(MissingKeyError, match="no weights file"):
            model.load_published(tmp_path / "nowhere.pth")
        assert model.weights_sha256() == before

    def test_other_genes_and_other_modes(self, state, vocabulary, tmp_path):
        path = self.write(state, tmp_path / "squall.safetensors")
        fewer = make("storm-multibranch", Vocabulary(np.array(["A", "B"])), legacy_reshape=True)
        with pytest.raises(DataIntegrityError, match="reads 60 genes, the model's vocabulary has 2"):
            fewer.load_published(path)
        with pytest.raises(InputError, match="legacy_reshape=True"):
            make("storm-multibranch", vocabulary).load_published(path)
        with pytest.raises(InputError, match=r"model.adapted\('lora'\)"):
            make("storm-multibranch", vocabulary, legacy_reshape=True, mode="lora").load_published(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_px": 100}, "tile_px must be a multiple of patch_px, got 100 and 28"),
        ({"heads": 5}, "width must be a multiple of heads"),
        ({"specific": 9}, "specific must lie between 0 and depth"),
        ({"expression": "bins", "n_bins": 50}, "n_bins must be a multiple of the patches"),
        ({"decoder": "none"}, "decoder='none' is unknown"),
        ({"platform": "Slide-seq 9"}, "no platform 'slideseq9'"),
        ({"mask_ratio": 1.5}, "mask_ratio must"),
        ({"inter": False, "intra": False}, "inter and intra are both off"),
        ({"window": 0}, "window must"),
        ({"temperature": 0.0}, "temperature must"),
    ],
)
def test_configurations_that_cannot_be(changes, message, vocabulary):
    with pytest.raises((InputError, MissingKeyError), match=message):
        create("storm-multibranch-small", vocabulary, **changes)


def test_what_it_cannot_do_without(vocabulary, make_batch):
    with pytest.raises(InputError, match="needs a vocabulary"):
        create("storm-multibranch-small")
    model = make("storm-multibranch-small", vocabulary)
    batch = make_batch(model)
    with pytest.raises(InputError, match=r"tiles must be \(b, 3, 112, 112\)"):
        model.embed(replace(batch, spot_tiles=batch.spot_tiles[..., :56, :56]))


def test_every_option_is_explained():
    from dataclasses import fields
    from pathlib import Path

    from stfm.models import StormMultiBranchConfig

    page = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "storm_multibranch.md"
    if not page.exists():
        pytest.skip("the docs are not part of an installed package")
    text = page.read_text(encoding="utf-8")
    assert [f.name for f in fields(StormMultiBranchConfig) if f"`{f.name}`" not in text] == []
