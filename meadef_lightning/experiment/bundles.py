"""``meadef evidence``: bundle a verdict for a judge, check such a bundle offline or with the judge's own images, and combine several keys."""

from __future__ import annotations

import argparse
import re
import shlex
import tempfile
from pathlib import Path

from meadef_lightning.experiment.artifacts import write_json_atomic, write_text_atomic
from meadef_lightning.experiment.keys import (
    add_secret,
    data_module,
    read_document,
    read_secret,
    refuse_overwriting,
    refuse_secrets,
    say,
)
from meadef_lightning.verification.bundle import Bundle
from meadef_lightning.verification.combination import combine_verdicts
from meadef_lightning.verification.commitment import OWNERS_WORD, free_choices, repeat_draw
from meadef_lightning.verification.evidence import Evidence
from meadef_lightning.verification.evidence_form import EvidenceError
from meadef_lightning.verification.signing import load_signing_key
from meadef_lightning.verification.verdict import Verdict
from meadef_lightning.watermark.key import WatermarkKey

COMMAND, EVIDENCE = "command.txt", "evidence.json"


def evidence_command(arguments: list[str]) -> None:
    """Runs ``meadef evidence``.

    Args:
        arguments: What follows it on the command line.

    Raises:
        EvidenceError: If the evidence or bundle does not hold; the message names what differs.
        ValueError: If an option does not fit.
        OSError: If a file cannot be read or written.
    """
    options, rest = _parser().parse_known_args(arguments)
    refuse_secrets(rest)
    {"bundle": _bundle, "check": _check, "combine": _combine}[options.action](options, rest)


