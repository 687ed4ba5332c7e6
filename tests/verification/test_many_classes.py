"""Tasks of thousands and of a million classes: nothing grows with their square, and what would is refused."""

import numpy as np
import pytest
import torch
from meadef_lightning.experiments.benchmarks.memory import verdict
from scores_by_hand import above, leaning, statistic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from verification_fakes import FakeData

from meadef_lightning.verification import decoys, evidence_form
from meadef_lightning.verification.answers import ask_everything
from meadef_lightning.verification.decoys import DecoyTable
from meadef_lightning.verification.evidence import Evidence, check_evidence, check_size
from meadef_lightning.verification.labels import align_labels
from meadef_lightning.verification.responses import Reference, Responses, SoftAnswers
from meadef_lightning.verification.statistics import intraclass_correlation
from meadef_lightning.verification.verdict import judge
from meadef_lightning.watermark import KeySpace, WatermarkKey

MILLION = 1_000_000


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor has which any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [value.untyped_storage().nbytes() // 8 for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


def answered(table, samples=6, seed=0):
    """Random answers to every cell, concentrated on few classes, as classes ``(cells, samples)``."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(table.key.num_classes, (len(table.cells), samples), generator=generator)
    return classes.minimum(torch.randint(table.key.num_classes, classes.shape, generator=generator))


def counted(table, classes):
    """The table of counts, row by row."""
    return torch.stack([torch.bincount(table.columns(row), minlength=table.width) for row in classes])


def test_a_key_of_a_million_classes():
    key = WatermarkKey.draw(MILLION, "secret")
    assert key == WatermarkKey.draw(MILLION, "secret")
    assert max(*key.source_classes, key.target_class) < MILLION
    assert KeySpace(MILLION).size == 8 * MILLION * (MILLION - 1) * (MILLION - 2)
    last = KeySpace(MILLION).key_at(KeySpace(MILLION).size - 1)
    assert last == (MILLION - 1, MILLION - 2, MILLION - 3, 7)


def test_decoys_of_a_million_classes_are_uniform():
    # 64 random bits modulo 8e18 would draw the first classes half as often again as the others
    table = DecoyTable(WatermarkKey.draw(MILLION, "secret"), 2999)
    favoured = (1 << 64) % table.space.size / table.space.size
    first = float((table.drawn[:, 0] < favoured * MILLION).double().mean())
    assert 0.25 < favoured < 0.35
    assert abs(first - favoured) < 4 * (favoured * (1 - favoured) / 2999) ** 0.5
    assert table.drawn.max() < MILLION


def test_few_classes_keep_the_draw_that_old_evidence_has():
    table = DecoyTable(WatermarkKey.draw(20, "secret"), 50)
    words = decoys.seeded_stream(50, "decoys", table.key.salt, 0)
    drawn = [table.space.key_at(int(word) % table.space.size) for word in words]
    assert table.drawn.tolist() == [list(key) for key in drawn]


@pytest.mark.parametrize("block", [3, 128])
def test_a_narrow_table_gives_the_statistics_of_the_whole_one(block, monkeypatch):
    key = WatermarkKey.draw(30, "secret")
    whole = DecoyTable(key, 12)
    classes, *others = (answered(whole, seed=seed) for seed in range(4))
    counts, *known = (torch.stack([torch.bincount(row, minlength=30) for row in part]) for part in (classes, *others))
    scores, *more = torch.randn(4, *counts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone, beside_one = ((scores, more[:count]) for count in (0, 1))
    expected = [whole.statistics(table, references) for table, references in (alone, beside_one)]
    monkeypatch.setattr(decoys, "MANY_CLASSES", 5)
    monkeypatch.setattr(decoys, "_BLOCK", block)
    narrow = DecoyTable(key, 12)
    targets = narrow.targets.tolist()
    assert narrow.width == len(targets) + 1 <= 14
    assert targets == sorted({*narrow.drawn[:, 2].tolist(), key.target_class})
    for wanted, (table, references) in zip(expected, (alone, beside_one), strict=True):
        true, found = narrow.statistics(table[:, targets], [one[:, targets] for one in references])
        assert true == pytest.approx(wanted[0], abs=1e-12)
        torch.testing.assert_close(found, wanted[1], rtol=0, atol=1e-12)
    # how much several references differ usually is told by the columns that there are
    leans = leaning(whole.cells, counts.double() / 6)
    leans = above(leans, [leaning(whole.cells, one.double() / 6) for one in known], targets)
    true, drawn = narrow.statistics(
        narrow.shares(counted(narrow, classes)), [narrow.shares(counted(narrow, other)) for other in others]
    )
    own = (*key.source_classes, key.target_class, narrow.way)
    assert true == pytest.approx(statistic(leans, own), abs=1e-12)
    assert drawn.tolist() == pytest.approx([statistic(leans, tuple(one)) for one in narrow.drawn.tolist()], abs=1e-12)


@pytest.mark.parametrize("block", [3, 128])
def test_correlation_is_that_of_the_other_compared_cells(block, monkeypatch):
    monkeypatch.setattr(decoys, "MANY_CLASSES", 5)
    monkeypatch.setattr(decoys, "_BLOCK", block)
    table = DecoyTable(WatermarkKey.draw(30, "secret"), 12)
    counts = counted(table, answered(table))
    own = (*table.key.source_classes, table.way, table.key.target_class)
    hits = [
        int(counts[row, column])
        for row, (a, b, way) in enumerate(table.cells.tolist())
        for column, target in enumerate(table.targets.tolist())
        if target not in (a, b) and (a, b, way, target) != own
    ]
    rho = table.correlation(counts)
    assert rho == pytest.approx(intraclass_correlation(hits, 6), rel=1e-12)
    shares = np.array(hits) / 6
    inflation = shares.var(ddof=1) * 6 / (shares.mean() * (1 - shares.mean()))
    assert rho == pytest.approx(min(max((inflation - 1) / 5, 0), 1), rel=1e-9)


def test_evidence_of_a_narrow_table(tmp_path, monkeypatch):
    for module in (decoys, evidence_form):
        monkeypatch.setattr(module, "MANY_CLASSES", 5)
    key = WatermarkKey.draw(30, "secret")
    table = DecoyTable(key, 12)
    counts = counted(table, answered(table))
    natural = torch.arange(60) % 30
    labels = torch.full((20,), key.target_class), (key.target_class + torch.arange(20)) % 30
    shares = torch.randint(6000 // table.width, (2, len(table.cells), len(table.targets)))
    soft = SoftAnswers(torch.arange(20) + 900, 20 * torch.arange(20), shares[0])
    responses = Responses(
        *labels, table.cells, counts, natural, natural, 12, 0,
        references=(Reference(counts.flip(0), soft=shares[1]),), soft=soft,
    )  # fmt: skip
    verdict = judge(responses, key)
    made = Evidence.collect(verdict, responses, key, data_sha256={"verification": "0" * 64, "test": "1" * 64})
    path = made.save(tmp_path / "evidence.json")
    assert check_evidence(path, key) == verdict
    assert made.opened(key)["cells"] == counts.tolist()
    assert made.opened(key)["soft"]["references"] == [shares[1].tolist()]
    assert verdict.answers == "probabilities"


def test_a_verdict_on_a_million_classes_holds_no_table_of_them():
    with Largest() as largest:
        verdict(MILLION, 8, decoys=99, batch_size=512)
    # the labels of two million sources and little else; cells x classes would be eight hundred million
    assert 2 * MILLION <= largest.elements <= 4 * MILLION


def test_tables_that_do_not_fit_are_refused():
    key = WatermarkKey.draw(2000, "secret")
    with pytest.raises(
        ValueError, match=r"decoys=9999 drawn among 2000 classes .* Use decoys=999, which reaches p = 0.001"
    ):
        DecoyTable(key, 9999)
    assert DecoyTable(key, 999).width <= 1001
    thousand = DecoyTable(WatermarkKey.draw(1000, "secret"), 9999)
    fewer = DecoyTable(thousand.key, 999)
    check_size(fewer, references=3)
    for table, references in ((thousand, 0), (fewer, 4)):
        with pytest.raises(ValueError, match=r"larger than 256 MiB.*Nothing was asked.*999 reach.*fewer reference"):
            check_size(table, references)


def test_studies_of_all_keys_are_refused():
    with pytest.raises(ValueError, match=r"1000 classes and 8 ways make 8e.09 keys.*verify single keys"):
        ask_everything(torch.nn.Identity(), FakeData(num_classes=1000))


def test_labels_of_too_many_classes_are_not_told_apart():
    labels = torch.arange(50_000)
    with pytest.raises(ValueError, match=r"50000 labels and 50000 classes make too large a table.*numbering yourself"):
        align_labels(labels, labels, 50_000)
