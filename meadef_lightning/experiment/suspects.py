"""Suspects of every kind: files of several frameworks, services behind a URL, and Python functions.

| suspect | what runs | trust |
|---|---|---|
| stage directory, Lightning checkpoint, state dict | the class that a YAML names | weights are read without unpickling code; read the YAML |
| ``*.onnx`` | ONNX Runtime, see :mod:`~meadef_lightning.experiment.onnx_suspect` | no code; extra ``onnx`` |
| ``*.ts``, ``*.torchscript`` | ``torch.jit.load`` | only with ``trust_code`` |
| ``*.pt2`` | ``torch.export.load`` | only with ``trust_code`` |
| URL of ``meadef serve`` | :class:`~meadef_lightning.oracle.HTTPOracle` | its answers are checked |
| YAML with ``http:`` | :class:`~meadef_lightning.oracle.mapped_http.MappedHTTPOracle` | its answers are checked |
| ``python:package.module:function`` | the function | only with ``trust_code`` |

PyTorch's documentation says of both its formats that a malicious file can execute code while it is loaded, and that files from
untrusted sources must never be: they are refused unless the user says that they are trusted. A suspect's file comes from an
opponent, so ask for a state dict or an ONNX file instead, or load it in a container.

A YAML may declare, beside ``model:`` (``class_path`` and ``init_args``), what the suspect takes, ``input:``
(:class:`~meadef_lightning.oracle.input_space.InputSpace`), and where its answers are, ``output:`` (index, key or attribute; the
name of an ONNX output). Without ``input:`` it gets images in the data module's normalised space.
"""

from __future__ import annotations

import importlib
import io
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.described import described
from meadef_lightning.experiment.onnx_suspect import OnnxSuspect, digest_tensor, in_batches
from meadef_lightning.experiment.weights import MODEL, build_network, read_weights
from meadef_lightning.oracle import BlackBox, HTTPOracle, QueryLedger
from meadef_lightning.oracle.input_space import ToInputSpace
from meadef_lightning.oracle.mapped_http import MappedHTTPOracle
from meadef_lightning.victims.classifier import Classifier
from meadef_lightning.victims.encoder import Encoder
from meadef_lightning.watermark.batches import pick

PYTHON = "python:"
_TORCHSCRIPT = (".ts", ".torchscript")
_PICKLED = (*_TORCHSCRIPT, ".pt2")
_YAML = (".yaml", ".yml")


