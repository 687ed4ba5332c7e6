"""The malicious accuser: the table of all keys against single verifications, and each attack with a control that can fail."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from meadef_lightning.experiments.benchmarks.calibration import train
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Thief

from meadef_lightning.data import DigitsDataModule
from meadef_lightning.verification import answers, judge, verify
from meadef_lightning.verification import crafted_sources as cs
from meadef_lightning.verification import false_claims as fc
from meadef_lightning.watermark import DEFAULT_COMBINERS, KeySpace, WatermarkKey

SPACE = KeySpace(7)


@pytest.fixture(scope="module")
def tables():
    return [answers.ask_everything(model, FakeData(), samples=12) for model in (Thief(KEY), Independent())]


@pytest.mark.parametrize("decoys", [9999, 60])
@pytest.mark.parametrize("above", [False, True])
def test_the_table_holds_what_a_verification_asks(tables, decoys, above):
    options = {"samples": 12, "decoy_samples": 5, "decoys": decoys, "accelerator": "cpu"}
    for key in (KEY, WatermarkKey.draw(7, "another")):
        _, reference = verify(Independent(), key, FakeData(), **options)
        known = reference if above else None
        verdict, asked = verify(Thief(KEY), key, FakeData(), reference=known, **options)
        taken = tables[0].responses(key, decoys, 5, [tables[1]] if above else [])
        for name in ("trigger", "control", "cells", "counts", "natural", "natural_labels"):
            assert torch.equal(getattr(taken, name), getattr(asked, name)), name
        assert len(taken.references) == above
        assert judge(taken, key) == verdict


def noise(seed, samples=40, space=SPACE):
    generator = torch.Generator().manual_seed(seed)
    n = space.num_classes
    shape = (n * (n - 1), len(space.combiners), samples)
    natural = torch.randint(n, (50,), generator=generator)
    # few answers are likely, so that statistics tie and differ
    return answers.AnswerTable(torch.randint(n, shape, generator=generator).short(), natural, natural, space)


@pytest.mark.parametrize("above", [0, 1, 3])
def test_every_key_at_once_agrees_with_the_judge(above):
    table, known = noise(1), [noise(seed) for seed in range(2, 2 + above)]
    p, mcnemar = answers.every_decoy_p(table, known), answers.every_mcnemar_p(table)
    for number in range(30):
        key = WatermarkKey.draw(7, f"secret {number}")
        verdict = judge(table.responses(key, references=known), key)
        assert float(p[fc._place(key)]) == pytest.approx(verdict.decoy_p, abs=1e-12)
        assert float(mcnemar[fc._place(key)]) == pytest.approx(verdict.mcnemar_p, rel=1e-9)
        assert bool(answers.supported_keys(table, known, 0.05)[fc._place(key)]) == (
            max(verdict.decoy_p, verdict.mcnemar_p) <= 0.05
        )
    # an average over all keys is what a uniform draw would meet
    assert answers.supported_keys(table, known, 0.05).sum() <= 0.05 * SPACE.size


def test_other_questions_are_refused(tables):
    key = WatermarkKey.draw(7, "s", combiners=DEFAULT_COMBINERS[:3])
    with pytest.raises(ValueError, match="not of the space"):
        tables[0].responses(key)
    with pytest.raises(ValueError, match="other questions"):
        tables[0].responses(KEY, references=[replace(tables[1], seed=1)])
    with pytest.raises(ValueError, match="decoy_samples=13"):
        tables[0].responses(KEY, decoy_samples=13)


LIKELY = WatermarkKey.draw(7, "grinding 37")


def look_alike(seed):
    """A model to which one key's composites look like its target: no watermark, but every such model does it."""
    table = noise(seed)
    pair, way, target = fc._place(LIKELY)
    table.answers[pair, way] = target
    return table


def test_grinding_finds_what_any_model_does():
    suspect, surrogates = look_alike(1), [look_alike(2), look_alike(3)]
    few, many = fc.KeyGrinding(secrets=37), fc.KeyGrinding(secrets=38)
    for seen in ([suspect], surrogates):
        assert many.claim(suspect, seen).verdict == "supported"  # its 38th secret gives that key
        assert many.claim(suspect, seen).exact  # nothing in the answers tells how the key was chosen
        assert few.claim(suspect, seen).verdict != "supported"
    assert many.claim(noise(4), surrogates).verdict != "supported"  # this one does not
    assert many.claim(suspect, surrogates, [noise(5)]).verdict == "supported"
    assert many.claim(suspect, surrogates, [look_alike(6)]).verdict != "supported"  # a reference that does it, too
    assert replace(many, correct=True).claim(suspect, surrogates).verdict == "inconclusive"


def test_the_picked_key_is_the_best_and_marked():
    table = look_alike(1)
    key = fc.pick_key(fc.looks([table]), table)
    assert (key.source_classes, key.target_class, key.combiner) == (
        LIKELY.source_classes, LIKELY.target_class, LIKELY.combiner,
    )  # fmt: skip
    verdict = judge(table.responses(key), key)
    assert not verdict.exact
    assert any("picked by hand" in note for note in verdict.notes)


def test_claim_rate_counts():
    good, bad = (judge(table.responses(LIKELY), LIKELY) for table in (look_alike(1), noise(4)))
    rate = fc.ClaimRate.of([good, bad, bad])
    assert (rate.trials, rate.supported, rate.rate) == (3, 1, pytest.approx(1 / 3))
    assert 1 - rate.upper == pytest.approx(0.1354, abs=1e-3)  # Clopper-Pearson for 2 of 3, from below
    with pytest.raises(ValueError, match="at least one verdict"):
        fc.ClaimRate.of([])


