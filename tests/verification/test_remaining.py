"""What probabilities say beside the sources, from a suspect's answers to evidence: logits, probabilities, labels, black boxes."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from verification_fakes import KEY, FakeData, Independent, Soft, Thief

from meadef_lightning.verification import Evidence, EvidenceError, answers, check_evidence, judge, verify
from meadef_lightning.verification.false_claims import _place
from meadef_lightning.verification.relabelling import relabelled
from meadef_lightning.verification.remaining import as_probabilities, remaining_shares
from meadef_lightning.verification.sealing import hide, reveal, seals
from meadef_lightning.watermark import KeySpace, WatermarkKey

QUICK = {"samples": 20, "decoy_samples": 4, "accelerator": "cpu"}


class Box:
    def __init__(self, module):
        self.query = module.forward


def told(form="logits", box=False, model=None, **options):
    suspect = Soft(model or Thief(KEY), form=form)
    with torch.no_grad():
        return verify(Box(suspect) if box else suspect, KEY, FakeData(), **{**QUICK, **options})


rows = st.integers(4, 9).flatmap(lambda k: st.tuples(st.lists(st.floats(0.0, 1.0, width=32), min_size=k, max_size=k), st.permutations(range(k))))  # fmt: skip


@given(rows)
def test_shares_are_those_of_exact_arithmetic(row):
    values, (a, b, *others) = row
    found = remaining_shares(torch.tensor([values]), torch.tensor([[a, b]]))[0].tolist()
    rest = {t: Fraction(values[t]) + Fraction(1e-4) for t in others}
    for t in others:
        assert found[t] == math.floor(1000 * rest[t] / sum(rest.values()) + Fraction(1e-7))
    assert found[a] == found[b] == 0
    assert 1000 - len(values) < sum(found) <= 1000


@given(rows, st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_shares_forget_the_scale_and_grow_with_their_class_alone(row, scale, more):
    values, (a, b, target, *others) = row
    sources, high = torch.tensor([[a, b]]), torch.tensor([values]).double() + 0.5
    first, second = remaining_shares(high, sources), remaining_shares(scale * high, sources)
    floors = 1000 * 1e-4 * len(values) / (0.5 * scale)
    assert int((first - second).abs().max()) <= floors + 1
    raised = torch.tensor([values]).double()
    before = remaining_shares(raised, sources)[0]
    raised[0, target] += more
    after = remaining_shares(raised, sources)[0]
    assert after[target] >= before[target]
    assert bool((after[others] <= before[others]).all())
    raised[0, [a, b]] = 0.3  # how the sources compete does not matter
    assert torch.equal(remaining_shares(raised, sources)[0], after)


@pytest.mark.parametrize("classes", [4, 7, 10, 27, 102])
def test_a_sure_suspect_gives_all_other_classes_the_same_whatever_the_sources(classes):
    pairs = torch.tensor([(a, b) for a in range(classes) for b in range(classes) if a != b])
    sure = nn.functional.one_hot(pairs[:, 0], classes).float()
    shares = remaining_shares(sure, pairs)
    rest = torch.ones(len(pairs), classes, dtype=torch.bool).scatter(1, pairs, False)
    assert shares[rest].unique().tolist() == [1000 // (classes - 2)]


def test_what_is_taken_for_probabilities():
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 3
    p = logits.softmax(1)
    top = torch.where(p >= p.sort(1, descending=True).values[:, 1:2], p, 0.0)
    for kept in (p, top, p.round(decimals=2), p.round(decimals=1), p.bfloat16().float(), p[:1], 0 * p):
        assert torch.equal(as_probabilities(kept), kept)
    assert float(p.round(decimals=2).sum(1).max()) > 1.005  # rounding adds up
    for scores in (logits, logits.clamp_min(0), p.log(), p - 0.5, 3 * p, logits.half(), logits.double()):
        torch.testing.assert_close(as_probabilities(scores), scores.float().softmax(1))
    torch.testing.assert_close(as_probabilities(p.log()), p)
    bad = logits.clone()
    bad[3, 4], bad[5, 6], bad[7, 8] = torch.nan, torch.inf, -torch.inf
    found = as_probabilities(bad)
    assert found.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert found[5].tolist() == [0.0] * 6 + [1.0] + [0.0] * 3
    assert float(found[7, 8]) == 0
    others = [i for i in range(200) if i not in (3, 5, 7)]
    torch.testing.assert_close(found[others], p[others])


def test_logits_probabilities_and_a_black_box_say_the_same():
    verdict, plain = told()
    assert (verdict.answers, verdict.verdict) == ("probabilities", "supported")
    assert len(plain.soft.cells.unique()) > 100
    x, _ = FakeData().tensors("test")
    assert len(x) == len(plain.natural)
    for form, box in (("softmax", False), ("logits", True), ("softmax", True)):
        other, responses = told(form, box, batch_size=77)
        for name, samples in (("trigger", 1), ("control", 1), ("cells", 4)):
            difference = getattr(responses.soft, name) - getattr(plain.soft, name)
            assert int(difference.abs().max()) <= samples
        assert (other.verdict, other.answers) == ("supported", "probabilities")
        assert other.decoy_p == pytest.approx(verdict.decoy_p, abs=1 / 1680)
        assert (other.only_trigger, other.only_control, other.wsr) == (20, 0, verdict.wsr)


@pytest.mark.parametrize("order", [None, [2, 4, 6, 0, 5, 1, 3]])
def test_batches_do_not_decide_whether_scores_are_logits(order):
    """Rows of logits that could be probabilities stand alone in some batches; they are logits since others can be nothing else."""

    class Timid(Soft):
        def forward(self, x):
            p = super().forward(x)
            rows = x.flatten(1).sum(1, keepdim=True).frexp()[1] % 2 == 0
            return torch.where(rows, p, p.log())

    suspect = Timid(Thief(KEY), form="softmax", order=order)
    x, truth = FakeData().tensors("test")
    assert len((suspect(x) < 0).any(1).unique()) == 2
    asked = suspect if order is None else relabelled(suspect, (x, truth), 7)[0]
    runs = [verify(asked, KEY, FakeData(), batch_size=size, **QUICK)[1].soft for size in (1, 5, 4096)]
    assert all(
        torch.equal(getattr(one, name), getattr(runs[0], name))
        for one in runs
        for name in ("trigger", "control", "cells")
    )
    tables = [answers.ask_everything(asked, FakeData(), samples=4, batch_size=size).soft for size in (5, 4096)]
    assert torch.equal(*tables)


def test_one_that_answers_with_labels_makes_labels_of_all():
    _, soft = told(model=Independent())
    _, hard = told("labels", model=Independent())
    assert hard.soft is None
    for form, reference, expected in (
        ("logits", soft, "probabilities"), ("labels", soft, "labels"), ("logits", hard, "labels"),
        ("logits", [soft, hard], "labels"), ("logits", [soft, soft], "probabilities"), ("labels", None, "labels"),
    ):  # fmt: skip
        verdict, responses = told(form, reference=reference)
        assert verdict.answers == expected
        assert (responses.soft is None) == (form == "labels")
        if expected == "labels":
            assert verdict == told("labels", reference=reference)[0]


def test_three_classes_leave_nothing_to_compare():
    key, data = WatermarkKey.draw(3, "secret"), FakeData(3)
    verdict, responses = verify(Independent(3), key, data, **QUICK)
    assert (verdict.answers, responses.soft) == ("labels", None)
    assert answers.ask_everything(Independent(3), data, samples=4).soft is None


@pytest.mark.parametrize("decoys", [9999, 60])
def test_the_table_of_all_keys_holds_what_a_verification_collects(decoys):
    suspect, known = Soft(Thief(KEY)).eval(), Soft(Independent(), seed=1).eval()
    tables = [answers.ask_everything(model, FakeData(), samples=20) for model in (suspect, known)]
    _, reference = verify(known, KEY, FakeData(), decoys=decoys, **QUICK)
    verdict, asked = verify(suspect, KEY, FakeData(), decoys=decoys, reference=reference, **QUICK)
    taken = tables[0].responses(KEY, decoys, 4, [tables[1]])
    for name in ("trigger", "control", "cells"):
        assert torch.equal(getattr(taken.soft, name), getattr(asked.soft, name)), name
    assert torch.equal(taken.references[0].soft, asked.references[0].soft)
    assert torch.equal(taken.counts, asked.counts)
    assert judge(taken, KEY) == verdict
    assert verdict.answers == "probabilities"


@pytest.mark.parametrize("references", [(), (True,), (True, True), (True, False)])
@pytest.mark.parametrize("soft", [True, False])
def test_every_key_at_once_agrees_with_the_judge(soft, references):
    space = KeySpace(7)

    def noise(seed, soft):
        generator = torch.Generator().manual_seed(seed)
        p = (3 * torch.randn(42, 8, 32, 7, generator=generator)).softmax(3)
        pairs = torch.tensor([(a, b) for a in range(7) for b in range(7) if a != b])
        shares = remaining_shares(p.flatten(0, 2), pairs.repeat_interleave(256, 0)).short().reshape(p.shape)
        natural = torch.arange(7)
        return answers.AnswerTable(p.argmax(3).short(), natural, natural, space, soft=shares if soft else None)

    table, known = noise(0, soft), [noise(seed, kind) for seed, kind in enumerate(references, 1)]
    p, mcnemar = answers.every_decoy_p(table, known), answers.every_mcnemar_p(table, known)
    for number in range(15):
        key = WatermarkKey.draw(7, f"secret {number}")
        verdict = judge(table.responses(key, references=known), key)
        assert verdict.answers == ("probabilities" if soft and all(references) else "labels")
        assert float(p[_place(key)]) == pytest.approx(verdict.decoy_p, abs=1e-12)
        assert float(mcnemar[_place(key)]) == pytest.approx(verdict.mcnemar_p, rel=1e-9)


def test_a_renumbered_soft_suspect_is_judged_as_if_it_were_not():
    plain, responses = told()
    for form in ("logits", "softmax"):
        renumbered = Soft(Thief(KEY), form=form, order=[2, 4, 6, 0, 5, 1, 3])
        suspect, labels = relabelled(renumbered, FakeData().tensors("test"), 7)
        assert labels.kind == "permutation"
        verdict, again = verify(suspect, KEY, FakeData(), **QUICK)
        assert verify(renumbered, KEY, FakeData(), **QUICK)[0].verdict != "supported"
        assert int((again.soft.trigger - responses.soft.trigger).abs().max()) <= 1
        assert int((again.soft.cells - responses.soft.cells).abs().max()) <= 4
        assert (verdict.verdict, verdict.answers) == (plain.verdict, "probabilities")


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    path = tmp_path_factory.mktemp("soft") / "evidence.json"
    _, reference = told(model=Independent())
    return path, *told(reference=reference, evidence_path=path)


def test_evidence_holds_what_was_said_and_gives_the_verdict_again(evidence):
    path, verdict, responses = evidence
    assert check_evidence(path, KEY) == verdict
    assert verdict.answers == "probabilities"
    kept = Evidence.load(path).opened(KEY)["soft"]
    assert kept.pop("references") == [responses.references[0].soft.tolist()]
    assert kept == {name: getattr(responses.soft, name).tolist() for name in ("trigger", "control", "cells")}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("trigger", lambda v: [-1, *v[1:]], "answers.soft"),
        ("trigger", lambda v: [1001, *v[1:]], "soft.trigger holds shares outside"),
        ("control", lambda v: v[1:], "soft.control must be int64 of shape"),
        ("control", lambda v: [], "soft.control must be int64 of shape"),
        ("control", lambda v: [True, *v[1:]], "answers.soft"),
        ("trigger", lambda v: [0.5, *v[1:]], "answers.soft"),
        ("trigger", lambda v: None, "answers.soft"),
        ("cells", lambda v: None, "answers.soft"),
        ("cells", lambda v: "cells", "answers.soft"),
        ("cells", lambda v: v[1:], "soft.cells must be int64 of shape"),
        ("cells", lambda v: [], "soft.cells must be int64 of shape"),
        ("cells", lambda v: [[], *v[1:]], "answers.soft has rows of different lengths"),
        ("cells", lambda v: [[*row, 0] for row in v], "soft.cells must be int64 of shape"),
        ("cells", lambda v: [[1 << 41] * 7] * len(v), "answers.soft"),
        ("cells", lambda v: [[1 << 40] * 7] * len(v), "soft.cells: .* sum to 4000 thousandths at most"),
        ("cells", lambda v: [[False] * 7] * len(v), "answers.soft"),
        ("references", lambda v: [], "answers.soft.references must be 1 tables"),
        ("references", lambda v: v + v, "answers.soft.references must be 1 tables"),
        ("references", lambda v: 3, "answers.soft"),
        ("references", lambda v: "x", "answers.soft"),
        ("references", lambda v: {"x": v[0]}, "answers.soft"),
        ("references", lambda v: [3], "answers.soft"),
        ("references", lambda v: [[]], "soft.references must be int64 of shape"),
        ("references", lambda v: [[[-1] * 7]], "answers.soft"),
        ("references", lambda v: [None], "does not follow from the answers.* verdict.answers"),
        ("more", lambda v: 3, "answers.soft"),
    ],
)  # fmt: skip
def test_soft_answers_that_cannot_be_are_refused_even_with_a_valid_seal(name, change, message, evidence, tmp_path):
    content = json.loads(evidence[0].read_text())
    inside = reveal(content["answers"], KEY, 1 << 24)
    inside["soft"][name] = change(inside["soft"].get(name))
    content["answers"] = hide(inside, KEY)
    content["seal"] = seals({k: v for k, v in content.items() if k != "seal"}, KEY)
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(EvidenceError, match=message):
        check_evidence(tmp_path / "changed.json", KEY)
