"""What a mistyped configuration is answered with, from the commands' own parsers."""

import pytest
from jsonargparse import ArgumentError

from meadef_lightning.experiment.judge import verify_parser
from meadef_lightning.experiment.load import experiment_parser
from meadef_lightning.experiment.messages import LightningParser, allowed, readable, suggestion
from meadef_lightning.experiment.serve import serve_parser

VICTIM = {"class_path": "meadef_lightning.victims.SupervisedVictim", "init_args": {"network": "DigitsCNN"}}
NETWORK = {"class_path": "meadef_lightning.victims.networks.DigitsCNN"}
BASE = {
    "experiment": "x",
    "data": {"class_path": "meadef_lightning.data.DigitsDataModule"},
    "victim": {"model": {"class_path": VICTIM["class_path"], "init_args": {"network": NETWORK}}},
    "watermark": {"key": {"public_secret": "a"}},
}


def said(parser, config):
    with pytest.raises(ArgumentError) as stop:
        parser.parse_object(config)
    return str(stop.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extracton": []}, "there is no option 'extracton'; did you mean 'extraction'? There are "),
        ({"seeds": 0}, "seeds: must be a list, e.g. [a, b], got 0"),
        ({"verification": {"samples": "many"}}, "verification.samples: must be an int, got many"),
        ({"data": {"class_path": "DigitDataModule"}}, "'DigitDataModule' names no SplitDataModule; did you mean 'DigitsDataModule'?"),
        ({"data": VICTIM}, "data: meadef_lightning.victims.SupervisedVictim is no SplitDataModule. There are "),
        ({"data": {"class_path": "meadef_lightning.data.Digits"}}, "meadef_lightning.data has no 'Digits'; did you mean 'Digits"),
        (
            {"victim": {"model": {"class_path": VICTIM["class_path"], "init_args": {"netwrok": NETWORK}}}},
            "victim.model: there is no option 'netwrok'; did you mean 'network'? There are ",
        ),
        (
            {
                "removal": [
                    {
                        "name": "a",
                        "method": {"class_path": "meadef_lightning.removal.FineTuning", "init_args": {"labels": "sfot"}},
                    }
                ]
            },
            "removal: method: labels: must be one of 'true', 'model' (got sfot)",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line_with_its_place_and_what_would_be_right(change, message):
    text = said(experiment_parser(exit_on_error=False), {**BASE, **change})
    assert message in text
    assert "\n" not in text
    assert "Union" not in text


def test_what_a_constructor_refuses_is_told_without_the_types_that_were_tried():
    parser = serve_parser(exit_on_error=False)
    config = {
        "checkpoint": "x",
        **{k: BASE[k] for k in ("data",)},
        "policy": {"class_path": "TopK", "init_args": {"k": 0}},
    }
    with pytest.raises(ValueError, match="Union") as stop:
        parser.instantiate(parser.parse_object(config))
    assert readable(str(stop.value)) == "k must be at least 1, got 0."


def test_other_messages_stay_as_they_are():
    for text in ("alpha=2 must lie in (0, 1).", "a\n  b", ""):
        assert readable(text) == text


def test_the_program_ends_with_two_and_without_a_list_of_all_options(capsys):
    with pytest.raises(SystemExit) as stop:
        verify_parser(prog="meadef verify").parse_args(
            ["--key", "k", "--suspct", "x", "--suspect", "x", "--data", "DigitsDataModule"]
        )
    assert stop.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "meadef verify: unrecognized arguments: --suspct x; did you mean '--suspect'?"
    assert second == "Every option is explained by: meadef verify --help"


def test_lightnings_parser_speaks_alike(capsys):
    parser = LightningParser(prog="meadef fit")
    parser.add_argument("--epochs", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--epoch_count", "3"])
    assert "did you mean '--epochs'?" in capsys.readouterr().err


def test_a_name_like_it_is_suggested_or_nothing():
    assert suggestion("max_epoch", ["devices", "max_epochs"]) == "; did you mean 'max_epochs'?"
    assert suggestion("digits", ["Other", "DigitsDataModule"]) == "; did you mean 'DigitsDataModule'?"
    assert suggestion("zzz", ["devices"]) == suggestion("", ["a"]) == "."


def test_long_lists_are_cut():
    assert allowed([]) == ""
    assert allowed(["b", "a", "b"], "It takes") == " It takes a, b."
    assert allowed(map(str, range(100, 120))).endswith("111 and 8 more.")
