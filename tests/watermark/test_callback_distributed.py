"""Two processes on the CPU: DDP and FSDP2, against twins with the term written by hand under the same strategy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import ALONE, run_workers, two_ranks

HERE = Path(__file__).parent
TIMEOUT = 300  # seconds for all scenarios; about 30 on a free core

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs torch with gloo"
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Starts the two processes as torchrun would, and returns what each rank found."""
    folder = tmp_path_factory.mktemp("distributed")
    here = {"PYTHONPATH": os.pathsep.join([str(HERE), ALONE["PYTHONPATH"]])}
    workers = [({**env, **here}, []) for env in two_ranks()] + [({**ALONE, **here}, ["spawned"])]
    logs = run_workers(HERE / "distributed_worker.py", folder, workers, TIMEOUT)
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        found.setdefault(path.name.split(".")[0], []).append(json.loads(path.read_text()))
    found["log"] = [logs]
    return found


@pytest.fixture
def both(results, request) -> list[dict[str, Any]]:
    """What the two ranks found in the scenario that the test names."""
    name = request.param
    got = results.get(name, [])
    assert len(got) == (1 if name == "spawned" else 2), f"{name} did not finish: {results['log']}"
    errors = [rank["error"] for rank in got if "error" in rank]
    assert not errors, errors[0]
    return got


def scenario(*names: str):
    return pytest.mark.parametrize("both", names, indirect=True)


@scenario(
    "plain", "late_start", "mixed_precision_with_accumulation", "static_graph", "a_head_of_the_term_alone", "sharded"
)
def test_equals_the_term_written_by_hand(both):
    for rank in both:
        assert rank["module"] == rank["twin"]
        assert rank["module"] != rank["plain"]
    assert both[0]["parameters"] == both[1]["parameters"]
    assert both[0]["draws"] == both[1]["draws"] > 0
    assert both[0]["first_draw"] != both[1]["first_draw"]  # every rank has samples of its own


@scenario("spawned")
def test_a_training_that_spawns_its_processes(both):
    (result,) = both
    assert result["spawned"] == result["single"]
    assert result["logged"] > 0


@scenario("manual_optimisation")
def test_manual_optimisation(both):
    assert all(rank["module"] == rank["twin"] for rank in both)
    assert both[0]["parameters"] == both[1]["parameters"]


@scenario("mgda")
def test_mgda_finds_the_same_weights_on_all_ranks(both):
    for name, first in both[0].items():
        assert len(first["alphas"]) == 12
        assert len({tuple(alphas) for alphas in first["alphas"]}) == (4 if name == "MGDA3" else 12)
        assert first == both[1][name]


@scenario("a_class_that_one_rank_meets_late")
def test_all_ranks_start_together(both):
    assert [rank["draws"] for rank in both] == [3, 3]
    assert [rank["batches"] for rank in both] == [6, 6]


@scenario("a_class_that_one_rank_never_meets")
def test_all_ranks_stop_with_the_error_when_one_has_no_source_sample(both):
    assert all("no sample of at least one of the key's source classes" in rank["message"] for rank in both)


@scenario("validation")
def test_validation_averages_over_the_ranks(both):
    mean = sum(rank["own"] for rank in both) / 2
    assert [rank["logged"] for rank in both] == pytest.approx([mean, mean])


@scenario("surrogate", "sharded_surrogate")
def test_every_rank_trains_a_student_and_the_mean_is_logged(both):
    mean = sum(rank["own"] for rank in both) / 2
    assert [rank["logged"] for rank in both] == pytest.approx([mean, mean])
    assert all(rank["times"] == 2 and rank["watched"] == rank["alone"] for rank in both)


@scenario("sharded_validation")
def test_validation_of_a_sharded_model(both):
    assert 0 <= both[0]["logged"] == both[1]["logged"] <= 1


@scenario("resumed", "sharded_resumed", "sharded_resumed_with_the_mixin")
def test_resumed_equals_uninterrupted(both):
    for rank in both:
        assert rank["resumed"] == rank["whole"]
        assert rank["half"] != rank["whole"]


@scenario("sharded_mgda")
def test_mgda_on_sharded_parameters_is_refused_with_the_remedy(both):
    for rank in both:
        assert len(rank["messages"]) == 2  # callback and mixin
        for message in rank["messages"]:
            assert "MGDA needs whole gradients, which ModelParallelStrategy shards" in message
            assert "Use balancing=Fixed(...)" in message
