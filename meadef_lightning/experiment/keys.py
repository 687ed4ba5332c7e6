"""``meadef key``: draw a key from an owner secret, show what is public of it, commit to it before training, repeat its draw.

A secret never stands on a command line, where the shell's history and every process list would show it; it comes from an environment
variable, a file that only its owner can read, or the terminal. No message repeats what was typed in its place.
"""

from __future__ import annotations

import argparse
import getpass
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meadef_lightning.data.stored import read_split
from meadef_lightning.experiment.artifacts import file_sha256, make_directory, write_bytes_atomic
from meadef_lightning.verification.commitment import (
    Commitment,
    free_choices,
    repeat_draw,
    secret_commitment,
    timestamp_request,
)
from meadef_lightning.verification.fingerprints import tensors_fingerprint
from meadef_lightning.verification.signing import (
    MAX_DOCUMENT_BYTES,
    load_signing_key,
    make_signing_key,
    read_private,
)
from meadef_lightning.watermark.combiner_spec import default_combiners
from meadef_lightning.watermark.key import KeySpace, WatermarkKey

if TYPE_CHECKING:
    from meadef_lightning.data.base import SplitDataModule

_LEAST_SECRET = 16
_REMEDY = "Give it with --secret-env NAME (an environment variable), --secret-file FILE (mode 0600), or type it when you are asked."


def key_command(arguments: list[str]) -> None:
    """Runs ``meadef key``.

    Args:
        arguments: What follows it on the command line.

    Raises:
        ValueError: If an option does not fit, or a secret stands on the command line; the message does not repeat it.
        OSError: If a file cannot be written, or would be overwritten.
    """
    options, rest = _parser().parse_known_args(arguments)
    refuse_secrets(rest)
    if rest and options.action != "commit":
        # not repeated: it may be a secret, typed in the wrong place
        raise ValueError(f"meadef key {options.action} does not know {len(rest)} of these words; see --help.")
    actions = {"draw": _draw, "show": _show, "check": _check, "sign-key": _sign_key}
    if options.action == "commit":
        _commit(options, rest)
    else:
        actions[options.action](options)


def refuse_secrets(words: Sequence[str]) -> None:
    """Refuses a secret on the command line, without repeating it.

    Args:
        words: What no parser knew.

    Raises:
        ValueError: If one of them is ``--secret``.
    """
    if any(word.partition("=")[0] in ("--secret", "--owner-secret", "--owner_secret") for word in words):
        raise ValueError(
            "A secret must not stand on the command line, where the shell's history and the list of processes show it. Choose another "
            f"secret now. {_REMEDY}"
        )


def _parser() -> argparse.ArgumentParser:
    # no abbreviations: --secret would be one of --secret-env, and its value would be looked up and shown
    parser = argparse.ArgumentParser(
        prog="meadef key",
        description=(__doc__ or "").replace("``", ""),
        epilog="In this order: draw (secret kept apart), commit and publish before training, train, and years later verify; a judge runs check.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True)

    draw = actions.add_parser("draw", help="draw a key from an owner secret", allow_abbrev=False)
    draw.add_argument("--classes", type=int, required=True, help="Classes of the task, at least 3.")
    add_secret(draw)
    draw.add_argument("--beacon", default="", help="Public random value, published after you committed to the secret.")
    draw.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="WAY",
        help="Ways of combining to draw from without, e.g. PixelBlend for colour photographs. Decide before the beacon is known.",
    )
    draw.add_argument(
        "--output", type=Path, default=Path("watermark.key.json"), help="Key file, mode 0600 (default: %(default)s)."
    )

    show = actions.add_parser("show", help="show what is public of a key", allow_abbrev=False)
    show.add_argument("key", type=Path, help="Key file.")
    show.add_argument("--reveal", action="store_true", help="Show its classes and its way of combining, too.")

    check = actions.add_parser(
        "check",
        help="repeat a key's draw from its secret and beacon",
        description="Draws again from the owner secret and the beacon and compares: a key file only says that it was drawn. With "
        "--commitment, key and secret must be the committed ones, and the beacon is the one that it names.",
        allow_abbrev=False,
    )
    check.add_argument("key", type=Path, help="Key file.")
    add_secret(check)
    how = check.add_mutually_exclusive_group()
    how.add_argument("--beacon", default="", help="Public random value that the key was drawn with.")
    how.add_argument("--commitment", type=Path, help="Commitment file of meadef key commit.")

    commit = actions.add_parser(
        "commit",
        help="write a public commitment, before training",
        description="Writes a public file that commits to a key (and to the secret it was drawn from, the model's specification, the data) "
        "and shows none of them; and beside it, ending in .tsq, a time-stamp request (RFC 3161) that holds its hash. Publish the first; "
        "have the second stamped by any authority, e.g. curl -H 'Content-Type: application/timestamp-query' --data-binary "
        "@watermark.commitment.tsq AUTHORITY > watermark.commitment.tsr. With --data and its options (as of meadef verify), the "
        "data is committed to.",
        allow_abbrev=False,
    )
    commit.add_argument("--key", type=Path, help="Key file; left out before the key is drawn.")
    add_secret(commit)
    commit.add_argument("--beacon", default="", help="Public random value that the key was drawn with.")
    commit.add_argument("--model", type=Path, help="YAML that specifies the model, or its whole experiment.")
    commit.add_argument("--signing-key", type=Path, help="Private key that signs the file; see sign-key.")
    commit.add_argument(
        "--output", type=Path, default=Path("watermark.commitment.json"), help="Commitment file (default: %(default)s)."
    )

    sign = actions.add_parser("sign-key", help="make an Ed25519 signing key", allow_abbrev=False)
    sign.add_argument(
        "--output",
        type=Path,
        default=Path("signing.key.pem"),
        help="Private key file, mode 0600 (default: %(default)s).",
    )
    return parser


