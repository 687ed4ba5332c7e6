"""Everything heavy follows its inputs to another device, and comes to the CPU's results there, to the bit; see second_device.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device_cases import CLASSES, assert_same, images, labels, network, there, thief
from second_device import SECOND

from meadef_lightning import detection, removal
from meadef_lightning.detection.base import ModelDetector
from meadef_lightning.extraction import active, bandit, composite, datafree, dfme, jacobian, maze, student
from meadef_lightning.extraction.encoder_student import feature_distance
from meadef_lightning.removal import transforms
from meadef_lightning.watermark import MGDA, AutoencoderBlend, Fixed, LastLayerMGDA, WatermarkKey, WatermarkObjective
from meadef_lightning.watermark.feature_objective import FeatureObjective

torch.set_num_threads(1)


# ---- the device itself


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.stack([x.sum(), y.sum()]),
        lambda x, y: y[torch.zeros(2, dtype=torch.int64, device=x.device)],
        lambda x, y: x.index_put((torch.arange(len(x)),), y),
        lambda x, y: F.linear(x.flatten(1), y.flatten(1)),
        lambda x, y: x.numpy(),
        lambda x, y: torch.rand(3, generator=torch.Generator(), device=x.device),
        lambda x, y: torch.random.fork_rng().__enter__(),
    ],
)
def test_the_second_device_refuses_what_a_gpu_does(mixing, second):
    with pytest.raises((RuntimeError, AssertionError), match=r"same device|generator|numpy|every GPU"):
        mixing(there(images()), images())


# ---- functions

ROWS = torch.tensor([3, 1, 0, 2] * 8)
PROBABILITIES = images().flatten(1)[:, :CLASSES].softmax(1)
LOGITS = images(seed=2).flatten(1)[:, :CLASSES]
FUNCTIONS = {
    "attention": (removal.nad.attention_distance, images(), images(seed=1)),
    "balance": (removal.balanced_distillation.balance, PROBABILITIES, labels()),
    "noise": (transforms.add_gaussian_noise, images().sigmoid(), 0.1, 3),
    "jpeg": (transforms.jpeg, images().sigmoid(), 50),
    "smooth": (transforms.smooth, images().sigmoid(), 1),
    "bits": (transforms.reduce_bits, images().sigmoid(), 3),
    "project": (removal.ibau.project, images(), 0.5),
    "leans": (detection.answer_lean.leans, PROBABILITIES, labels()),
    "spectral": (detection.spectral.spectral_scores, images().flatten(1)),
    "superimpose": (detection.strip.superimpose, images(4), images(5), 1.0, thief().low, thief().high),
    "entropy of mixes": (detection.strip.mean_entropy, images(12).view(3, 4, -1)),
    "excess": (detection.mixture_scan.excess, torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))),
    "entropy": (active.entropy, PROBABILITIES),
    "k-center": (active.greedy_k_center, PROBABILITIES, PROBABILITIES[:5], 6),
    "deepfool": (active.deepfool_distance, network(), images(6)),
    "jacobian": (jacobian.jacobian_augmentation, network(), images(), labels(), 0.1, thief().low, thief().high),
    "targeted": (jacobian.targeted_random_steps, network(), images(), labels(), 0.1, 2, 0.15, thief().low, thief().high),
    "bandit": (bandit.bandit_update, torch.rand(4), torch.arange(4), ROWS[:9], torch.rand(9), 0.1),
    "class policy": (bandit.class_policy, torch.rand(4), torch.tensor([True, False, True, True])),
    "composites": (composite.composite_batch, images(), images(seed=1), torch.rand(32)),
    "differences": (datafree.forward_differences, LOGITS[:4, 0].expand(3, 4), images(8).view(2, 4, 1, 8, 8), 0.1),
    "recovered logits": (dfme.recovered_logits, PROBABILITIES.masked_fill(PROBABILITIES < 0.1, 0)),
    "divergence": (maze.divergence, LOGITS, PROBABILITIES),
    "distillation": (student.distillation_loss, LOGITS, PROBABILITIES, 2.0),
    "hard distillation": (student.distillation_loss, LOGITS, labels()),
    "features": (feature_distance, LOGITS, PROBABILITIES),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_answers_where_it_is_asked(name, second):
    function, *arguments = FUNCTIONS[name]
    assert_same(function(*map(there, arguments)), function(*arguments), SECOND)


# ---- watermark


@pytest.mark.parametrize("spec", [*WatermarkKey.draw(CLASSES, "a secret").space], ids=lambda spec: spec.class_path)
def test_a_combiner_combines_where_its_samples_are(spec, second):
    pair = images(), images(seed=1)
    assert_same(spec.build()(*there(pair)), spec.build()(*pair), SECOND)


def test_the_autoencoder_is_trained_and_blends_where_it_is_put(second, tmp_path):
    pair, blended = (images(), images(seed=1)), []
    for place in (lambda value: value, there):
        blend = place(AutoencoderBlend(1, width=4))
        blend.fit(place(images()), tmp_path / "weights.pt", steps=3, batch_size=8)
        blended.append(blend(*place(pair)))
    assert_same(blended[1], blended[0], SECOND)


@pytest.mark.parametrize(
    ("kind", "balancing"),
    [(WatermarkObjective, Fixed(1, 1, 1)), (WatermarkObjective, MGDA()), (WatermarkObjective, LastLayerMGDA()), (FeatureObjective, MGDA())],
)  # fmt: skip
def test_an_objective_works_where_the_batches_are(kind, balancing, second):
    key, totals = WatermarkKey.draw(CLASSES, "a secret"), []
    for place in (lambda value: value, there):
        model = place(network()).train()
        objective = kind(
            key, samples=4, balancing=balancing, tilt=0.5, **({"per_class": 2} if kind is FeatureObjective else {})
        )
        for step in range(2):
            x, y = place(images(seed=step)), place(labels())
            objective.observe(x, y)
            objective.refresh(model, model)
            objective.draw()
            terms = objective.terms(model, model)
            total = objective.total(model, F.cross_entropy(model(x), y), terms)
            (gradient,) = torch.autograd.grad(total, [model[0].weight])
        objective.load_state_dict(objective.state_dict())  # everything on the CPU, as in a checkpoint
        objective.observe(x, y)
        objective.draw()
        totals.append([total, gradient, terms, objective.terms(model, model)])
    assert_same(totals[1], totals[0], SECOND)


# ---- searches

SEARCHES = [
    detection.NeuralCleanse(steps=11, batch_size=4),
    detection.ABS(steps=3, levels=2, batch_size=2, candidates=1),
    detection.MixtureScan(samples=2),
    detection.AnswerLean(),
    detection.STRIP(overlays=4),
    detection.SpectralSignatures(),
    detection.ActivationClustering(),
    detection.LocalOutlierFactor(neighbors=5),
    detection.UAPConsistency(steps=2, images=4),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: type(search).__name__)
def test_a_search_finds_the_same(search, second):
    def found(model, data, queries):
        if isinstance(search, ModelDetector):
            finding = search.inspect(model, data)
            return [finding.score, finding.classes, finding.flagged, finding.pictures]
        search.fit(model, data)
        return [search.score(queries), search.threshold]

    here, moved = found(network(), thief(), images(10, seed=3)), there(network())
    second.convolutions["cpu"] = 0
    assert_same(found(moved, thief(), images(10, seed=3)), here, torch.device("cpu"))
    assert_same(found(moved, there(thief()), there(images(10, seed=3))), here, torch.device("cpu"))
    assert second.convolutions["cpu"] == 0


# ---- removals


def preprocessing(kind, strength):
    return removal.InputPreprocessing(kind, [strength])


REMOVALS = {
    **{mode: removal.FineTuning(mode, epochs=2) for mode in ("FTAL", "RTLL")},
    "adversarial": removal.AdversarialFineTuning(epochs=1),
    "distil again": removal.DistilAgain(epochs=1),
    "balanced": removal.BalancedDistillation(epochs=1),
    "pruning": removal.MagnitudePruning([0.5]),
    "global pruning": removal.MagnitudePruning([0.5], "global"),
    "fine-pruning": removal.FinePruning([0.5], epochs=1),
    "quantisation": removal.Quantisation(("fp16", "int4")),
    "weight noise": removal.WeightNoise([0.1]),
    "noise": preprocessing(transforms.GaussianNoise, 0.1),
    "NAD": removal.NAD(1, 1),
    "I-BAU": removal.IBAU(rounds=1, ascent=2, iterations=1, inner_size=8),
    "WRK": removal.WRK(batches=1, boundary_epochs=1, epochs=1),
    "GAN": removal.GANUnlearning(epochs=1, steps=2, images=2),
    "overwriting": removal.Overwriting(epochs=1, samples=4),
}


@pytest.mark.parametrize("name", REMOVALS)
def test_a_removal_scrubs_where_the_model_is(name, second):
    def path(model, data):
        seen = []

        def observe(strength, scrubbed):
            assert not any(part.training for part in scrubbed.modules())
            seen.append([strength, {**scrubbed.state_dict()}, scrubbed(data.x.to(next(scrubbed.parameters()).device))])
            return True

        REMOVALS[name].scrub(model, data, observe, seed=1)
        return seen

    here, moved = path(network(), thief()), there(network())
    second.convolutions["cpu"] = 0
    found = path(moved, thief())
    assert second.convolutions["cpu"] == 0
    assert_same([[strength, answers] for strength, _, answers in found], [[s, a] for s, _, a in here], SECOND)
    for (_, weights, _), (_, expected, _) in zip(found, here, strict=True):
        assert_same(weights, expected)