class CallableSuspect:
    """Any function of a batch, as a black box for :func:`~meadef_lightning.verification.verify`.

    Args:
        function: Gets float32 ``(B, C, H, W)`` on the CPU, in the data module's normalised space; returns scores ``(B, K)`` or labels
            ``(B,)`` as a tensor, an array or lists.

    Raises:
        TypeError: If it cannot be called.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        if not callable(function):
            raise TypeError(f"A suspect must be callable, got a {type(function).__name__}.")
        self.function = function

    def query(self, x: Tensor) -> Tensor:
        """Asks the function, without gradients; raises ``ValueError`` if it returns no numbers."""
        with torch.no_grad():
            answers = self.function(x.detach().cpu())
        try:
            return torch.as_tensor(answers).to(x.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The function answered with a {type(answers).__name__} that makes no tensor ({error}). It must return scores (B, K) or "
                "labels (B,)."
            ) from error


class ExportedSuspect(nn.Module):
    """A program saved by ``torch.export.save``, on the CPU; its state is the SHA-256 of the file.

    Args:
        path: The file. Loading it may execute code that it holds.

    Raises:
        MisconfigurationException: If it cannot be loaded, or does not take one tensor.
    """

    file_sha256: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        content = path.read_bytes()  # once: what is loaded is what is hashed
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise MisconfigurationException(f"{path} is no file of torch.export.save.")
        try:
            program = torch.export.load(io.BytesIO(content))
        except Exception as error:  # torch raises many types for a file that it cannot read
            raise MisconfigurationException(
                f"torch.export.load cannot read {path} ({type(error).__name__}). It must have been saved by the same or an older "
                "version of PyTorch."
            ) from error
        names = set(program.graph_signature.user_inputs)
        inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise MisconfigurationException(f"{path} takes {len(inputs)} inputs; it must take one batch of images.")
        self.register_buffer("file_sha256", digest_tensor(content))
        # not a child: an exported program refuses train() and eval(), and is what it was exported as
        self._call = program.module().__call__
        size = inputs[0].shape[0]
        self._size = size if isinstance(size, int) else None

    @override
    def forward(self, x: Tensor) -> Any:
        """Answers a batch as the program does; one that was exported for batches of one size gets such."""
        return in_batches(self._call, x.cpu(), self._size)


class ScriptedSuspect(nn.Module):
    """A TorchScript program, on the CPU; its state is its weights and the SHA-256 of the file, which holds its code, too.

    Args:
        path: The file. Loading it may execute code that it holds.

    Raises:
        MisconfigurationException: If it cannot be loaded.
    """

    file_sha256: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        content = path.read_bytes()
        try:
            with warnings.catch_warnings():
                # PyTorch advises against the format, which is not ours to choose: a suspect comes as it is
                warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")
                self.program = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call, unused-ignore]
        except RuntimeError as error:
            raise MisconfigurationException(f"{path} is not a TorchScript file that can be read.") from error
        self.register_buffer("file_sha256", digest_tensor(content))

    @override
    def forward(self, x: Tensor) -> Any:
        """Answers a batch as the program does."""
        return self.program(x)


class _Answer(nn.Module):
    """Picks the answers out of an output."""

    def __init__(self, key: int | str) -> None:
        super().__init__()
        self.key = key

    @override
    def forward(self, output: Any) -> Any:
        return pick(output, self.key, "output")


def open_suspect(
    name: str,
    model: Path | None,
    data: SplitDataModule,
    ledger: Path,
    *,
    trust_code: bool = False,
    any_labels: bool = False,
) -> nn.Module | BlackBox | CallableSuspect:
    """Opens a suspect of any kind; see the table above.

    Args:
        name: A path, a URL, or ``python:package.module:function``.
        model: YAML that describes a file.
        data: Data module of the task.
        ledger: Where the answers of a service are kept.
        trust_code: Whether code of the suspect may be executed here.
        any_labels: Whether it may have another number of labels than the data has classes.

    Returns:
        A module in eval mode on the CPU, or a black box.

    Raises:
        MisconfigurationException: If something is missing, damaged or unsafe.
        ValueError: If a declaration cannot be right, or an API key is missing.
    """
    remote = name.startswith(("http://", "https://"))
    if (remote or name.startswith(PYTHON) or Path(name).suffix in _YAML) and model is not None:
        raise MisconfigurationException(f"--model describes a file, but {name} is none; leave it out.")
    if remote:
        return HTTPOracle(name, ledger=QueryLedger(ledger))
    if name.startswith(PYTHON):
        return _function(name, trust_code)
    if Path(name).suffix in _YAML:
        section = described(Path(name))
        mapping = section.get("http")
        if mapping is None:
            raise MisconfigurationException(
                f"{name} declares no service (`http:`). A YAML that describes a file goes to --model, the file to --suspect."
            )
        return MappedHTTPOracle(
            mapping,
            data.mean,
            data.std,
            section.get("input"),
            data.num_classes,
            QueryLedger(ledger),
        )
    return load_suspect(Path(name), model, data, trust_code=trust_code, any_labels=any_labels)


def load_suspect(
    path: Path,
    model: Path | None,
    data: SplitDataModule,
    *,
    trust_code: bool = False,
    any_labels: bool = False,
) -> nn.Module:
    """Loads a suspect from a stage directory, a checkpoint, or an ONNX, TorchScript or ``torch.export`` file.

    Args:
        path: The suspect.
        model: YAML with a ``model:`` section for weights, and ``input:`` and ``output:`` for any file; ``None`` to look for
            ``config.yaml`` beside weights.
        data: Data module that tells the sizes of the network.
        trust_code: Whether code of the suspect may be executed here.
        any_labels: Whether it may have another number of labels than the data has classes.

    Returns:
        The suspect in eval mode, on CPU.

    Raises:
        MisconfigurationException: If something is missing, damaged or unsafe.
    """
    checkpoint = path / MODEL if path.is_dir() else path
    if not checkpoint.is_file():
        raise MisconfigurationException(
            f"There is no model at {checkpoint}. Give a stage directory of `meadef run`, or the path of a checkpoint."
        )
    kind = checkpoint.suffix.lower()
    if kind in _PICKLED and not trust_code:
        raise MisconfigurationException(
            f"{checkpoint} can execute code while it is loaded, as PyTorch says of its format. Ask for a state dict or an ONNX file "
            "instead; if you trust whoever made it, or are in a container that may be lost, add --trust_code."
        )
    weights = _are_weights(checkpoint)
    if weights and model is None:
        model = _beside(path, checkpoint)
        if model is None:
            raise MisconfigurationException(
                f"Found no config.yaml beside {checkpoint} that says which model it is. Give one with --model: a YAML with "
                "model: {class_path: ..., init_args: {...}}."
            )
    section = {} if model is None else described(model)
    output = section.get("output")
    stages: list[nn.Module] = []
    if "input" in section:
        stages.append(ToInputSpace(section["input"], data.mean, data.std))
    if weights:
        stages.append(_with_weights(section, model, checkpoint, data))
    elif kind == ".onnx":
        onnx = OnnxSuspect(checkpoint, None if output is None else str(output))
        image = torch.zeros(1, *data.image_shape)
        onnx.check(
            (stages[0](image) if stages else image).shape[1:],
            None if any_labels else data.num_classes,
        )
        stages.append(onnx)
    else:
        stages.append(ExportedSuspect(checkpoint) if kind == ".pt2" else ScriptedSuspect(checkpoint))
    if output is not None and kind != ".onnx":
        stages.append(_Answer(output))
    return (stages[0] if len(stages) == 1 else nn.Sequential(*stages)).eval()


def describes_itself(path: Path) -> bool:
    """Whether a suspect is weights with a ``config.yaml`` in or above their directory that says what they are."""
    checkpoint = path / MODEL if path.is_dir() else path
    return _are_weights(checkpoint) and _beside(path, checkpoint) is not None


def _are_weights(checkpoint: Path) -> bool:
    return checkpoint.suffix.lower() not in (".onnx", *_PICKLED)


def _beside(path: Path, checkpoint: Path) -> Path | None:
    beside = [parent / "config.yaml" for parent in (path, *list(checkpoint.absolute().parents)[:2])]
    return next((file for file in beside if file.is_file()), None)


def _function(name: str, trust_code: bool) -> nn.Module | CallableSuspect:
    module, colon, attribute = name.removeprefix(PYTHON).partition(":")
    if not (module and colon and attribute):
        raise MisconfigurationException(f"{name} must have the form {PYTHON}package.module:function.")
    if not trust_code:
        raise MisconfigurationException(f"{name} imports and runs code. Read it, and add --trust_code if you trust it.")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise MisconfigurationException(
            f"Cannot import {name}: {error}. The module must be installed, or its folder on PYTHONPATH."
        ) from error
    if isinstance(found, nn.Module):
        return found.eval()
    if isinstance(found, type) or not callable(found):
        raise MisconfigurationException(f"{name} is no function of a batch of images but a {type(found).__name__}.")
    return CallableSuspect(found)


def _refuse_compressed(checkpoint: Path) -> None:
    """Refuses a checkpoint whose parts are compressed, which torch never does: a few kilobytes could become many gigabytes."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return  # a format of older versions, or damaged: torch says so
    if packed:
        raise MisconfigurationException(
            f"{checkpoint} is a compressed archive, which torch.save does not write and which may be far larger than it looks. Ask for a "
            "state dict as torch.save writes it."
        )


def _with_weights(section: Mapping[str, Any], file: Path | None, checkpoint: Path, data: SplitDataModule) -> nn.Module:
    from jsonargparse import ArgumentError

    from meadef_lightning.experiment.messages import Parser

    if not isinstance(section.get("model"), Mapping):
        raise MisconfigurationException(f"{file} has no `model:` section with class_path and init_args.")
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model", required=True)
    try:
        suspect: nn.Module = parser.instantiate(parser.parse_object({"model": dict(section["model"])})).model
    except (ArgumentError, TypeError, ValueError) as error:
        raise MisconfigurationException(f"The model in {file} cannot be built: {error}") from error
    if isinstance(suspect, (Classifier, Encoder)):
        build_network(suspect, data)
    _refuse_compressed(checkpoint)
    return read_weights(suspect, checkpoint)
