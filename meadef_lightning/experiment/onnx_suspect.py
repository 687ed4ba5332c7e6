"""Models as ONNX files, run by ONNX Runtime on the CPU.

**Trust.** A graph holds operators and numbers, no code, and operators beyond the standard ones are refused, since no library of
them is loaded. What a file can do is point elsewhere: weights may lie in other files ("external data"), and a path in a hostile
model may lead out of its folder, to a device, or into memory. So the graph is parsed first, each such path must be the plain name
of a regular file beside the model, and the bytes read there are put into the graph: ONNX Runtime is given bytes, opens no file,
and what runs is exactly what the fingerprint covers. Parser and runtime are C++ all the same, and a graph can ask for any amount of
memory: judge strangers' files in a container.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

MAX_ONNX_BYTES: Final = (2 << 30) - 1
"""What protobuf, and so a graph with all its weights, can hold."""

_TYPES: Final = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
}
_INTEGERS: Final = ("tensor(int64)", "tensor(int32)")


class OnnxSuspect(nn.Module):
    """A model in an ONNX file. Its state is the SHA-256 of the graph with all weights.

    Args:
        path: The file.
        output: Name of the output with the answers; not needed if there is only one.

    Raises:
        MisconfigurationException: If packages are missing, the file cannot be read or run, it points to files that it should not, or
            inputs and outputs are not one batch of images and one of answers.
    """

    file_sha256: Tensor

    def __init__(self, path: Path, output: str | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise MisconfigurationException(_MISSING) from error
        graph = self_contained(path)
        self.path = path
        self.register_buffer("file_sha256", digest_tensor(graph))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised, too
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a type for each of its status codes
            raise MisconfigurationException(f"ONNX Runtime cannot run {path}: {_brief(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or inputs[0].type not in _TYPES or len(inputs[0].shape) != 4:
            raise MisconfigurationException(
                f"{path} must have one input, a batch of images in floating point, but takes {_listed(inputs)}."
            )
        names = [one.name for one in outputs]
        if (len(outputs) != 1) if output is None else (output not in names):
            raise MisconfigurationException(
                f"{path} gives {_listed(outputs)}. Name the one with the answers in the suspect's YAML: `output: {names[0]}`."
            )
        self._input, self._output = inputs[0], outputs[0] if output is None else outputs[names.index(output)]

    def check(self, image_shape: Sequence[int], num_classes: int | None) -> None:
        """Compares what the file declares with what it will be asked.

        Args:
            image_shape: Shape of an image, three sizes, as it will be given.
            num_classes: Classes of the task; ``None`` if its labels are found out later.

        Raises:
            MisconfigurationException: If they do not fit.
        """
        declared = list(self._input.shape[1:])
        if any(isinstance(size, int) and size != asked for size, asked in zip(declared, image_shape, strict=True)):
            raise MisconfigurationException(
                f"{self.path} takes images of shape {_dims(declared)}, but gets {_dims(image_shape)}. Declare what it takes in a YAML "
                "for --model, e.g. `input: {channels: rgb, size: [32, 32], mean: [0.5], std: [0.5]}`."
            )
        shape, kind = self._output.shape, self._output.type
        scores = kind in _TYPES and len(shape) == 2
        if not scores and not (kind in _INTEGERS and len(shape) == 1):
            raise MisconfigurationException(
                f"{self.path} answers with {_listed([self._output])}; it must be scores (B, K) in floating point or integer labels (B,)."
            )
        if scores and num_classes is not None and isinstance(shape[1], int) and shape[1] != num_classes:
            raise MisconfigurationException(
                f"{self.path} answers with {shape[1]} classes, but the data has {num_classes}. Find out which is which from its natural "
                "answers with --align_labels, or give the data of its task."
            )

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Answers ``(B, …)`` images with scores or labels, on the device of ``x``; raises ``ValueError`` where it cannot."""
        size = self._input.shape[0]
        return in_batches(self._run, x, size if isinstance(size, int) else None).to(x.device)

    def _run(self, x: Tensor) -> Tensor:
        images = x.detach().cpu().to(_TYPES[self._input.type]).contiguous().numpy()
        try:
            answers = self._session.run([self._output.name], {self._input.name: images})[0]
        except Exception as error:  # see above
            raise ValueError(f"{self.path} cannot answer {len(x)} images: {_brief(error)}") from error
        return torch.from_numpy(answers)


