"""DFME and MAZE themselves: their losses, the memory, and that both learn a victim without data."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from silent import SILENT
from test_datafree import SMALL, Linear, Noise, linear, steal

from meadef_lightning.extraction.datafree import DataFreeDataModule
from meadef_lightning.extraction.dfme import DFMEStudent, recovered_logits
from meadef_lightning.extraction.maze import MAZEStudent, ReplayMemory, divergence
from meadef_lightning.oracle import Oracle


class Losses(Callback):
    """Keeps what is logged in every iteration, and the learning rates."""

    def on_train_start(self, *_):
        self.loss, self.rates = [], []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    def on_train_batch_end(self, trainer, *_):
        self.loss.append(float(trainer.callback_metrics["train_loss"]))


# --- losses


def test_logits_are_recovered_up_to_a_constant():
    logits = 10 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    expected = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(recovered_logits(logits.softmax(1)), expected, atol=1e-4, rtol=1e-5)


def test_logits_of_truncated_answers():
    answers = torch.tensor([[0.7, 0.1, 0.0, 0.0], [0.99, 0.01, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.1, 0.0, 0.1]])
    completed = torch.tensor([
        [0.7, 0.1, 0.1, 0.1],  # what is missing, in equal parts
        [0.99, 0.01, 1e-3, 1e-3],  # nothing is missing: the floor
        [0.25, 0.25, 0.25, 0.25],
        [0.5, 0.1, 0.1, 0.1],  # 0.3 are missing, but not more than the smallest given
    ])  # fmt: skip
    logs = completed.log()
    torch.testing.assert_close(recovered_logits(answers, floor=1e-3), logs - logs.mean(1, keepdim=True))


def test_disagreements():
    generator = torch.Generator().manual_seed(0)
    victim, logits = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    answers = victim.softmax(1)
    centred = victim - victim.mean(1, keepdim=True)
    torch.testing.assert_close(DFMEStudent(linear).disagreement(centred, answers), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        DFMEStudent(linear).disagreement(logits, answers),
        torch.stack([(logits - centred)[:, k].abs() for k in range(4)]).mean(0),
    )
    expected = F.kl_div(logits.log_softmax(1), answers, reduction="none").sum(1)
    torch.testing.assert_close(divergence(logits, answers), expected)
    torch.testing.assert_close(divergence(logits, 0.3 * answers), expected)
    top = torch.tensor([[0.6, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    p = torch.tensor([0.75, 0.25])
    by_hand = (p * (p.log() - logits[0].log_softmax(0)[:2])).sum()
    torch.testing.assert_close(divergence(logits[:2], top), torch.stack([by_hand, torch.zeros(())]))


# --- memory


def test_memory_is_bounded_and_uniform():
    torch.manual_seed(0)
    kept, trials = torch.zeros(50), 800
    for _ in range(trials):
        memory = ReplayMemory(12)
        for batch in torch.arange(50).split(5):  # the third one fills it and begins to replace
            memory.add(batch[:, None].float(), batch)
        x, answers = memory.rows()
        assert len(memory) == len(x) == 12
        assert torch.equal(x[:, 0].long(), answers)
        assert len(answers.unique()) == 12
        kept[answers] += 1
    # each row with probability 12/50: five standard deviations of the frequency are 0.076
    torch.testing.assert_close(kept / trials, torch.full((50,), 0.24), atol=0.076, rtol=0)
    x, answers = memory.sample(400)
    assert torch.equal(x[:, 0].long(), answers)
    assert set(answers.tolist()) == set(memory.rows()[1].tolist())


def test_memory_goes_through_a_checkpoint():
    memory, other = ReplayMemory(12), ReplayMemory(12)
    memory.add(torch.randn(5, 2), torch.arange(5))
    state = torch.random.get_rng_state()
    other.load_state_dict(memory.state_dict())
    assert torch.equal(torch.random.get_rng_state(), state)
    for each in (memory, other):
        torch.manual_seed(3)
        for _ in range(4):
            each.add(torch.randn(5, 2), torch.randint(9, (5,)))
    assert memory.seen == other.seen == 25
    assert all(torch.equal(a, b) for a, b in zip(memory.rows(), other.rows(), strict=True))
    with pytest.raises(ValueError, match="holds 12 rows of 25, which does not fit a capacity of 20"):
        ReplayMemory(20).load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match="batch of 13 does not fit a memory of 12"):
        memory.add(torch.zeros(13, 2), torch.zeros(13))
    with pytest.raises(ValueError, match="memory is empty"):
        ReplayMemory(3).sample(1)


def test_replay_asks_nothing_and_answers_belong():
    victim, student = Linear(), MAZEStudent(linear, **SMALL, directions=2, replay_steps=4, replay_size=40)
    steal(student, Oracle(victim))
    assert victim.asked == 5 * 16 * (3 + 5)
    assert (len(student.memory), student.memory.seen) == (40, 5 * 5 * 16)
    x, answers = student.memory.rows()
    with torch.no_grad():
        torch.testing.assert_close(answers, victim(x).softmax(1))


# --- the thefts


@pytest.mark.parametrize(
    ("student", "least"),
    [
        (lambda: DFMEStudent(linear, latent=64, width=8, lr=0.05, generator_lr=1e-3), 0.6),
        (lambda: MAZEStudent(linear, latent=64, width=8, directions=4, replay_steps=2, replay_size=512), 0.6),
    ],
    ids=["dfme", "maze"],
)
def test_student_learns_a_linear_victim(student, least):
    seed_everything(0, verbose=False)
    victim, student, losses = Linear(), student(), Losses()
    trainer = steal(student, Oracle(victim), epochs=10, callbacks=[losses], batch_size=32)
    assert sum(losses.loss[-10:]) < 0.5 * sum(losses.loss[:10])
    x, _ = trainer.datamodule.data.tensors("test")
    with torch.no_grad():
        fidelity = (student.eval()(x).argmax(1) == victim(x).argmax(1)).float().mean()
    assert fidelity >= least


def test_generator_raises_the_disagreement():
    """With a student that hardly moves, the generator's steps must increase what it maximises."""
    seed_everything(0, verbose=False)
    found = []

    class Found(Callback):
        def on_train_batch_end(self, trainer, *_):
            found.append(-float(trainer.callback_metrics["generator_loss"]))

    student = DFMEStudent(linear, **SMALL, directions=8, student_steps=1, lr=1e-9, generator_lr=1e-2)
    steal(student, Oracle(Linear()), epochs=8, callbacks=[Found()], batch_size=32)
    assert sum(found[-10:]) > 1.3 * sum(found[:10])


