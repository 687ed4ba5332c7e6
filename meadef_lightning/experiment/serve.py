"""``meadef serve``: one model, behind HTTP, under a policy and a budget."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from meadef_lightning.data.base import SplitDataModule
from meadef_lightning.experiment.artifacts import make_directory, write_text_atomic
from meadef_lightning.experiment.suspects import load_suspect
from meadef_lightning.extraction.pools import pixel_range
from meadef_lightning.oracle import Policy
from meadef_lightning.oracle.clients import ServerLimits, read_api_keys

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

KEYS_VARIABLE = "MEADEF_API_KEYS"
KEYS_FILE = "api-keys.txt"


def serve_parser(**kwargs: Any) -> ArgumentParser:
    """Makes the parser of ``meadef serve``."""
    from jsonargparse import ActionConfigFile

    from meadef_lightning.experiment.messages import Parser

    parser = Parser(
        **kwargs,
        description="Serves a model over HTTP as its owner would: clients have an API key, a budget of distinct inputs and a rate, and "
        "get what the policy gives away. Thefts and verdicts reach it through meadef_lightning.oracle.HTTPOracle(URL); anybody "
        "else finds the schema at URL/docs. Accounts are kept in SQLite files: a server that is killed goes on where it was.",
        epilog="Example: meadef serve --checkpoint runs/EXPERIMENT/victim --data DigitsDataModule --policy TopK "
        "--policy.k 3 --limits.budget 10000. Then, where the client runs: export MEADEF_API_KEY=... with a key from the keys file.",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML with these options.")
    parser.add_argument(
        "--checkpoint",
        type=str,
        required=True,
        help="A stage directory of `meadef run`, a Lightning checkpoint or state dict (weights are read without unpickling code), "
        "an ONNX file (*.onnx; needs the extra `onnx`), or with --trust_code a TorchScript (*.torchscript, *.ts) or torch.export (*.pt2) "
        "file.",
    )
    parser.add_argument(
        "--trust_code",
        action="store_true",
        help="Load formats that can execute code while they are loaded.",
    )
    parser.add_argument(
        "--model",
        type=str,
        help="YAML whose `model:` names the model's class_path and init_args. Default: the config.yaml in or above the checkpoint's "
        "directory; read it before you trust it, since it names classes to import.",
    )
    parser.add_subclass_arguments(
        SplitDataModule,
        "data",
        required=True,
        help="Data the model was trained on. Only classes, shape and normalisation are used; images are read only where the data "
        "module has to measure or count these.",
    )
    parser.add_subclass_arguments(
        Policy,
        "policy",
        required=False,
        help="What is given away, e.g. TopK, HardLabel (default: Soft, all probabilities).",
    )
    parser.add_class_arguments(ServerLimits, "limits")
    parser.add_argument(
        "--api_keys",
        type=str,
        help="File of API keys, a line NAME:KEY for each client; NAME names the client's ledger. Default: the environment variable "
        f"{KEYS_VARIABLE} (NAME:KEY,NAME:KEY), or else {KEYS_FILE} in --output, where a key is put if there is none yet.",
    )
    parser.add_argument("--output", type=str, default="runs/serve", help="Directory of the clients' ledgers.")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="Address to listen on; this machine only by default."
    )
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 takes a free one.")
    parser.add_argument("--device", type=str, default="cpu", help="Where the model runs, e.g. cuda.")
    return parser


def find_api_keys(file: str | None, output: Path) -> tuple[dict[str, str], str]:
    """Finds the API keys: in a file, in the environment, or in the output directory, where one is made if need be.

    Args:
        file: The keys file, if it was named.
        output: The output directory, which exists.

    Returns:
        API key of each client by name, and where they come from.

    Raises:
        MisconfigurationException: If the file cannot be read.
        ValueError: If it has another form; the message shows no key.
    """
    if file is None and (text := os.environ.get(KEYS_VARIABLE)):
        source = f"the environment variable {KEYS_VARIABLE}"
        return read_api_keys(text, source), source
    path = output / KEYS_FILE if file is None else Path(file)
    if file is None and not path.exists():
        write_text_atomic(path, f"client:{secrets.token_urlsafe(32)}\n", mode=0o600)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(
            f"Cannot read the API keys in {path} ({type(error).__name__}). It must be a text file with a line NAME:KEY for each client."
        ) from None
    return read_api_keys(text, str(path)), str(path)


def value_range(data: SplitDataModule) -> tuple[float, float]:
    """The values that a query may have.

    Args:
        data: Data with the model's normalisation.

    Returns:
        Lowest and highest value of a normalised pixel in any channel, and half as much again on either side: attacks
        and autoencoders may overshoot a little, images that were not normalised (0 to 255) do so by far.
    """
    black, white = pixel_range(data)
    low, high = float(black.min()), float(white.max())
    slack = (high - low) / 2
    return low - slack, high + slack


def serve(options: Namespace) -> None:
    """Runs ``meadef serve`` with parsed options, until it is interrupted.

    Raises:
        MisconfigurationException: If packages are missing, or the model or the keys cannot be read.
        OSError: If the port is taken.
        ValueError: If model and data do not fit.
    """
    try:
        from meadef_lightning.oracle.server import create_app, listen, server
    except ModuleNotFoundError as error:
        raise MisconfigurationException(str(error)) from error  # it says what to install

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs between devices
        reason = str(error).splitlines()[0]
        raise MisconfigurationException(
            f"--device {options.device} cannot be used here ({reason}). Give cpu, or a device that this PyTorch finds, e.g. cuda."
        ) from error
    output = make_directory(Path(options.output))
    built = serve_parser().instantiate(options)
    data, policy = built.data, built.policy
    data.prepare_data()
    keys, source = find_api_keys(options.api_keys, output)
    app = create_app(
        load_suspect(
            Path(options.checkpoint),
            Path(options.model) if options.model else None,
            data,
            trust_code=options.trust_code,
        ),
        policy,
        image_shape=data.image_shape,
        # an encoder's answers are as wide as its features
        num_classes=None if policy is not None and policy.kind == "feature" else data.num_classes,
        api_keys=keys,
        directory=output,
        limits=built.limits,
        value_range=value_range(data),
        device=options.device,
    )
    if options.host not in ("127.0.0.1", "::1", "localhost"):
        rank_zero_warn(
            f"Listening on {options.host} without encryption: put a proxy that speaks TLS in front, or API keys can be read on the way."
        )
    listener = listen(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    kind = "soft" if policy is None else policy.kind
    console.print(
        f"Serving {kind} answers at http://{host}:{listener.getsockname()[1]} (schema: /docs). Ctrl-C ends it."
    )
    console.print(f"Ledgers: {output}/NAME.sqlite. API keys: {source}; clients take theirs from MEADEF_API_KEY.")
    with listener:
        server(app).run(sockets=[listener])