_MISSING = 'ONNX files need ONNX Runtime: pip install "meadef-lightning[onnx]".'


def self_contained(path: Path) -> bytes:
    """Reads an ONNX file and puts the weights that lie beside it into the graph.

    Args:
        path: The file.

    Returns:
        The graph, serialised, without external data.

    Raises:
        MisconfigurationException: If the file is none, too large, or points to files that it should not.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise MisconfigurationException(_MISSING) from error
    room = MAX_ONNX_BYTES
    content = _read(path, 0, None, room, follow=True)
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise MisconfigurationException(f"{path} is no ONNX file: {_brief(error)}") from error
    room -= len(content)
    for tensor in _tensors(model, onnx.TensorProto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        location = facts.get("location", "")
        if not re.fullmatch(r"[^/\\:\x00-\x1f]{1,255}", location) or location in (".", ".."):
            raise MisconfigurationException(
                f"{path} keeps weights in {location[:100]!r}, which is not the plain name of a file beside it. Refused: the path of "
                "a hostile model may lead anywhere. Save the model with its weights inside, or in a file beside it."
            )
        numbers = [facts.get(name, "0") for name in ("offset", "length")]
        if not all(re.fullmatch(r"[0-9]{1,15}", number) for number in numbers):
            raise MisconfigurationException(f"{path} keeps weights at no valid place in {location!r}: {numbers}.")
        length = int(numbers[1]) if "length" in facts else None
        tensor.raw_data = _read(path.parent / location, int(numbers[0]), length, room, follow=False)
        room -= len(tensor.raw_data)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    graph: bytes = model.SerializeToString()
    return graph


def in_batches(ask: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    """Asks a model that may take batches of one size only; the last one is filled up with its last row.

    Args:
        ask: Answers a batch, one row per row.
        x: ``(B, …)``, at least one row.
        size: The batch's size; ``None`` for any.

    Returns:
        The answers to ``x``.
    """
    if size is None or len(x) == size:
        return ask(x)
    answers = []
    for part in torch.split(x, size):
        rest = part[-1:].expand(size - len(part), *part.shape[1:])
        answers.append(ask(torch.cat([part, rest]))[: len(part)])
    return torch.cat(answers)


def digest_tensor(content: bytes) -> Tensor:
    """Returns the SHA-256 of some bytes as uint8, shape ``(32,)``: state that puts a file into a model's fingerprint."""
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """All tensors of a graph, wherever they are: subgraphs, functions, sparse tensors, attributes."""
    waiting = [message]
    while waiting:
        part = waiting.pop()
        if isinstance(part, kind):
            yield part
            continue
        for description, value in part.ListFields():
            if description.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)


def _read(path: Path, offset: int, length: int | None, room: int, *, follow: bool) -> bytes:
    """Bytes of a regular file; links are followed only if the user named the file."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not follow and path.is_symlink():
            raise MisconfigurationException(f"{path} holds weights but is a link. Refused: put the file itself there.")
        number = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
        with open(number, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
            facts = os.fstat(number)
            wanted = max(0, facts.st_size - offset) if length is None else length
            if not stat.S_ISREG(facts.st_mode) or offset + wanted > facts.st_size:
                raise MisconfigurationException(
                    f"{path} is no regular file, or shorter than the {offset + wanted} bytes needed."
                )
            if wanted > room:
                raise MisconfigurationException(f"The model and its weights take more than {MAX_ONNX_BYTES} bytes.")
            file.seek(offset)
            return file.read(wanted)
    except OSError as error:
        raise MisconfigurationException(f"Cannot read {path}: {error.strerror}.") from error


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(f"{one.name[:60]!r} {one.type} {_dims(one.shape)}" for one in values) or "nothing"


def _dims(shape: Sequence[Any]) -> str:
    return f"({', '.join(str(size)[:20] for size in shape)})"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
