"""The reference model: its network, its objective and its baselines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.benchmarking.cli import TrainingCLI
from examples.benchmarking.model import Sizes
from examples.benchmarking.rivals.misa import MISA
from examples.benchmarking.rivals.mult import MulT
from examples.decalign import layers
from examples.decalign.data import Batch
from examples.decalign.data.target import SENTIMENT, Target
from examples.decalign.model import Architecture, DecAlign
from examples.decalign.objective import (
    Contrastive,
    Decoupling,
    Losses,
    Moments,
    Objective,
    Prototypes,
    Switches,
)

CONFIGS = Path(__file__).parents[1] / "examples" / "decalign" / "configs"
CLASSES = Target(kind="class", categories=("a", "b", "c"))
SMALL = Sizes(width=8, length=4, heads=2, layers=1)
# Covariances that 24 samples carry.
LOSSES = Losses(
    decoupling=Decoupling(form="squared"),
    prototypes=Prototypes(covariance_type="diag", num_prototypes=3, cost_reduction="mean"),
)
CROSS = Architecture(context="cross")
SHAPES = {"text": (5, 6), "audio": (1, 3), "video": (9, 4), "touch": (2, 7)}
TERMS = {"task", "loss", "dec", "transport", "prototype", "hete", "sem", "mmd", "homo"}


@pytest.fixture(autouse=True)
def _as_in_use(defaults):
    # Single precision on the CPU, as for those who run the example.
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def make_batch(names=("text", "audio", "video"), count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(count, *SHAPES[name], generator=generator) for name in names}
    return Batch(features, {}, torch.randint(3, (count,), generator=generator))


def make_model(batch, *, sizes=SMALL, architecture=None, losses=LOSSES, switches=None, **options):
    modalities = {name: x.shape[-1] for name, x in batch.features.items()}
    parts = (architecture or Architecture(), losses, switches or Switches())
    return DecAlign(modalities, options.get("target", CLASSES), sizes, *parts)


def loss_terms(batch, **options):
    model = make_model(batch, **options)
    return model, model.objective(model(batch.features, batch.masks), batch.targets)


# --- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [tuple(SHAPES)[:2], tuple(SHAPES)[:3], tuple(SHAPES)])
@pytest.mark.parametrize("context", ["self", "cross"])
def test_shapes(names, context):
    batch = make_batch(names)
    sizes = Sizes(width=8, heads=2, layers=2)
    model = make_model(batch, sizes=sizes, architecture=Architecture(context=context))
    output = model(batch.features)
    assert output.logits.shape == (24, 3)
    for steps, pooled in [
        (output.unique_steps, output.unique),
        (output.common_steps, output.common),
    ]:
        assert [x.shape for x in steps] == [(24, 8, 8)] * len(names)
        assert [x.shape for x in pooled] == [(24, 8)] * len(names)
    assert [x.shape for x in output.latents] == [(24, 8)] * len(names)
    assert all(there.all() for there in output.present)


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match=r"modalities must name at least two; got \['text'\]"):
        DecAlign({"text": 4}, CLASSES)


def test_options_by_modality_must_name_the_modalities():
    with pytest.raises(ValueError, match=r"attention_dropout must name \['a', 'b'\]; got \['a'\]"):
        DecAlign({"a": 4, "b": 4}, CLASSES, Sizes(attention_dropout={"a": 0.1}))


@pytest.mark.parametrize("length", [1, 3, 4, 6, 8])
def test_time_axis_keeps_its_mean(length):
    # Parts of equal size: whatever T_s is, the average over time does not change.
    conv = layers.TemporalConv(3, 5, 4, kernel_size=3)
    x, mask = torch.randn(2, length, 3), torch.ones(2, length, dtype=torch.bool)
    steps, valid = conv(x, mask)
    assert steps.shape == (2, 4, 5)
    assert valid.all()
    torch.testing.assert_close(steps.mean(1), conv.conv(x.mT).mT.mean(1))


def test_padding_has_no_effect():
    torch.manual_seed(0)
    conv = layers.TemporalConv(3, 5, 4, kernel_size=3)
    x = torch.randn(2, 8, 3)
    mask = torch.arange(8) < torch.tensor([[8], [4]])
    clean, valid = conv(x, mask)
    dirty, _ = conv(torch.where(mask.unsqueeze(-1), x, torch.nan), mask)
    torch.testing.assert_close(clean, dirty)
    assert valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert (clean[1, 2:] == 0).all()


def test_distribution_encoder_samples_in_training_only():
    batch = make_batch()
    model = make_model(batch, sizes=replace(SMALL, **no_dropout()))
    first, second = (model(batch.features).latents[0] for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(batch.features).latents[0] for _ in range(2))
    assert torch.equal(first, second)

    point = layers.DistributionEncoder(8, stochastic=False)(torch.randn(4, 8))
    assert point.log_variance is None
    assert torch.equal(point.sample(), point.mean)


def test_distribution_has_the_variance_it_names():
    mean, log_variance = torch.full((50_000, 1), 2.0), torch.full((50_000, 1), -1.0)
    sample = layers.Distribution(mean, log_variance).sample()
    assert abs(sample.mean() - 2.0) < 0.01
    assert abs(sample.var() - np.exp(-1)) < 0.01


def no_dropout():
    return {
        f"{place}_dropout": 0.0
        for place in ("input", "attention", "relu", "embedding", "residual", "output")
    }


BRANCHES = [
    *(f"convs.{name}" for name in ("text", "audio", "video")),
    *(f"unique_encoders.{name}" for name in ("text", "audio", "video")),
    *(f"transformers.{name}" for name in ("text", "audio", "video")),
    "common_encoder",
    "head",
]


@pytest.mark.parametrize(("context", "head"), [("self", "common"), ("cross", "latent")])
def test_every_branch_learns_and_counts(context, head):
    batch = make_batch()
    architecture = Architecture(context=context, head=head)
    model, terms = loss_terms(
        batch, sizes=replace(SMALL, **no_dropout()), architecture=architecture
    )
    terms["loss"].backward()
    # A bias before a softmax over keys, which cannot matter, is the only exception.
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert "in_proj_bias" in name or parameter.grad.abs().sum() > 0, name

    model.eval()
    before = model(batch.features).logits
    for branch in [*BRANCHES, *(["pdes"] if head == "latent" else [])]:
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.get_submodule(branch).parameters():
                parameter.mul_(0.5)
        assert not torch.allclose(model(batch.features).logits, before, atol=1e-4), branch
        model.load_state_dict(kept)


def test_cross_context_reads_other_modalities():
    batch = make_batch()
    other = {**batch.features, "video": torch.randn_like(batch.features["video"])}
    for context, changes in [("self", False), ("cross", True)]:
        model = make_model(batch, architecture=Architecture(context=context)).eval()
        refined = []
        hook = model.transformers["text"].register_forward_hook(
            lambda module, args, output, kept=refined: kept.append(output)
        )
        model(batch.features)
        model(other)
        hook.remove()
        assert torch.equal(*refined) != changes


# --- missing modalities ------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["self", "cross"])
def test_missing_modality_leaks_nothing(context):
    batch = make_batch()
    missing = torch.arange(24) % 3 == 0
    masks = {"text": ~missing.unsqueeze(1).expand(24, 5)}
    results = []
    for value in (0.0, torch.nan, torch.inf):
        text = batch.features["text"].masked_fill(missing[:, None, None], value)
        changed = Batch({**batch.features, "text": text}, masks, batch.targets)
        torch.manual_seed(0)
        model, terms = loss_terms(changed, architecture=Architecture(context=context))
        terms["loss"].backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        results.append([terms["loss"].detach(), *gradients])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_modality_missing_everywhere_and_sample_without_any():
    batch = make_batch()
    masks = {name: torch.ones(24, x.shape[1]) > 0 for name, x in batch.features.items()}
    masks["text"] = torch.zeros(24, 5, dtype=torch.bool)
    for name in ("audio", "video"):
        masks[name][0] = False
    for context in ("self", "cross"):
        architecture = Architecture(context=context)
        model, terms = loss_terms(batch._replace(masks=masks), architecture=architecture)
        terms["loss"].backward()
        assert all(torch.isfinite(term) for term in terms.values())
        for parameter in model.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        output = model(batch.features, masks)
        assert not output.present[0].any()
        assert (output.unique[0] == 0).all()


# --- objective and switches --------------------------------------------------------------------


def test_objective_is_the_weighted_sum():
    losses = replace(LOSSES, alpha=0.3, beta=0.7)
    _, terms = loss_terms(make_batch(), losses=losses)
    assert set(terms) == TERMS
    total = terms["task"] + terms["dec"] + 0.3 * terms["hete"] + 0.7 * terms["homo"]
    torch.testing.assert_close(terms["loss"], total)
    torch.testing.assert_close(terms["hete"], terms["transport"] + terms["prototype"])
    torch.testing.assert_close(terms["homo"], terms["sem"] + terms["mmd"])


@pytest.mark.parametrize(
    ("switch", "terms", "called", "parts"),
    [
        ("mfd", {"dec"}, "CosineDecouplingLoss.forward", ["common_encoder"]),
        ("hete", {"transport", "prototype", "hete"}, "PrototypeAlignmentLoss.solve", []),
        (
            "homo",
            {"sem", "mmd", "homo"},
            "GaussianMomentLoss.forward MMDLoss.forward",
            ["pdes"],
        ),
        ("sem", {"sem"}, "GaussianMomentLoss.forward", []),
        ("mmd", {"mmd"}, "MMDLoss.forward", ["pdes"]),
    ],
)
def test_switch_removes_the_computation(switch, terms, called, parts, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("computed")

    for name in called.split():
        owner, method = name.split(".")
        monkeypatch.setattr(f"multialign.{owner}.{method}", refuse)
    model, left = loss_terms(make_batch(), switches=Switches(**{switch: False}))
    assert set(left) == TERMS - terms
    for part in parts:
        assert getattr(model, part) is None
    with pytest.raises(AssertionError, match="computed"):
        loss_terms(make_batch())


def test_without_decoupling_both_branches_read_the_same_features():
    batch = make_batch()
    output = make_model(batch, switches=Switches(mfd=False))(batch.features)
    assert all(a is b for a, b in zip(output.unique_steps, output.common_steps, strict=True))


def test_proto_ot_leaves_the_second_term():
    torch.manual_seed(0)
    _, terms = loss_terms(make_batch(), switches=Switches(proto_ot=False))
    torch.testing.assert_close(terms["hete"], terms["prototype"])


# --- contrastive training ----------------------------------------------------------------------


def contrastive_reference(features, labels, temperature):
    """Khosla et al. (2020), Eq. 2, by loops."""
    z = torch.nn.functional.normalize(features.double(), dim=1)
    total, anchors = 0.0, 0
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        if positives:
            others = torch.stack([z[i] @ z[a] for a in range(len(z)) if a != i]) / temperature
            hits = [z[i] @ z[p] / temperature - others.logsumexp(0) for p in positives]
            total, anchors = total - sum(hits) / len(hits), anchors + 1
    return total / anchors


def test_contrastive_term_is_supervised_contrast_of_all_modalities():
    batch = make_batch(count=9)
    masks = {"text": (torch.arange(9) > 2).unsqueeze(1).expand(9, 5)}
    model, switches = make_model(batch), Switches(ct=True)
    output = model(batch.features, masks)
    terms = Objective(CLASSES, replace(LOSSES, gamma=0.2), switches)(output, batch.targets)
    there = torch.stack(output.present)
    features = torch.stack(output.common)[there]
    labels = batch.targets.expand_as(there)[there]
    assert len(features) == 24
    expected = contrastive_reference(features, labels, 0.1)
    torch.testing.assert_close(terms["ct"].double(), expected, rtol=1e-4, atol=1e-5)
    rest = terms["task"] + terms["dec"] + 0.05 * (terms["hete"] + terms["homo"])
    torch.testing.assert_close(terms["loss"], rest + 0.2 * terms["ct"])


def test_contrastive_training_of_a_score_contrasts_its_categories():
    batch = make_batch(count=8)
    scores = torch.tensor([-3.0, -2.9, -0.2, 0.1, 0.4, 1.9, 2.2, 2.8])
    model = make_model(batch, target=SENTIMENT)
    output = model(batch.features)
    terms = Objective(SENTIMENT, LOSSES, Switches(ct=True))(output, scores)
    labels = torch.tensor([0, 0, 3, 3, 3, 5, 5, 6]).repeat(3)
    expected = contrastive_reference(torch.cat(output.common), labels, 0.1)
    torch.testing.assert_close(terms["ct"].double(), expected, rtol=1e-4, atol=1e-5)


def test_contrastive_training_of_what_the_head_reads():
    batch = make_batch(count=9)
    losses = replace(LOSSES, contrastive=Contrastive(of="fused", temperature=0.07))
    model, _ = loss_terms(batch, losses=losses)
    output = model(batch.features)
    terms = Objective(CLASSES, losses, Switches(ct=True))(output, batch.targets)
    expected = contrastive_reference(output.fused, batch.targets, 0.07)
    torch.testing.assert_close(terms["ct"].double(), expected, rtol=1e-4, atol=1e-5)


# --- the paper and the released code -----------------------------------------------------------


def test_the_head_reads_common_features_unless_told_otherwise():
    batch = make_batch()
    for head in ("common", "latent"):
        model = make_model(batch, architecture=Architecture(head=head)).eval()
        output = model(batch.features)
        read = output.common if head == "common" else output.latents
        torch.testing.assert_close(output.fused[:, 24:], torch.cat(read, 1))


def test_moments_and_decoupling_of_the_released_code():
    batch = make_batch()
    output = make_model(batch).eval()(batch.features)
    both = [
        replace(
            LOSSES,
            moments=Moments(of=of),
            decoupling=Decoupling(form="squared", modalities=modalities),
        )
        for of, modalities in (("common", "sum"), ("latent", "mean"))
    ]
    one, two = (Objective(CLASSES, losses)(output, batch.targets) for losses in both)
    torch.testing.assert_close(one["dec"], 3 * two["dec"])
    moments = Objective(CLASSES, LOSSES).moments
    torch.testing.assert_close(one["sem"], moments(output.common, output.present))
    torch.testing.assert_close(two["sem"], moments(output.latents, output.present))


def test_each_modality_may_have_a_distribution_encoder_of_its_own():
    batch = make_batch()
    assert len(make_model(batch).pdes) == 1
    model = make_model(batch, architecture=Architecture(shared_pde=False, pde="mlp")).eval()
    output = model(batch.features)
    for pde, x, latent in zip(model.pdes, output.common, output.latents, strict=True):
        torch.testing.assert_close(latent, pde(x).mean)


@pytest.mark.parametrize("copies", [None, 2])
def test_a_causal_transformer_does_not_see_later_steps(copies):
    transformer = layers.ModalityTransformer(8, 4, SMALL, causal=True).eval()
    x, mask = torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    mask[2, :1] = False  # no step before the first query
    context = torch.randn(3, 8, 8) if copies else None
    keys = mask.repeat(1, 2) if copies else None

    def changed(step):
        other, others = x.clone(), None if context is None else context.clone()
        other[:, step:] *= -1
        if others is not None:
            others[:, step:4] *= -1
            others[:, 4 + step :] *= -1
        return transformer(other, mask, others, keys)

    whole = transformer(x, mask, context, keys)
    assert torch.isfinite(whole).all()
    for step in range(1, 4):
        torch.testing.assert_close(changed(step)[:2, :step], whole[:2, :step])
        assert not torch.allclose(changed(step)[:2, step], whole[:2, step])


# --- configurations ----------------------------------------------------------------------------


def merge(*files, args=()):
    """Return the options of the network and the whole configuration."""
    config = TrainingCLI(
        [*(f"--config={CONFIGS / f}.yaml" for f in files), *args], run=False
    ).config
    network = config["model"]["network"]
    assert network["class_path"] == "examples.decalign.model.DecAlign"
    return network["init_args"].as_dict(), config.as_dict()


@pytest.fixture
def files(tmp_path):
    """Return arguments that name a file where the data need one."""
    return {name: [f"--data.path={tmp_path / name}"] for name in (*TABLE_4, *RELEASED)}


@pytest.fixture(autouse=True)
def _without_data(monkeypatch):
    # A configuration is read without its data.
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)


TABLE_4 = {
    # attention (audio, vision, text), relu, embedding, residual, output, text, width, heads,
    # rate, clipping, encoder
    "mosi": (0.3, 0.1, 0.4, 0.1, 0.3, 0.1, 0.6, 0.5, 32, 8, 5e-5, 0.5, "bert-base-uncased"),
    "mosei": (0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 64, 8, 1e-4, 0.6, "bert-base-uncased"),
    "iemocap": (0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 48, 4, 1e-4, 0.6, None),
    "sims": (0.3, 0.1, 0.4, 0.1, 0.3, 0.1, 0.6, 0.5, 32, 8, 5e-5, 0.5, "bert-base-chinese"),
}
RELEASED = {
    # attention (audio, vision, text), relu, embedding, residual, output, text, width, heads,
    # rate, clipping, layers, kernel, alpha, beta, gamma, temperature, epochs, batch, BERT's rate
    "mosi": (
        *(0.0, 0.0, 0.1, 0.1, 0.1, 0.05, 0.0, 0.0, 64, 8),
        6e-5,
        0.6,
        5,
        1,
        0.05,
        0.07,
        0.003,
        0.1,
        18,
        32,
        None,
    ),
    "mosei": (*[0.125] * 8, 64, 8, 5e-5, 0.6, 4, 5, 0.005, 0.0, 0.001, 0.1, 16, 128, 1e-5),
    "sims": (
        0.3,
        0.1,
        0.4,
        0.1,
        0.3,
        0.1,
        0.35,
        0.25,
        32,
        8,
        3.5e-5,
        0.5,
        4,
        5,
        0.0175,
        0.0525,
        0.01,
        0.07,
        55,
        24,
        7.5e-6,
    ),
    "iemocap": (*[0.2] * 8, 48, 4, 1e-4, 0.6, 4, 1, 0.05, 0.05, 0.0, 0.1, 50, 32, None),
}


def sizes_of(network, config):
    sizes = network["sizes"]
    attention = sizes["attention_dropout"]
    if isinstance(attention, float):
        attention = dict.fromkeys(("audio", "vision", "text"), attention)
    return (
        *(attention[modality] for modality in ("audio", "vision", "text")),
        *(sizes[f"{place}_dropout"] for place in ("relu", "embedding", "residual", "output")),
        sizes["input_dropout"]["text"],
        sizes["width"],
        sizes["heads"],
        config["model"]["learning_rate"],
        config["trainer"]["gradient_clip_val"],
    )


@pytest.mark.parametrize("name", TABLE_4)
def test_configuration_is_table_4(name, files):
    network, config = merge(name, args=files[name])
    model = config["model"]
    text = (model["text"] or {}).get("name")
    assert (*sizes_of(network, config), text) == TABLE_4[name]
    assert (network["sizes"]["kernel_size"], network["sizes"]["layers"]) == (5, 4)
    assert config["data"]["init_args"]["batch_size"] == 32
    assert (model["weight_decay"], model["patience"]) == (0.005, 5)
    assert (config["trainer"]["max_epochs"], model["schedule"]) == (50, "plateau")
    # The losses are the defaults, and these the paper's: `paper.yaml` changes nothing.
    assert merge(name, "paper", args=files[name])[0] == network


@pytest.mark.parametrize("name", RELEASED)
def test_configuration_is_that_of_the_released_code(name, files):
    network, config = merge(name, "released", f"released_{name}", args=files[name])
    losses, sizes = network["losses"], network["sizes"]
    found = (
        *sizes_of(network, config),
        *(sizes["layers"], sizes["kernel_size"]),
        *(losses["alpha"], losses["beta"], losses["gamma"]),
        losses["contrastive"]["temperature"],
        config["trainer"]["max_epochs"],
        config["data"]["init_args"]["batch_size"],
        (config["model"]["text"] or {}).get("learning_rate"),
    )
    assert found == RELEASED[name]
    assert network["architecture"] == {
        **{"context": "cross", "causal": True, "encoder": "linear", "conv_bias": False},
        **{"pde": "mlp", "shared_pde": False, "head": "common"},
    }
    assert losses["score"] == "mse"
    assert losses["decoupling"] == {"form": "squared", "modalities": "mean"}
    assert losses["prototypes"] == {
        **{"num_prototypes": 6 if name == "iemocap" else 7, "covariance_type": "diag"},
        **{"em_iterations": 5, "regularization": 1e-4, "epsilon": 0.1},
        **{"objective": "regularized", "matching": "index", "cost_reduction": "mean"},
        **{"differentiate": "unroll", "momentum": None},
    }
    assert losses["moments"] == {"feature_reduction": "mean", "of": "latent"}
    assert losses["mmd"] == {"bandwidth": 1.0, "estimator": "biased"}
    assert losses["contrastive"]["of"] == "fused"
    assert network["switches"]["ct"] == (losses["gamma"] > 0)
    assert network["switches"]["homo"] == (losses["beta"] > 0)


def test_a_later_file_or_argument_changes_its_own_keys_alone():
    one, _ = merge("digits")
    args = ["--model.network.losses.prototypes.epsilon=0.2"]
    six, config = merge("digits", "digits_six", args=args)
    assert len(config["data"]["init_args"]["views"]) == 6
    prototypes = {**one["losses"]["prototypes"], "num_prototypes": 4, "epsilon": 0.2}
    assert six == {**one, "losses": {**one["losses"], "prototypes": prototypes}}
    assert prototypes["differentiate"] == "last"
    assert prototypes["covariance_type"] == "diag"


def test_another_model_keeps_the_sizes():
    args = [f"--config={CONFIGS / 'digits.yaml'}", "--model.network=MulT"]
    network = TrainingCLI(args, run=False).config["model"]["network"]
    assert network["class_path"].endswith("MulT")
    assert network["init_args"]["sizes"]["input_dropout"] == 0.2
    assert "losses" not in network["init_args"]


@pytest.mark.parametrize("names", [("digits", "paper"), ("digits",), ("digits", "released")])
def test_configuration_trains(names, monkeypatch):
    monkeypatch.undo()
    cli = TrainingCLI([f"--config={CONFIGS / name}.yaml" for name in names], run=False)
    batch = next(iter(cli.datamodule.train_dataloader()))
    network = cli.model.network
    network.objective(network(batch.features, batch.masks), batch.targets)["loss"].backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# --- rivals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [MulT, MISA])
@pytest.mark.parametrize("names", [("text", "audio"), tuple(SHAPES)])
def test_baseline_learns_from_every_modality(baseline, names):
    batch = make_batch(names)
    modalities = {name: x.shape[-1] for name, x in batch.features.items()}
    model = baseline(modalities, CLASSES, replace(SMALL, **no_dropout()))
    output = model(batch.features)
    assert output.logits.shape == (24, 3)
    model.objective(output, batch.targets)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert "in_proj_bias" in name or parameter.grad.abs().sum() > 0, name
    for name in names:
        other = {**batch.features, name: torch.randn_like(batch.features[name])}
        assert not torch.allclose(model(other).logits, output.logits, atol=1e-4)


@pytest.mark.parametrize("baseline", [MulT, MISA])
def test_baseline_does_not_see_what_is_missing(baseline):
    batch = make_batch()
    modalities = {name: x.shape[-1] for name, x in batch.features.items()}
    model = baseline(modalities, CLASSES, SMALL).eval()
    masks = {"text": (torch.arange(24) % 3 > 0).unsqueeze(1).expand(24, 5)}
    results = []
    for value in (0.0, torch.nan):
        text = batch.features["text"].masked_fill(~masks["text"].unsqueeze(-1), value)
        model.zero_grad()
        output = model({**batch.features, "text": text}, masks)
        model.objective(output, batch.targets)["loss"].backward()
        results.append([output.logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for first, second in zip(*results):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert torch.isfinite(first).all()


def test_misa_terms_by_hand():
    batch = make_batch(("text", "audio"), count=6)
    modalities = {name: x.shape[-1] for name, x in batch.features.items()}
    model = MISA(modalities, CLASSES, SMALL).eval()
    output = model(batch.features)
    terms = model.objective(output, batch.targets)

    def cosines(x, y):
        return torch.nn.functional.cosine_similarity(x, y).square().mean()

    (u, v), (c, d) = output.unique, output.common
    torch.testing.assert_close(terms["difference"], cosines(u, c) + cosines(v, d) + cosines(u, v))
    error = [(x - y).square().mean() for x, y in zip(output.pooled, output.rebuilt)]
    torch.testing.assert_close(terms["reconstruction"], sum(error) / 2)
    total = terms["task"] + terms["similarity"] + 0.3 * terms["difference"]
    torch.testing.assert_close(terms["loss"], total + terms["reconstruction"])