def test_learning_rates_follow_the_paper():
    student, losses = DFMEStudent(linear, **SMALL), Losses()
    steal(student, Oracle(Linear()), epochs=4, callbacks=[losses])
    factors = [1] * 2 + [0.3] * 4 + [0.09] * 4 + [0.027] * 10
    for index, initial in enumerate((0.1, 1e-4)):
        assert [rates[index] for rates in losses.rates] == pytest.approx([initial * factor for factor in factors])
    student = MAZEStudent(linear, **SMALL, directions=1, replay_steps=0)
    steal(student, Oracle(Linear()), epochs=2, callbacks=[losses])
    cosine = [(1 + torch.tensor(torch.pi * step / 10).cos().item()) / 2 for step in range(10)]
    for index, initial in enumerate((0.1, 1e-3)):
        assert [rates[index] for rates in losses.rates] == pytest.approx([initial * f for f in cosine], abs=1e-8)


def test_bad_options():
    with pytest.raises(ValueError, match=r"milestones are parts of the run, each in \(0, 1\), got \(0\.1, 3\)"):
        DFMEStudent(linear, milestones=(0.1, 3))
    with pytest.raises(ValueError, match=r"floor must lie in \(0, 1\], got 0\.0"):
        DFMEStudent(linear, floor=0.0)
    with pytest.raises(ValueError, match="replay_steps=-1 must be at least 0"):
        MAZEStudent(linear, replay_steps=-1)
    victim = Linear()
    with pytest.raises(MisconfigurationException, match="replay_size=8 does not hold a batch of 16"):
        Trainer(max_epochs=1, **SILENT).fit(
            MAZEStudent(linear, **SMALL, replay_size=8), DataFreeDataModule(Oracle(victim), Noise(), batch_size=16)
        )
    assert victim.asked == 0