def add_secret(parser: argparse.ArgumentParser) -> None:
    """Adds the two options from which :func:`read_secret` takes the owner secret."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--secret-env", metavar="NAME", help="Environment variable that holds the owner secret.")
    group.add_argument(
        "--secret-file", metavar="FILE", type=Path, help="File that holds it; only its owner may read it."
    )


def read_secret(options: argparse.Namespace, ask: bool) -> bytes | None:
    """Reads the owner secret from where the options say.

    Args:
        options: Parsed options with ``secret_env`` and ``secret_file``.
        ask: Whether to ask on the terminal where neither is given.

    Returns:
        The secret; ``None`` if none is given and ``ask`` is false.

    Raises:
        ValueError: If it is missing, too short, or its file is readable by others; never shows it.
    """
    if options.secret_env is not None:
        # its name is not shown: somebody may have typed the secret there
        # bytes that are no text come through as they are, and are not named in an error
        secret = os.environ.get(options.secret_env, "").encode(errors="surrogateescape")
        if not secret:
            raise ValueError("The environment variable that --secret-env names is not set, or empty. Export it first.")
    elif options.secret_file is not None:
        secret = read_private(options.secret_file, "secret file").rstrip(b"\r\n")
    elif not ask:
        return None
    elif not sys.stdin.isatty():
        raise ValueError(f"An owner secret is needed, and there is no terminal to ask on. {_REMEDY}")
    else:
        secret = getpass.getpass("Owner secret (not shown): ").encode()
        if getpass.getpass("Once more: ").encode() != secret:
            raise ValueError("The two inputs differ; nothing was written.")
    if len(secret) < _LEAST_SECRET:
        raise ValueError(
            f"The owner secret is shorter than {_LEAST_SECRET} bytes. Commitments are public, so a secret that can be guessed gives the "
            "key away. Make one, e.g. with python -c 'import secrets; print(secrets.token_hex(32))'."
        )
    return secret


def read_document(path: Path, what: str) -> bytes:
    """Reads a small public file, which may come from anybody.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        ValueError: If it is missing or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ValueError(f"Cannot read the {what} {path}: {error.strerror}.") from error
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes; this is no {what}.")
    return data


def data_module(arguments: list[str], program: str) -> SplitDataModule | None:
    """Builds the data module that ``--data`` and its options name, if they are there.

    Args:
        arguments: What no other parser knew.
        program: Name of the command, for messages.
    """
    if not arguments:
        return None
    from meadef_lightning.data.base import SplitDataModule
    from meadef_lightning.experiment.messages import Parser

    parser = Parser(prog=program)
    parser.add_subclass_arguments(SplitDataModule, "data", required=True)
    data: SplitDataModule = parser.instantiate(parser.parse_args(arguments)).data
    data.prepare_data()
    data.setup()
    return data


