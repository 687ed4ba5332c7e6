"""The oracle over HTTP against the oracle in the same process: answers, accounts, thefts and verdicts."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from http_fakes import API_KEY, SHAPE, Linear, images, send, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer, seed_everything
from silent import SILENT
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.data.images import TensorImages
from meadef_lightning.extraction import DistillationDataModule, Student
from meadef_lightning.oracle import (
    BudgetExceededError,
    Compose,
    HardLabel,
    HTTPOracle,
    LedgerError,
    Oracle,
    OracleHTTPError,
    QueryLedger,
    Rounded,
    ServerBudgetExceededError,
    Soft,
    Temperature,
    TopK,
    Totals,
)
from meadef_lightning.oracle.clients import ServerLimits
from meadef_lightning.oracle.http import ServedModel, check_answers
from meadef_lightning.oracle.wire import message_bytes, pack, unpack
from meadef_lightning.verification import verify

sys.path.append(str(Path(__file__).parents[1] / "verification"))
from verification_fakes import KEY, BlackBox, FakeData, Thief


def client(url, **options):
    return HTTPOracle(url, API_KEY, **{"retries": 0, **options})


@pytest.mark.parametrize(
    "policy",
    [None, TopK(2), HardLabel(), Rounded(1), Compose([Temperature(3.0), Soft(), Rounded(2)])],
    ids=lambda policy: type(policy).__name__,
)
def test_answers_are_those_of_the_oracle_in_the_process(policy, tmp_path):
    x = images(50)
    local = Oracle(Linear(), policy, batch_size=20)
    expected = local.query(x)
    with serving(Linear(), policy, directory=tmp_path) as url:
        oracle = client(url, batch_size=20)
        steps = []
        answers = oracle.query(x, progress=steps.append)
    assert torch.equal(answers, expected)  # bit for bit
    assert answers.dtype == expected.dtype
    assert oracle.labels == local.labels
    assert steps == [20, 20, 10]
    assert oracle.ledger.totals() == QueryLedger(tmp_path / "tester.sqlite").totals() == Totals(50, 50)


def test_what_was_answered_is_not_asked_again(tmp_path):
    victim, x = Linear(), images(40)
    with serving(victim, directory=tmp_path / "server") as url:
        first = client(url, ledger=QueryLedger(tmp_path / "client")).query(x[:30])
        oracle = client(url, ledger=QueryLedger(tmp_path / "client"))
        again = oracle.query(torch.cat([x, x[:5]]))
        assert torch.equal(again[:30], first)
        assert oracle.ledger.totals() == Totals(40, 75)
        assert QueryLedger(tmp_path / "server" / "tester.sqlite").totals() == Totals(40, 40)
        # a client that lost its ledger is answered from the server's, and pays nothing
        assert torch.equal(client(url).query(x), again[:40])
        assert QueryLedger(tmp_path / "server" / "tester.sqlite").totals() == Totals(40, 80)
    assert victim.asked == 40


def test_batches_are_lowered_to_what_the_server_takes(tmp_path):
    with serving(Linear(), directory=tmp_path, limits=ServerLimits(rows_per_request=7)) as url:
        oracle = client(url)
        steps = []
        assert len(oracle.query(images(20), progress=steps.append)) == 20
    assert steps == [7, 7, 6]
    assert oracle.served.max_rows == oracle.batch_size == 7


def test_other_precisions_are_asked_in_single(tmp_path):
    x = images(5).double()
    with serving(Linear(), directory=tmp_path) as url:
        assert torch.equal(client(url).query(x), Oracle(Linear()).query(x.float()))


def test_queries_of_another_shape_are_refused_before_they_are_sent(tmp_path):
    victim = Linear()
    with serving(victim, directory=tmp_path) as url:
        oracle = client(url)
        with pytest.raises(ValueError, match=r"takes images of shape \(1, 4, 4\), got \(1, 5, 4\). Nothing was asked"):
            oracle.query(torch.zeros(2, 1, 5, 4))
        with pytest.raises(ValueError, match="1 of 2 queries hold NaN"):
            oracle.query(torch.zeros(2, *SHAPE).index_fill(0, torch.tensor([1]), torch.nan))
    assert victim.asked == 0


def test_each_client_has_its_own_account_and_budget(tmp_path):
    x = images(30)
    keys = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789"}
    with serving(
        Linear(), directory=tmp_path, api_keys=keys, limits=ServerLimits(budget=20, rows_per_request=10)
    ) as url:
        alice, bob = (HTTPOracle(url, key, retries=0) for key in keys.values())
        alice.query(x[:15])
        with pytest.raises(
            ServerBudgetExceededError, match=r"127.0.0.1.*status 402.*15 are spent, 10 new.*5 are left"
        ) as e:
            alice.query(torch.cat([x[:10], x[15:]]))
        assert isinstance(e.value, BudgetExceededError)
        assert (e.value.budget, e.value.spent, e.value.asked) == (20, 15, 10)
        assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)  # noqa: S301 - as it travels between ranks
        assert len(bob.query(x[:20])) == 20
        alice.query(x[:20])
        assert send(url, "/info", key=keys["alice"])[2]["remaining"] == 0
    assert QueryLedger(tmp_path / "alice.sqlite").totals().distinct == 20
    assert QueryLedger(tmp_path / "bob.sqlite").totals() == Totals(20, 20)


def test_fingerprint_follows_model_and_policy_but_not_the_address(tmp_path):
    def fingerprint(victim, policy, directory):
        with serving(victim, policy, directory=directory) as url:
            return client(url).fingerprint()

    first = fingerprint(Linear(), None, tmp_path / "a")
    assert fingerprint(Linear(), None, tmp_path / "a") == first  # on another port
    assert fingerprint(Linear(), None, tmp_path / "b") != first  # another server's accounts
    other = Linear()
    with torch.no_grad():
        other.layer.bias[0] += 1
    with pytest.raises(LedgerError, match="answers of another victim or policy"):
        fingerprint(other, None, tmp_path / "a")


def test_a_ledger_of_another_server_is_refused(tmp_path):
    with serving(Linear(), directory=tmp_path / "a") as url:
        client(url, ledger=QueryLedger(tmp_path / "client")).query(images(3))
    with (
        serving(Linear(), HardLabel(), directory=tmp_path / "b") as url,
        pytest.raises(LedgerError, match="answers of another victim or policy"),
    ):
        client(url, ledger=QueryLedger(tmp_path / "client")).query(images(3))


def test_model_that_is_trained_while_it_is_served(tmp_path):
    victim = Linear()
    with serving(victim, directory=tmp_path) as url:
        oracle = client(url)
        oracle.query(images(3))
        with torch.no_grad():
            victim.layer.weight += 1
        with pytest.raises(OracleHTTPError, match=r"status 503.*The accounts cannot be kept"):
            oracle.query(images(6))
    assert oracle.ledger.distinct == 3


# --- thefts and verdicts


class Noise(SplitDataModule):
    """Grey noise in four classes, 200 images for the attacker."""

    class_names = ("a", "b", "c", "d")
    image_shape = SHAPE

    def __init__(self):
        super().__init__(batch_size=50, victim_size=100, attacker_size=200, verification_size=20, validation_size=20)

    def load(self):
        pixels = torch.randint(256, (600, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        labels = torch.arange(600) % 4
        return TensorImages(pixels[:400], labels[:400]), TensorImages(pixels[400:], labels[400:])


def steal(oracle):
    seed_everything(0, verbose=False)
    data = DistillationDataModule(oracle, Noise(), batch_size=32)
    student = Student(
        lambda classes, channels: nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, classes)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    )
    trainer = Trainer(max_epochs=3, **SILENT)
    trainer.fit(student, data)
    return student.state_dict(), data.query_summary()


@pytest.mark.parametrize("policy", [None, HardLabel()], ids=["soft", "hard"])
def test_theft_through_a_served_oracle_ends_in_the_same_weights(policy, tmp_path):
    expected, summary = steal(Oracle(Linear(), policy, batch_size=64))
    with serving(Linear(), policy, directory=tmp_path) as url:
        oracle = client(url, batch_size=64)
        stolen, served_summary = steal(oracle)
    assert served_summary == summary
    assert all(torch.equal(stolen[name], weight) for name, weight in expected.items())
    assert oracle.ledger.totals() == QueryLedger(tmp_path / "tester.sqlite").totals() == Totals(200, 200)


class Sure(Thief):
    """With logits that are no probabilities."""

    def forward(self, x):
        return 9 * super().forward(x)


@pytest.mark.parametrize(("policy", "suspect"), [(Soft(), Sure(KEY)), (HardLabel(), BlackBox(Sure(KEY)))])
def test_verdict_on_a_served_suspect_is_the_suspects(policy, suspect, tmp_path):
    settings = {"samples": 60, "decoys": 99, "decoy_samples": 3, "seed": 1, "accelerator": "cpu", "alpha": 0.05}
    expected, _ = verify(suspect, KEY, FakeData(), **settings)
    assert expected.verdict == "supported"
    with serving(Sure(KEY), policy, directory=tmp_path, image_shape=(1, 8, 8), num_classes=7) as url:
        verdict, _ = verify(
            client(url, batch_size=128), KEY, FakeData(), evidence_path=tmp_path / "evidence.json", **settings
        )
    assert verdict == expected
    assert (tmp_path / "evidence.json").exists()


# --- what can be said without a server


@pytest.mark.parametrize(
    "url",
    [
        "", "localhost:8000", "ftp://localhost", "http://", "http://user:secret@localhost", "http://localhost/?key=secret",
        "http://localhost/#secret", "http://local host", "http://localhost:port", "http://localhost:99999", "http://[::1",
        "http://localhost\r\nX: secret",
    ],
)  # fmt: skip
def test_bad_urls(url):
    with pytest.raises(ValueError, match=r"URL of the oracle cannot be used. It must be http\[s\]://host") as error:
        HTTPOracle(url, API_KEY)
    assert "secret" not in str(error.value)


def test_api_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.delenv("MEADEF_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"it is missing. Set the environment variable MEADEF_API_KEY"):
        HTTPOracle("http://127.0.0.1:1")
    monkeypatch.setenv("MEADEF_API_KEY", "secret\nkey")
    with pytest.raises(ValueError, match="it is not such") as error:
        HTTPOracle("http://127.0.0.1:1")
    assert "secret" not in str(error.value)
    monkeypatch.setenv("MEADEF_API_KEY", API_KEY)
    oracle = HTTPOracle("http://127.0.0.1:1/", retries=0)
    with pytest.raises(OracleHTTPError, match=r"http://127.0.0.1:1/info: no answer .*Check that the server runs"):
        oracle.query(images(1))
    for text in (repr(oracle), str(vars(oracle)), str(vars(oracle._transport))):
        assert API_KEY not in text


def test_numbers_out_of_range():
    for options in ({"retries": -1}, {"timeout": 0}, {"backoff": -1}, {"timeout": float("inf")}):
        with pytest.raises(ValueError, match="must not be negative"):
            HTTPOracle("http://127.0.0.1:1", API_KEY, **options)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        HTTPOracle("http://127.0.0.1:1", API_KEY, batch_size=0)


def test_unencrypted_addresses_of_other_machines_are_warned_of(recwarn):
    HTTPOracle("https://example.org", API_KEY)
    HTTPOracle("http://127.0.0.1:1", API_KEY)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="not encrypted: everybody on the way can read the API key"):
        HTTPOracle("http://example.org", API_KEY)


def test_an_oracle_travels_to_other_processes(tmp_path):
    with serving(Linear(), directory=tmp_path / "server") as url:
        oracle = client(url, ledger=QueryLedger(tmp_path / "client"))
        answers = oracle.query(images(3))
        twin = pickle.loads(pickle.dumps(oracle))  # noqa: S301 - our own
        assert torch.equal(twin.query(images(3)), answers)
        assert len(twin.query(images(2, seed=2))) == 2
    assert oracle.ledger.totals() == Totals(5, 8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**31), st.booleans())
def test_tensors_travel_unchanged(shape, seed, hard):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = (1e4 * x).long() if hard else x
    packed = pack(x)
    assert torch.equal(unpack(packed["shape"], packed["data"], x.dtype), x)
    assert len(packed["data"]) <= message_bytes(x.numel(), x.dtype)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 200), st.floats(0, 5), st.integers(0, 7) | st.none(), st.booleans())
def test_honest_probabilities_pass(seed, classes, scale, decimals, top):
    logits = scale * torch.randn(8, classes, generator=torch.Generator().manual_seed(seed))
    chain = [TopK(2)] if top else [Soft()]
    answers = Compose([*chain, *([] if decimals is None else [Rounded(decimals)])])(logits)
    check_answers(answers, "soft", classes)


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        ([[0.5, 0.5123]], "soft", "sum to more than 1"),
        ([[0.55, 0.55]], "soft", "sum to more than 1"),  # two decimals cannot add a tenth
        ([[-0.1, 0.5]], "topk", "outside"),
        ([[1.1, 0.0]], "soft", "outside"),
        ([[float("nan"), 0.0]], "soft", "NaN or infinite"),
        ([[float("inf"), 0.0]], "feature", "NaN or infinite"),
        ([2], "hard", "labels outside 0 to 1"),
        ([-1], "hard", "labels outside 0 to 1"),
    ],
)
def test_answers_that_are_none(answers, kind, message):
    with pytest.raises(ValueError, match=message):
        check_answers(torch.tensor(answers), kind, 2)


def test_features_may_be_anything_finite():
    check_answers(torch.tensor([[-5.0, 7.0]]), "feature", 2)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("model", "kind", "num_classes", "image_shape", "max_rows"), _JSON)
    )
)
def test_no_made_up_description_is_believed(value):
    with pytest.raises(ValueError, match=r"model|kind|image_shape|num_classes|max_rows"):
        ServedModel.from_json({"kind": "none", **value})