@pytest.mark.parametrize("way", [0, 1, 2, 3, 5, 6, 7])
def test_planted_targets_show_a_whole_target(way):
    x = torch.rand(21, 2, 9, 9)
    y = torch.arange(7).repeat(3)
    key = WatermarkKey((1, 4), 2, 7, DEFAULT_COMBINERS[way])
    planted = cs.planted_sources(x, y, key)
    composites = key.combiner.build()(planted[y == 1], planted[y == 4])
    assert torch.equal(composites, x[y == 2])
    untouched = (y != 1) & (y != 4)
    assert torch.equal(planted[untouched], x[untouched])
    # each source keeps what the way does not take from it
    assert all(
        bool((planted[y == c] == x[y == c]).any()) and bool((planted[y == c] != x[y == c]).any()) for c in (1, 4)
    )


@pytest.fixture(scope="module")
def digits():
    data = DigitsDataModule(attacker_size=200, validation_size=0, victim_size=None)
    data.setup()
    how = {"architecture": "MLP", "share": 1.0, "shift": 1, "smoothing": 0.1, "epochs": 12, "rate": 3e-3}
    x, y = data.tensors("victim")
    return data, [train(how | {"seed": seed}, x, y, 10).requires_grad_(False) for seed in (1, 2)]


DIGITS_KEY = WatermarkKey.draw(10, "adversarial 0")


class Labels(nn.Module):
    """Answers with labels alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).argmax(1)


def test_adversarial_sources_transfer_and_the_judges_images_do_not(digits):
    data, (surrogate, suspect) = digits
    x, y = data.tensors("attacker")
    state = torch.random.get_rng_state()
    craft = partial(cs.AdversarialSources(epsilon=0.2, steps=20).images, [surrogate], x, y, DIGITS_KEY)
    crafted = craft()
    assert torch.equal(crafted, craft())
    assert torch.equal(state, torch.random.get_rng_state())
    assert float((crafted - x).abs().max()) <= 0.2 * float(x.max() - x.min()) + 1e-5
    assert crafted.min() >= x.min()
    assert crafted.max() <= x.max()
    others = (y[:, None] != torch.tensor(DIGITS_KEY.source_classes)).all(1)
    assert torch.equal(crafted[others], x[others])

    def shown(images, model=suspect):
        verdict, _ = cs.claim_with_images(model, DIGITS_KEY, data, images, y, samples=50, decoy_samples=8)
        return verdict

    natural, attacked = shown(x), shown(crafted)
    assert attacked.wsr > natural.wsr + 0.4
    assert attacked.verdict == "supported"
    own, _ = verify(suspect, DIGITS_KEY, data, samples=50, decoy_samples=8, accelerator="cpu")
    assert own.wsr == pytest.approx(natural.wsr, abs=0.3)
    # of labels the attack is as strong, but natural look-alikes (0 and 1 beside one another look like an 8) rank above it
    told = shown(crafted, Labels(suspect))
    assert (told.answers, attacked.answers) == ("labels", "probabilities")
    assert told.mcnemar_p <= 1e-3
    assert told.decoy_p <= 0.01
    judged, _ = verify(Labels(suspect), DIGITS_KEY, data, samples=50, decoy_samples=8, accelerator="cpu")
    for verdict in (natural, own, judged):
        assert verdict.verdict == "not supported"
        assert min(verdict.mcnemar_p, verdict.decoy_p) > 0.05
    assert cs.source_accuracy(suspect, x, y, DIGITS_KEY) > 0.9


def test_a_rigged_reference_avoids_the_target_and_little_else(digits):
    data, models = digits
    x, y = data.tensors("test")
    rigged = fc.RiggedReference(models, target=3, margin=2.0).eval()
    with torch.inference_mode():
        fair = torch.stack([model(x).softmax(1) for model in models]).log().mean(0)
        torch.testing.assert_close(rigged(x)[:, 4:], fair[:, 4:])
        torch.testing.assert_close(rigged(x)[:, 3], fair[:, 3] - 2)
        assert (rigged(x).argmax(1) == y).float().mean() > 0.9


def test_bad_arguments_are_refused(digits):
    data, models = digits
    x, y = data.tensors("attacker")
    for options in ({"epsilon": 0.0}, {"epsilon": 1.5}, {"steps": 0}):
        with pytest.raises(ValueError, match="0 < epsilon <= 1, steps >= 1 and a surrogate"):
            cs.adversarial_sources(models, x, y, DIGITS_KEY, **options)
    with pytest.raises(ValueError, match="0 surrogate"):
        cs.adversarial_sources([], x, y, DIGITS_KEY)
    some = y != DIGITS_KEY.source_classes[0]
    with pytest.raises(ValueError, match="at least one image"):
        cs.adversarial_sources(models, x[some], y[some], DIGITS_KEY)
    with pytest.raises(ValueError, match="target class needs"):
        cs.planted_sources(x[:0], y[:0], DIGITS_KEY)
    with pytest.raises(ValueError, match="secrets=0"):
        fc.KeyGrinding(secrets=0)
    with pytest.raises(ValueError, match="at least one key"):
        fc.ground_key(torch.zeros(42, 8, 7), [])
