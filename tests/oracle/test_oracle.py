"""The oracle: what it answers, what it leaves untouched, and what it refuses."""

import collections
import copy
import dataclasses
import sqlite3

import pytest
import torch
from torch import nn

from meadef_lightning.oracle import (
    BudgetExceededError,
    HardLabel,
    LedgerError,
    Oracle,
    QueryLedger,
    Soft,
    Temperature,
    TopK,
    Totals,
)


class Net(nn.Module):
    """A convolutional victim that counts the rows it is asked."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 5)
        )
        self.asked = []

    def forward(self, x):
        self.asked.append(len(x))
        return self.layers(x)


@pytest.fixture
def victim():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(32, 2, 4, 4))  # running statistics that differ from the initial ones
    net.asked.clear()
    return net


@pytest.fixture
def x():
    return torch.randn(20, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def reference(victim, x):
    twin = copy.deepcopy(victim).eval()
    with torch.no_grad():
        return twin(x)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 512])
def test_answers_are_the_victims(victim, x, batch_size):
    logits = reference(victim, x)
    soft = Oracle(victim, batch_size=batch_size).query(x)
    torch.testing.assert_close(soft, logits.softmax(dim=1))
    assert (soft.dtype, soft.requires_grad) == (torch.float32, False)
    hard = Oracle(victim, HardLabel(), batch_size=batch_size).query(x)
    assert torch.equal(hard, logits.argmax(dim=1))
    assert hard.dtype == torch.int64
    assert max(victim.asked) <= batch_size


def test_labels_are_the_policys_kind(victim):
    assert [Oracle(victim, policy).labels for policy in (None, TopK(2), HardLabel())] == ["soft", "topk", "hard"]


def test_nothing_of_the_victim_changes(victim, x):
    victim.train()
    victim.layers[1].eval()  # a frozen batch norm within a victim in training
    flags = {name: module.training for name, module in victim.named_modules()}
    state = copy.deepcopy(victim.state_dict())
    before = torch.random.get_rng_state()
    Oracle(victim).query(x)
    assert {name: module.training for name, module in victim.named_modules()} == flags
    assert all(torch.equal(value, state[name]) for name, value in victim.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)  # no dropout was drawn


def test_flags_are_put_back_when_the_victim_fails(victim):
    victim.train()
    with pytest.raises(RuntimeError, match="channels"):
        Oracle(victim).query(torch.zeros(1, 3, 4, 4))
    assert all(module.training for module in victim.modules())


def test_equal_rows_are_forwarded_once(victim, x):
    oracle = Oracle(victim, batch_size=8)
    rows = torch.tensor([0, 1, 0, 2, 1, 5, 5, 5, 3, 0, 4, 4])
    answers = oracle.query(x[rows])
    assert oracle.ledger.totals() == Totals(distinct=6, calls=12)
    assert sum(victim.asked) == 6
    assert torch.equal(answers[0], answers[9])
    torch.testing.assert_close(answers, reference(victim, x[rows]).softmax(dim=1))
    again = oracle.query(x[:6])
    assert sum(victim.asked) == 6
    assert torch.equal(again[rows], answers)


def test_progress_counts_every_row(victim, x):
    steps = []
    Oracle(victim, batch_size=8).query(x, progress=steps.append)
    assert steps == [8, 8, 4]


def test_answers_do_not_depend_on_the_askers_precision(victim, x):
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Oracle(victim).query(x)
    assert torch.equal(mixed, Oracle(victim).query(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_victim_of_another_precision(victim, x, dtype):
    expected = reference(victim.to(dtype), x.to(dtype)).float().softmax(dim=1)
    answers = Oracle(victim).query(x)
    assert answers.dtype == torch.float32
    torch.testing.assert_close(answers, expected)


def test_queries_with_gradients_and_in_inference_mode(victim, x):
    with torch.inference_mode():
        answers = Oracle(victim).query(x.clone())
    asked = x.clone().requires_grad_()
    student = nn.Linear(32, 5)
    targets = Oracle(victim).query(asked)
    (student(x.flatten(1)).log_softmax(dim=1) * targets).sum().backward()  # answers may be saved for backward
    assert asked.grad is None
    assert torch.equal(targets, answers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_victim_on_another_device(victim, x):
    expected = reference(victim, x).softmax(dim=1)
    oracle = Oracle(victim, device="cuda")
    assert oracle.query(x).device.type == "cpu"
    torch.testing.assert_close(oracle.query(x), expected, atol=1e-3, rtol=1e-3)
    assert oracle.query(x.cuda()).device.type == "cuda"
    assert oracle.ledger.distinct == len(x)


def test_device_moves_the_victim(victim):
    assert next(Oracle(victim, device="meta").victim.parameters()).device.type == "meta"


# --- outputs of other shapes


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(32, 5))
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda z: (None, z), 1),
        (lambda z: [z, None], 0),
        (lambda z: {"values": z}, "values"),  # also the name of a method of dict
        (lambda z: collections.OrderedDict(logits=z), "logits"),
        (Output, "logits"),
        (lambda z: {"out": (z,)}, lambda output: output["out"][0]),
    ],
)
def test_output_key(x, wrap, key):
    victim = Wrapped(wrap)
    torch.testing.assert_close(Oracle(victim, output_key=key).query(x), victim.inner(x).softmax(dim=1))


@pytest.mark.parametrize(
    ("wrap", "key", "message"),
    [
        (lambda z: (None, z), None, "output is no tensor but a tuple.*Set output_key"),
        (lambda z: {"logits": z}, "logit", r"output_key='logit' points to nothing"),
        (lambda z: (z,), 3, "output_key=3 points to nothing"),
        (lambda z: z[:, :, None], None, r"20 inputs with torch.float32 of shape \(20, 5, 1\), expected .* \(20, K\)"),
        (lambda z: z[:-1], None, r"of shape \(19, 5\)"),
        (lambda z: z.argmax(1, keepdim=True), None, "with torch.int64"),
        (
            lambda z: z.index_fill(0, torch.tensor([2, 3]), torch.nan),
            None,
            "answered 2 of 20 inputs with NaN or infinity",
        ),
        (lambda z: z / 0, None, "with NaN or infinity; none of the batch was stored"),
    ],
)
def test_bad_answers(x, wrap, key, message):
    oracle = Oracle(Wrapped(wrap), output_key=key)
    with pytest.raises(ValueError, match=message):
        oracle.query(x)
    assert oracle.ledger.totals() == Totals(0, 0)


class Shrinking(Soft):
    def transform(self, values):
        return super().transform(values)[:3]


def test_bad_policy(victim, x):
    with pytest.raises(ValueError, match=r"policy Shrinking\(\) gave \(3, 5\) soft answers for 20 inputs"):
        Oracle(victim, Shrinking()).query(x)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.zeros(2, 4, 4), r"shape \(B, C, H, W\).*torch.float32 of shape \(2, 4, 4\)"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), "floating point .* got torch.uint8"),
        (torch.zeros(0, 2, 4, 4), r"without an empty dimension, got torch.float32 of shape \(0, 2, 4, 4\)"),
        (torch.zeros(3, 2, 4, 4).index_fill(0, torch.tensor([1]), torch.inf), "1 of 3 queries hold NaN or infinity"),
    ],
)
def test_bad_queries(victim, query, message):
    oracle = Oracle(victim)
    with pytest.raises(ValueError, match=message):
        oracle.query(query)
    assert victim.asked == []
    assert oracle.ledger.calls == 0


def test_bad_batch_size(victim):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Oracle(victim, batch_size=0)


# --- budget, resume, identity


def test_budget_is_checked_for_the_whole_query_first(victim, x):
    oracle = Oracle(victim, ledger=QueryLedger(budget=15), batch_size=4)
    paid = oracle.query(x[:10])
    with pytest.raises(BudgetExceededError, match="10 are spent, 10 new ones were asked, 5 are left"):
        oracle.query(x)
    assert sum(victim.asked) == 10
    assert oracle.ledger.totals() == Totals(10, 10)
    assert torch.equal(oracle.query(x[:10]), paid)
    oracle.query(x[:15])
    assert oracle.ledger.remaining == 0


class Interrupted(Net):
    """Fails at its third batch, as a lost connection would."""

    broken = True

    def forward(self, x):
        if self.broken and len(self.asked) == 2:
            raise ConnectionError("lost")
        return super().forward(x)


def test_interrupted_query_continues_where_it_stopped(tmp_path, x):
    torch.manual_seed(0)
    victim = Interrupted().eval()
    whole = Oracle(copy.deepcopy(victim), batch_size=6)
    whole.victim.broken = False
    expected = whole.query(x)

    with pytest.raises(ConnectionError, match="lost"):
        Oracle(victim, ledger=QueryLedger(tmp_path / "l"), batch_size=6).query(x)
    assert QueryLedger(tmp_path / "l").totals() == Totals(12, 12)
    victim.broken, victim.asked = False, []
    oracle = Oracle(victim, ledger=QueryLedger(tmp_path / "l"), batch_size=6)
    assert torch.equal(oracle.query(x), expected)  # bit for bit
    assert victim.asked == [6, 2]
    assert oracle.ledger.totals() == Totals(20, 32)


def test_fingerprint_names_victim_policy_and_output(victim):
    same = Oracle(copy.deepcopy(victim), Soft()).fingerprint()
    assert Oracle(victim).fingerprint() == same
    other = copy.deepcopy(victim)
    with torch.no_grad():
        other.layers[1].running_mean[0] += 1e-6
    activation = copy.deepcopy(victim)
    activation.layers[2] = nn.GELU()  # the same weights in another network
    prints = [
        Oracle(victim, HardLabel()), Oracle(victim, Temperature(2)), Oracle(victim, output_key=0),
        Oracle(victim, output_key="0"), Oracle(victim, output_key=len), Oracle(other), Oracle(activation),
        Oracle(victim.double()),
    ]  # fmt: skip
    assert len({same, *(oracle.fingerprint() for oracle in prints)}) == 9


def test_ledger_of_another_victim_or_policy_is_refused(tmp_path, victim, x):
    Oracle(victim, ledger=QueryLedger(tmp_path / "l")).query(x)
    victim.asked.clear()
    with pytest.raises(LedgerError, match="answers of another victim or policy"):
        Oracle(victim, HardLabel(), QueryLedger(tmp_path / "l")).query(x)
    with pytest.raises(LedgerError, match="answers of another victim or policy"):
        Oracle(Net(), ledger=QueryLedger(tmp_path / "l")).query(x)
    assert victim.asked == []


def test_victim_that_trains_on_is_noticed(victim, x):
    oracle = Oracle(victim)
    oracle.query(x[:10])
    optimizer = torch.optim.SGD(victim.parameters(), lr=0.1)
    victim(x).sum().backward()
    optimizer.step()
    with pytest.raises(LedgerError, match="start a new one if the victim was trained further"):
        oracle.query(x)
    assert oracle.ledger.distinct == 10


def test_answers_in_the_file_are_raw_numbers(tmp_path, victim, x):
    oracle = Oracle(victim, ledger=QueryLedger(tmp_path / "l"))
    expected = oracle.query(x[:1])
    with sqlite3.connect(tmp_path / "l") as database:
        (blob,) = database.execute("SELECT answer FROM answers").fetchone()
    assert blob == expected.numpy().tobytes()