def say(*lines: str) -> None:
    """Writes lines to standard output."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def refuse_overwriting(path: Path) -> None:
    """Raises ``FileExistsError`` if there is something at a path where a command would write."""
    if path.exists():
        raise FileExistsError(f"{path} exists already and is not overwritten: choose another path with --output.")


def _facts(key: WatermarkKey) -> list[str]:
    space = KeySpace(key.num_classes, key.space)
    how = "drawn uniformly, by its own account" if key.drawn_uniformly else "picked by hand: inconclusive at most"
    return [
        f"commitment         {key.commitment()}",
        f"classes            {key.num_classes}",
        f"key space          {space.size} keys, {len(space.combiners)} ways of combining",
        f"origin             {how}",
    ]


def _draw(options: argparse.Namespace) -> None:
    refuse_overwriting(options.output)
    # a mistake is found before anything is typed
    space = KeySpace(options.classes, default_combiners(options.without))
    secret = read_secret(options, ask=True) or b""
    key = WatermarkKey.draw(options.classes, secret, options.beacon, space.combiners)
    key.save(options.output)
    say(
        f"Key written to {options.output}. Keep it and the secret apart, backed up and out of version control.",
        *_facts(key),
        f"secret commitment  {secret_commitment(secret)}",
        f"Next, before training: meadef key commit --key {options.output} --model YOUR.yaml",
    )


def _show(options: argparse.Namespace) -> None:
    key = WatermarkKey.load(options.key)
    say(*_facts(key))
    mode = stat.S_IMODE(options.key.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        sys.stderr.write(f"Warning: {options.key} can be read by others than its owner. Run: chmod 600 {options.key}\n")
    if options.reveal:
        sys.stderr.write(
            "Warning: what follows is the secret. Whoever knows it can avoid or overwrite the watermark.\n"
        )
        say(
            f"source classes     {key.source_classes[0]}, {key.source_classes[1]}",
            f"target class       {key.target_class}",
            f"combining          {key.combiner.class_path} {dict(key.combiner.init_args)}",
        )


def _check(options: argparse.Namespace) -> None:
    key = WatermarkKey.load(options.key)
    commitment = None
    if options.commitment is not None:
        commitment = Commitment.parse(read_document(options.commitment, "commitment"), str(options.commitment))
        commitment.check(key)
    secret = read_secret(options, ask=True) or b""
    if commitment is None:
        repeat_draw(key, secret, options.beacon)
        say(
            "The key is what this secret and beacon give.",
            *free_choices(key),
            "That does not tell how many secrets were tried: for this, give a --commitment to the secret from before the beacon.",
        )
    else:
        commitment.check_draw(key, secret)
        say(
            f"The key is what the secret and beacon give that were committed to at {commitment.created}.",
            *free_choices(key),
        )


def _commit(options: argparse.Namespace, rest: list[str]) -> None:
    request = options.output.with_suffix(".tsq")
    for path in (options.output, request):
        refuse_overwriting(path)
    key = None if options.key is None else WatermarkKey.load(options.key)
    if options.model is not None and not options.model.is_file():
        raise ValueError(f"There is no model specification {options.model}.")
    signing_key = None if options.signing_key is None else load_signing_key(options.signing_key)
    secret = read_secret(options, ask=False)
    data = data_module(rest, "meadef key commit")
    commitment = Commitment.make(
        key,
        secret=secret,
        beacon=options.beacon,
        model=None if options.model is None else (options.model.name, file_sha256(options.model)),
        data=None
        if data is None
        else {split: tensors_fingerprint(*read_split(data, split)) for split in ("verification", "test")},
        signing_key=signing_key,
    )
    make_directory(options.output.parent)
    write_bytes_atomic(options.output, commitment.document)
    write_bytes_atomic(request, timestamp_request(commitment.document))
    say(
        f"Commitment: {options.output}. Publish it where its date can be shown later; its own date is only a claim.",
        f"Time-stamp request (RFC 3161): {request}",
        f"signed by          {commitment.signer or 'nobody (--signing-key)'}",
    )


def _sign_key(options: argparse.Namespace) -> None:
    public = make_signing_key(options.output)
    say(f"Private signing key: {options.output}. Keep it; publish the public half:", f"public key         {public}")