def record_command(output: Path, program: str, arguments: list[str]) -> None:
    """Writes the command line where its evidence will stand, for the bundle; a password in a URL is left out.

    Raises:
        FileExistsError: If the evidence of another command stands there: it is not overwritten. The same command may run again.
    """
    text = re.sub(r"(?<=://)[^/\s]+@", "", shlex.join([*program.split(), *arguments])) + "\n"
    path = output / COMMAND
    before = path.read_text(encoding="utf-8") if path.is_file() else "a command that is not known"
    if (output / EVIDENCE).exists() and before != text:
        raise FileExistsError(
            f"{output} holds the evidence of: {before.strip()}. It is not overwritten: choose another directory with --output."
        )
    write_text_atomic(path, text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meadef evidence", description=(__doc__ or "").replace("``", ""), allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True)

    bundle = actions.add_parser(
        "bundle",
        help="put a verdict's evidence, commitment and hashes into one directory or zip file",
        description="Bundles what meadef verify wrote. With --data and its options (the same as then), the samples that were asked are "
        "hashed, too.",
        allow_abbrev=False,
    )
    bundle.add_argument("evidence", type=Path, help="Output directory of meadef verify, or its evidence.json.")
    bundle.add_argument("--key", type=Path, required=True, help="Key file; it seals the bundle and is not put into it.")
    bundle.add_argument("--output", type=Path, required=True, help="New directory, or zip file if it ends in .zip.")
    bundle.add_argument("--commitment", type=Path, help="Commitment file of meadef key commit.")
    bundle.add_argument("--timestamp", type=Path, help="A time-stamping authority's answer (.tsr) for the commitment.")
    bundle.add_argument("--signing-key", type=Path, help="Private key that signs; see meadef key sign-key.")
    bundle.add_argument("--disclose-key", action="store_true", help="Put the key itself in. For the judge's eyes only.")

    check = actions.add_parser(
        "check",
        help="check a bundle offline; ask the suspect again",
        description="Checks hashes, seals, signature and commitment of a bundle, and derives its verdict again from the raw answers. With "
        "--data and its options (as of meadef verify), the triggers are made again. With --suspect, too, and any other option "
        "of meadef verify, the suspect is asked again with that data: the judge's own images. With the owner secret, the key's draw is "
        "repeated. Labels that were translated are told anew from the judge's images.",
        allow_abbrev=False,
    )
    check.add_argument("bundle", type=Path, help="Bundle directory or zip file, or a bare evidence.json.")
    check.add_argument("--key", type=Path, help="Key file, unless the bundle discloses the key.")
    check.add_argument("--signer", help="Public key that must have signed the bundle, 64 hexadecimal digits.")
    check.add_argument(
        "--output", type=Path, default=Path("runs/recheck"), help="Results of asking again (default: %(default)s)."
    )
    add_secret(check)
    check.add_argument(
        "--beacon",
        default="",
        help="For a bare evidence.json: what the key was drawn with. A bundle's commitment names it.",
    )

    combine = actions.add_parser(
        "combine",
        help="judge one suspect under several keys at once",
        description="Checks the evidence of one suspect under several keys, each as meadef evidence check does, and combines the p-values by "
        "Fisher's method. Give all the keys that were committed to: leaving out those that did not fire is choosing.",
        epilog="Example: meadef evidence combine runs/verify-1 runs/verify-2 --key key-1.json --key key-2.json",
        allow_abbrev=False,
    )
    combine.add_argument(
        "evidence", type=Path, nargs="+", help="Output directories of meadef verify, or their evidence.json; one a key."
    )
    combine.add_argument(
        "--key", type=Path, action="append", required=True, help="Key file; repeat it for every key, in any order."
    )
    combine.add_argument("--output", type=Path, help="New JSON file for the joint verdict.")
    return parser


def _file(evidence: Path) -> Path:
    """The evidence file that is meant: a directory stands for the one in it."""
    return evidence / EVIDENCE if evidence.is_dir() else evidence


def _bundle(options: argparse.Namespace, rest: list[str]) -> None:
    evidence = _file(options.evidence)
    key = WatermarkKey.load(options.key)
    Evidence.load(evidence)  # names the file where it cannot be used
    command = evidence.with_name(COMMAND)
    bundle = Bundle.make(
        evidence.read_bytes(),
        key,
        command=read_document(command, "command").decode(errors="replace").strip() if command.is_file() else "",
        commitment=None if options.commitment is None else read_document(options.commitment, "commitment"),
        timestamp=None if options.timestamp is None else read_document(options.timestamp, "time stamp"),
        data=data_module(rest, "meadef evidence bundle"),
        disclose_key=options.disclose_key,
        signing_key=None if options.signing_key is None else load_signing_key(options.signing_key),
    )
    bundle.save(options.output)
    say(f"Bundle: {options.output} ({', '.join(bundle.files)})")
    if options.disclose_key:
        say("It holds the key: whoever reads it can avoid or overwrite the watermark.")


def _check(options: argparse.Namespace, rest: list[str]) -> None:
    key = None if options.key is None else WatermarkKey.load(options.key)
    ask_again = _names(rest, "--suspect")
    if options.bundle.suffix == ".json":
        if key is None or options.signer is not None:
            raise ValueError("A bare evidence file is checked with --key alone; only a bundle is signed.")
        evidence = Evidence.load(options.bundle)
        verdict: Verdict | None = evidence.check(key)
        notes: tuple[str, ...] = ("The seals hold, and the verdict follows from the raw answers.",)
        if (secret := read_secret(options, ask=False)) is not None:
            repeat_draw(key, secret, options.beacon)
            notes += (
                "The key is what this secret and beacon give; no commitment shows that they were not chosen to suit.",
                *free_choices(key),
            )
        elif evidence.key["drawn_uniformly"]:
            notes += (OWNERS_WORD,)
        if evidence.labels is not None:
            notes += (evidence.labels.describe(),)
    else:
        if options.beacon:
            raise ValueError("--beacon is for a bare evidence.json; a bundle's commitment names the beacon.")
        bundle = Bundle.load(options.bundle)
        data = None if ask_again else data_module(rest, "meadef evidence check")
        findings = bundle.check(key, signer=options.signer, secret=read_secret(options, ask=False), data=data)
        key, evidence, verdict, notes = key or bundle.disclosed_key(), bundle.evidence, findings.verdict, findings.notes
    say(*notes)
    if verdict is not None:
        say(
            f"Verdict of the evidence: {verdict.verdict}. {verdict.reason}",
            *(f"Note: {note}" for note in verdict.notes),
        )
    if not ask_again:
        return
    if key is None or verdict is None:
        raise EvidenceError(
            "The suspect cannot be asked again without the key: give --key, or a bundle that discloses it."
        )
    if evidence.model["references"] and not _names(rest, "--reference"):
        say("Note: the verdict of the evidence is above reference models. Asking again without --reference shows less.")
    again = _ask_again(evidence, key, options.output, rest)
    say(
        f"Verdict of the evidence: {verdict.verdict} (p = {verdict.decoy_p:.2g}, success {verdict.wsr:.1%}).",
        f"Verdict of asking again: {again.verdict} (p = {again.decoy_p:.2g}, success {again.wsr:.1%}).",
    )


def _combine(options: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise ValueError(
            f"meadef evidence combine does not know {shlex.join(rest)}; see meadef evidence combine --help."
        )
    if options.output is not None:
        refuse_overwriting(options.output)
    keys = {key.commitment(): key for key in map(WatermarkKey.load, options.key)}
    pieces = [Evidence.load(_file(path)) for path in options.evidence]
    told = [piece.key["commitment"] for piece in pieces]
    if sorted(told) != sorted(keys) or len(keys) < len(options.key):
        without = [str(path) for path, name in zip(options.evidence, told, strict=True) if name not in keys]
        raise ValueError(
            f"Every key needs its own evidence, and every evidence its key, each once; got {len(options.key)} key file(s) of {len(keys)} "
            f"key(s), and evidence about {len(set(told))} key(s) in {len(told)} file(s)"
            + (f". No key was given for {', '.join(without)}." if without else ".")
        )
    models = {piece.model["sha256"] for piece in pieces}
    if len(models) > 1:
        raise EvidenceError(
            "The evidence is about different models, and a joint verdict about one. Verify the same suspect with every key."
        )
    joint = combine_verdicts([(piece.check(keys[name]), keys[name]) for piece, name in zip(pieces, told, strict=True)])
    say(
        *(
            f"{path}: {verdict.verdict}, p = {verdict.decoy_p:.2g} ({p:.2g} as one of {len(pieces)}, by Holm), success {verdict.wsr:.1%}"
            for path, verdict, p in zip(options.evidence, joint.verdicts, joint.adjusted_p, strict=True)
        ),
        f"Verdict under {len(pieces)} key(s): {joint.verdict}. {joint.reason}",
        *(f"Note: {note}" for note in joint.notes),
    )
    if models == {None}:
        say("Note: The suspect is a black box, so that it was the same one each time is the word of who asked it.")
    if options.output is not None:
        write_json_atomic(options.output, joint.to_dict())


def _names(words: list[str], option: str) -> bool:
    """Whether an option is among the words of a command line."""
    return any(word.partition("=")[0] == option for word in words)


def _ask_again(evidence: Evidence, key: WatermarkKey, output: Path, rest: list[str]) -> Verdict:
    """Judges the suspect anew as ``meadef verify`` does, with the numbers of the evidence unless the options say otherwise."""
    from meadef_lightning.experiment.judge import judge_suspect, verify_parser

    procedure, answers = evidence.procedure, evidence.opened(key)
    numbers = {
        "alpha": procedure["alpha"],
        "samples": len(answers["trigger"]),
        "decoys": procedure["decoys"],
        "decoy_samples": sum(answers["cells"][0]),
        "seed": procedure["seed"],
    }
    asked = [word for name, value in numbers.items() for word in (f"--verification.{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:  # of mode 0700: the key may come from the bundle
        file = key.save(Path(folder) / "watermark.key.json")
        # whether labels are translated is not the judge's choice to make after seeing the verdict
        aligned = [] if evidence.labels is None else ["--align_labels"]
        arguments = ["--key", str(file), "--output", str(output), *asked, *aligned, *rest]
        return judge_suspect(verify_parser(prog="meadef evidence check").parse_args(arguments))
