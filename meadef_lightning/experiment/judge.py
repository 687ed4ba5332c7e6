"""``meadef verify``: one suspect, one key, one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import make_directory, write_json_atomic
from meadef_lightning.experiment.gallery import verdict_figure
from meadef_lightning.experiment.render import format_p
from meadef_lightning.experiment.spec import VerificationSpec
from meadef_lightning.experiment.stages import MODEL, read_weights
from meadef_lightning.oracle import HTTPOracle, QueryLedger
from meadef_lightning.quiet import quiet
from meadef_lightning.verification import Verdict, verify
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.watermark import WatermarkKey

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from rich.table import Table


def verify_parser(**kwargs: Any) -> ArgumentParser:
    """Makes the parser of ``meadef verify``."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        **kwargs,
        description="Judges a suspect: watermark success on fresh samples, matched controls, exact rank among all decoy keys; ends in "
        "supported, inconclusive or not supported, and an evidence file that can be checked offline.",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML with these options.")
    parser.add_argument("--key", type=str, required=True, help="Key file of the owner.")
    parser.add_argument(
        "--suspect",
        type=str,
        required=True,
        help="A stage directory of `meadef run`, a Lightning checkpoint or state dict (weights are read without unpickling code), "
        "a TorchScript file (*.torchscript, *.ts), or the URL of a server started by `meadef serve` (the key is read from MEADEF_API_KEY; "
        "answers are kept in the output directory, so that nothing is asked twice).",
    )
    parser.add_argument(
        "--model",
        type=str,
        help="YAML whose `model:` names the suspect's class_path and init_args. Default: the config.yaml in or above the suspect's "
        "directory; read it before you trust it, since it names classes to import.",
    )
    parser.add_argument(
        "--reference",
        type=str,
        help="A model trained without regard to the key (like --suspect); every key is compared above what it answers, which makes the "
        "test more powerful.",
    )
    parser.add_subclass_arguments(SplitDataModule, "data", required=True)
    parser.add_class_arguments(VerificationSpec, "verification")
    parser.add_argument("--output", type=str, default="runs/verify", help="Directory of evidence.json and the figure.")
    return parser


def load_suspect(path: Path, model: Path | None, data: SplitDataModule) -> nn.Module:
    """Loads a suspect from a stage directory, a checkpoint or a TorchScript file.

    Args:
        path: The suspect.
        model: YAML with a ``model:`` section, or ``None`` to look beside the checkpoint.
        data: Data module that tells the sizes of the network.

    Returns:
        The suspect in eval mode, on CPU.

    Raises:
        MisconfigurationException: If something is missing, damaged or unsafe.
    """
    checkpoint = path / MODEL if path.is_dir() else path
    if not checkpoint.is_file():
        raise MisconfigurationException(
            f"There is no suspect at {checkpoint}. Give a stage directory of `meadef run`, or the path of a checkpoint."
        )
    if checkpoint.suffix in (".torchscript", ".ts"):
        try:
            scripted: nn.Module = torch.jit.load(checkpoint, map_location="cpu")  # type: ignore[no-untyped-call, unused-ignore]
            return scripted.eval()
        except RuntimeError as error:
            raise MisconfigurationException(f"{checkpoint} is not a TorchScript file that can be read.") from error
    if model is None:
        beside = [parent / "config.yaml" for parent in (path, *list(checkpoint.absolute().parents)[:2])]
        model = next((file for file in beside if file.is_file()), None)
        if model is None:
            raise MisconfigurationException(
                f"Found no config.yaml beside {checkpoint} that says which model it is. Give one with --model: a YAML with "
                "model: {class_path: ..., init_args: {...}}."
            )
    suspect = _build(model)
    if isinstance(suspect, Classifier):
        suspect.build_network(data.num_classes, data.image_shape[0])
    return read_weights(suspect, checkpoint)


def _build(file: Path) -> LightningModule:
    from jsonargparse import ArgumentError, ArgumentParser

    try:
        section = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MisconfigurationException(f"Cannot read the model's configuration {file}: {error}") from error
    if not isinstance(section, Mapping) or not isinstance(section.get("model"), Mapping):
        raise MisconfigurationException(f"{file} has no `model:` section with class_path and init_args.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    try:
        built: LightningModule = parser.instantiate(parser.parse_object({"model": dict(section["model"])})).model
    except (ArgumentError, TypeError, ValueError) as error:
        raise MisconfigurationException(f"The model in {file} cannot be built: {error}") from error
    return built


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
    suspect: nn.Module | HTTPOracle
    if options.suspect.startswith(("http://", "https://")):
        suspect = HTTPOracle(options.suspect, ledger=QueryLedger(output / "queries.sqlite"))
    else:
        suspect = load_suspect(Path(options.suspect), model, data)
    settings = asdict(VerificationSpec(**options.verification.as_dict()))
    with quiet():
        reference = None
        if options.reference:
            known = load_suspect(Path(options.reference), model, data)
            _, reference = verify(known, key, data, progress_bar=True, **settings)
        verdict, responses = verify(
            suspect,
            key,
            data,
            reference=reference,
            evidence_path=output / "evidence.json",
            progress_bar=True,
            **settings,
        )
    write_json_atomic(output / "verdict.json", verdict.to_dict())
    figure = verdict_figure(responses, verdict, key, "suspect", output / "figures")
    console = Console()
    console.print(verdict_table(verdict))
    console.print(verdict.reason)
    for note in verdict.notes:
        console.print(f"Note: {note}")
    console.print(f"Evidence: {output / 'evidence.json'}, {figure}", soft_wrap=True)
    return verdict
