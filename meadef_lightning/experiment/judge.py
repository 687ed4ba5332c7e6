"""``meadef verify``: one suspect, one key, one verdict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from meadef_lightning import processes
from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.experiment.gallery import verdict_figure
from meadef_lightning.experiment.render import format_p
from meadef_lightning.experiment.spec import VerificationSpec
from meadef_lightning.experiment.suspects import describes_itself, load_suspect, open_suspect
from meadef_lightning.experiment.tracking import Tracking
from meadef_lightning.oracle import BlackBox
from meadef_lightning.quiet import quiet
from meadef_lightning.verification import Verdict, verify
from meadef_lightning.verification.relabelling import RelabelledModule, relabelled
from meadef_lightning.verification.suspect import Queryable
from meadef_lightning.watermark import WatermarkKey

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.table import Table

LABELS = "labels.json"


def verify_parser(**kwargs: Any) -> ArgumentParser:
    """Makes the parser of ``meadef verify``."""
    from jsonargparse import ActionConfigFile

    from meadef_lightning.experiment.messages import Parser

    parser = Parser(
        **kwargs,
        description="Judges a suspect: watermark success on fresh samples, matched controls, exact rank among all decoy keys; ends in "
        "supported, inconclusive or not supported, and an evidence file that can be checked offline.",
        epilog="Examples: meadef verify --key watermark.key.json --suspect runs/theirs/soft --data DigitsDataModule. With images of your own: "
        "--data ImageFolderDataModule --data.root images. Behind a URL, its classes in another order: --suspect https://api.example.org "
        "--align_labels. Then, for a judge: meadef evidence bundle runs/verify --key watermark.key.json --output evidence.zip",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML with these options.")
    parser.add_argument("--key", type=str, required=True, help="Key file of the owner.")
    parser.add_argument(
        "--suspect",
        type=str,
        required=True,
        help="One of: a stage directory of `meadef run`; a Lightning checkpoint or state dict (weights are read without unpickling "
        "code); an ONNX file (*.onnx; needs the extra `onnx`); with --trust_code a TorchScript (*.torchscript, *.ts) or torch.export "
        "(*.pt2) file, or python:package.module:function, which answers a batch of images; the URL of a server started by `meadef "
        "serve` (the key is read from MEADEF_API_KEY); or a YAML whose `http:` declares how somebody else's service is asked (see "
        "meadef_lightning.oracle.mapping). Answers of services are kept in the output directory, so that nothing is asked twice.",
    )
    parser.add_argument(
        "--model",
        type=str,
        help="YAML that describes a suspect's file. `model:` names the class_path and init_args that weights belong to (default: the "
        "config.yaml in or above the suspect's directory; read it before you trust it, since it names classes to import). For any "
        "file, `input:` declares what the suspect takes if not images as the data module normalises them (channels, size, scale, mean, "
        "std, channels_last), and `output:` where the answers are if it gives several.",
    )
    parser.add_argument(
        "--trust_code",
        action="store_true",
        help="Load suspects that can execute code while they are loaded or asked: TorchScript, torch.export, Python functions. For those "
        "from an opponent, only in a container without secrets.",
    )
    parser.add_argument(
        "--align_labels",
        action="store_true",
        help="The suspect may number the classes in another order, or answer several with one label: find out which label stands for "
        "what from its answers to natural test samples, before anything else is asked. Refuses where these tell too little.",
    )
    parser.add_argument(
        "--reference",
        action="append",
        type=str,
        help="A model trained without regard to the key (a file, described by the config.yaml beside it or else by --model); every key is "
        "compared above what it answers, which makes the test more powerful. Repeat it for several: the mean of theirs is taken.",
    )
    parser.add_subclass_arguments(SplitDataModule, "data", required=True)
    parser.add_class_arguments(VerificationSpec, "verification")
    parser.add_argument(
        "--output",
        type=str,
        default="runs/verify",
        help="Directory of evidence.json and the figure; evidence of another command that is there is not overwritten.",
    )
    Tracking.add_arguments(parser)
    return parser


def verdict_table(verdict: Verdict) -> Table:
    """Returns a verdict as a compact table."""
    from rich.table import Table

    low, high = verdict.wsr_ci
    table = Table(title=f"Verdict: {verdict.verdict}", show_header=False, title_justify="left")
    rows = {
        "watermark success rate": f"{verdict.wsr:.1%}  [{low:.1%}, {high:.1%}], {verdict.samples} samples",
        "on matched controls": f"{verdict.wfpr:.1%}",
        "p among decoy keys": f"{format_p(verdict.decoy_p)}  ({verdict.decoys} decoys, {verdict.decoy_method}), alpha = {verdict.alpha:g}",
        "p against controls": f"{format_p(verdict.mcnemar_p)}  (exact McNemar)",
        "accuracy": f"{verdict.natural_accuracy:.1%}",
        "paper's 30 % rule": "exceeded" if verdict.paper_threshold["exceeded"] else "not exceeded",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def judge_suspect(options: Namespace) -> Verdict:
    """Runs ``meadef verify`` with parsed options; prints the verdict and writes evidence, result and figure."""
    from rich.console import Console

    key = WatermarkKey.load(options.key)
    output = make_directory(Path(options.output))
    data = verify_parser().instantiate(options).data
    data.prepare_data()
    data.setup()
    if data.num_classes != key.num_classes:
        raise MisconfigurationException(
            f"The key is for {key.num_classes} classes, the data has {data.num_classes}. Use the data the key was made for."
        )
    model = Path(options.model) if options.model else None
    suspect: nn.Module | BlackBox | Queryable = open_suspect(
        options.suspect,
        model,
        data,
        output / "queries.sqlite",
        trust_code=options.trust_code,
        any_labels=options.align_labels,
    )
    labels = None
    settings = asdict(VerificationSpec(**options.verification.as_dict()))
    with quiet():
        if options.align_labels:
            suspect, labels = relabelled(
                suspect,
                data.tensors("test"),
                data.num_classes,
                batch_size=settings["batch_size"],
                device=processes.device_of({"devices": 1}),  # where verify() will ask
            )
        references = []
        given = options.reference or []
        for path in map(Path, [given] if isinstance(given, str) else given):  # a YAML may name a single one
            described = None if describes_itself(path) else model
            known = load_suspect(path, described, data, trust_code=options.trust_code)
            if labels is not None and labels.merged:
                known = RelabelledModule(known, labels.coarsening())
            references.append(verify(known, key, data, progress_bar=True, **settings)[1])
        verdict, responses = verify(
            suspect,
            key,
            data,
            reference=references or None,
            evidence_path=output / "evidence.json",
            progress_bar=True,
            **settings,
        )
    write_json_atomic(output / "verdict.json", verdict.to_dict())
    if labels is not None:
        write_json_atomic(output / LABELS, labels.to_dict())
    else:  # those of an earlier run here belong to another suspect
        (output / LABELS).unlink(missing_ok=True)
    figure = verdict_figure(responses, verdict, key, "suspect", output / "figures")
    config = options.clone()
    tracking = Tracking.pop(config)
    config.pop("config", None)  # the files' names; what they say is in the rest
    tracker = tracking.tracker(output, "verify", config.as_dict())
    tracker.verdict(Path(options.suspect).name, verdict, output, key)
    console = Console()
    console.print(verdict_table(verdict))
    console.print(verdict.reason)
    if labels is not None:
        console.print(labels.describe())
    for note in verdict.notes:
        console.print(f"Note: {note}")
    console.print(f"Evidence: {output / 'evidence.json'}, {figure}", soft_wrap=True)
    return verdict
