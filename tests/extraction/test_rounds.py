"""Thefts in rounds: interim students against a training loop by hand, and the state between rounds."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from linear_victim import Linear, network
from linear_victim import Noise as Source
from silent import SILENT
from torch import nn

from meadef_lightning.data.loading import epoch_order
from meadef_lightning.extraction import RoundsDataModule, Student
from meadef_lightning.extraction.base import TransferSet, held_out_rows
from meadef_lightning.extraction.rounds import architecture
from meadef_lightning.oracle import HardLabel, Oracle, QueryLedger, Totals


class TwoRounds(RoundsDataModule):
    """Asks 50 images, trains an interim student on them, and asks the 50 it is least sure of."""

    def __init__(self, *args, epochs=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.epochs = epochs

    def collect(self):
        x, y = self.data.tensors("attacker")
        answers = self.ask(x[:50])
        self.before = torch.random.get_rng_state(), copy.deepcopy(self.student.state_dict()), self.student.trainer
        self.learnt = self.interim(x[:50], answers, self.epochs, seed=11)
        self.after = torch.random.get_rng_state(), copy.deepcopy(self.student.state_dict()), self.student.trainer
        with torch.no_grad():
            margin = self.learnt(x[50:]).softmax(1).amax(1)
        rows = torch.cat([torch.arange(50), 50 + margin.argsort()[:50]])
        self.save_round({"round": 1, "rows": rows})
        return TransferSet(x[rows], self.ask(x[rows]), held_out_rows(100, 0.1), y[rows])


def constant_sgd():
    return Student(
        network,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1),
    )


def fitted(student=None, **options):
    attack = TwoRounds(Oracle(Linear(), HardLabel(), options.pop("ledger", None)), Source(), batch_size=20, **options)
    student = constant_sgd() if student is None else student
    Trainer(max_epochs=1, **SILENT).fit(student, attack)
    return attack


@pytest.mark.parametrize("trained", [False, True])
def test_interim_student_equals_a_loop_by_hand(trained):
    """From fresh weights, also where the student that is attached was trained before."""
    student = constant_sgd()
    if trained:
        fitted(student)
    attack = fitted(student)
    x = Source().tensors("attacker")[0][:50]
    with torch.no_grad():
        classes = Linear()(x).argmax(1)
    torch.manual_seed(11)
    by_hand = network(4, 1)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for epoch in range(3):
        order = epoch_order(50, 11, epoch)
        for batch in (order[:20], order[20:40]):  # the last, incomplete one is dropped
            optimizer.zero_grad()
            F.cross_entropy(by_hand(x[batch]), classes[batch]).backward()
            optimizer.step()
    for a, b in zip(attack.learnt.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not attack.learnt.training
    assert attack.oracle.ledger.totals() == Totals(100, 150)


def test_interim_student_leaves_the_global_generator_and_the_student_alone():
    attack = fitted()
    (state, weights, trainer), (state_after, weights_after, trainer_after) = attack.before, attack.after
    assert torch.equal(state, state_after)
    assert weights.keys() == weights_after.keys()
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)
    assert trainer is trainer_after
    assert attack.learnt is not attack.student
    assert attack.trainer.current_epoch == 1


def test_interim_student_does_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    first = fitted()
    torch.manual_seed(1)
    again, longer = fitted(), fitted(epochs=4)
    assert torch.equal(first.learnt.network[1].weight, again.learnt.network[1].weight)
    assert torch.equal(first._transfer.x, again._transfer.x)
    assert not torch.equal(first.learnt.network[1].weight, longer.learnt.network[1].weight)


def test_interim_student_has_the_default_schedule_of_its_own_length():
    attack = fitted(Student(network), epochs=5)  # one cycle over 10 steps, ending at 0
    (optimizer,) = (attack.learnt.trainer.optimizers,)
    assert optimizer[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert attack.learnt.trainer.global_step == 10


# --- the state between rounds


def attack_on(ledger, victim=None, cls=TwoRounds, **options):
    return cls(Oracle(Linear() if victim is None else victim, ledger=ledger), Source(), **options)


class Other(TwoRounds):
    """Another attack."""


def test_state_is_continued_by_the_same_attack_only(tmp_path):
    ledger, state = QueryLedger(tmp_path / "l"), {"round": 2, "rows": torch.arange(5), "mean": 0.25}
    assert attack_on(ledger).load_round() is None
    attack_on(ledger).save_round(state)
    loaded = attack_on(QueryLedger(tmp_path / "l")).load_round()
    assert torch.equal(loaded.pop("rows"), state["rows"])
    assert loaded == {"round": 2, "mean": 0.25}
    victim = Linear()
    with torch.no_grad():
        victim.layer.weight[0, 0] += 1
    for other in (
        attack_on(ledger, victim),
        attack_on(ledger, cls=Other),
        attack_on(ledger, seed=1),
        attack_on(ledger, epochs=4),
        attack_on(ledger, batch_size=64),
        TwoRounds(Oracle(Linear(), HardLabel(), ledger), Source()),
        attack_on(QueryLedger(tmp_path / "m")),
    ):
        assert other.load_round() is None


def test_ledgers_that_differ_after_a_dot_have_rounds_of_their_own(tmp_path):
    names = ("a", "a.1", "a.2", "a.sqlite")
    for number, name in enumerate(names):
        attack_on(QueryLedger(tmp_path / name)).save_round({"round": number})
    found = [attack_on(QueryLedger(tmp_path / name)).load_round() for name in names]
    assert found == [{"round": number} for number in range(4)]


@pytest.mark.parametrize("whose", [{}, {"ledger": "0" * 32}])
def test_rounds_of_another_ledger_are_not_gone_on_with(tmp_path, whose):
    """As an earlier version left them for ``a.sqlite`` where those of ``a`` are now, and as a ledger that was moved away left them."""
    attack, file = attack_on(QueryLedger(tmp_path / "a")), tmp_path / "a.rounds.pt"
    attack.save_round({"round": 1})
    content = torch.load(file, weights_only=True)
    torch.save({**{name: value for name, value in content.items() if name != "ledger"}, **whose}, file)
    assert attack.load_round() is None
    torch.save(content, file)
    assert attack.load_round() == {"round": 1}


class OneRound(RoundsDataModule):
    """Says what it would go on from, and keeps a round that an interim student took part in."""

    def collect(self):
        self.found = self.load_round()
        x, _ = self.data.tensors("attacker")
        answers = self.ask(x[:40])
        self.interim(x[:40], answers, 1, seed=0)
        self.save_round({"round": 1})
        return TransferSet(x[:40], answers, held_out_rows(40, 0.1))


def wide(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 16, 7), nn.ReLU(), nn.Linear(7, num_classes))


def test_rounds_of_a_student_of_another_architecture_are_refused(tmp_path):
    def begin(net):
        attack = attack_on(QueryLedger(tmp_path / "l.sqlite"), cls=OneRound, batch_size=20)
        Trainer(max_epochs=1, **SILENT).fit(Student(net), attack)
        return attack.found

    assert begin(network) is None
    assert begin(network)["round"] == 1
    file = tmp_path / "l.sqlite.rounds.pt"
    with pytest.raises(
        MisconfigurationException, match=f"{file} holds rounds .* another architecture.*delete.*l.sqlite"
    ):
        begin(wide)
    assert begin(network)["round"] == 1, "the refusal left the rounds alone"
    file.unlink()
    assert begin(wide) is None
    assert begin(wide)["round"] == 1


def test_architecture_is_told_by_modules_names_and_shapes():
    same = [architecture(wide(4, 1)) for _ in range(2)]
    named = nn.Sequential(OrderedDict(zip("abcd", wide(4, 1), strict=True)))
    smooth = nn.Sequential(*(nn.GELU() if isinstance(layer, nn.ReLU) else layer for layer in wide(4, 1)))
    others = [architecture(net) for net in (wide(5, 1), wide(4, 2), named, smooth)]
    assert len({*same, *others}) == 5
    assert same[0] == same[1]


def test_without_a_file_nothing_is_kept():
    attack = attack_on(QueryLedger())
    attack.save_round({"round": 1})
    assert attack.load_round() is None


def test_state_that_was_being_written_when_the_process_died_is_the_old_one(tmp_path, monkeypatch):
    attack = attack_on(QueryLedger(tmp_path / "l"))
    attack.save_round({"round": 1})

    def dying(content, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        attack.save_round({"round": 2})
    monkeypatch.undo()
    assert attack.load_round() == {"round": 1}
    attack.save_round({"round": 2})
    assert attack.load_round() == {"round": 2}
    assert not list(tmp_path.glob("*.new"))


def test_round_seeds_differ_by_round_and_seed():
    attacks = [attack_on(QueryLedger(), seed=seed) for seed in (0, 1, 11)]
    seeds = {attack.round_seed(number) for attack in attacks for number in range(20)}
    assert len(seeds) == 60
    assert min(seeds) >= 0
    assert max(seeds) < 2**32


# --- who is trained


class Stranger(LightningModule):
    """Not a student."""

    def training_step(self, batch):
        return None

    def configure_optimizers(self):
        return None


def test_interim_students_need_a_trainer_of_a_student():
    attack = attack_on(QueryLedger())
    with pytest.raises(MisconfigurationException, match="like the one it is attached to, but there is no Trainer"):
        attack.setup("fit")
    with pytest.raises(MisconfigurationException, match="there is a Stranger"):
        Trainer(max_epochs=1, **SILENT).fit(Stranger(), attack_on(QueryLedger()))
