"""The files of an evidence bundle as a directory or one zip file: written whole, read without trust.

Names come from a list, so no path of a stranger's is ever used; contents stay in memory. See
:mod:`~meadef_lightning.verification.bundle` for what the files mean.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from meadef_lightning.verification.evidence import MAX_EVIDENCE_BYTES
from meadef_lightning.verification.evidence_form import EvidenceError
from meadef_lightning.verification.signing import MAX_DOCUMENT_BYTES

MANIFEST, EVIDENCE, COMMITMENT = "manifest.json", "evidence.json", "watermark.commitment.json"
TIMESTAMP, KEY = "watermark.commitment.tsr", "watermark.key.json"
MEMBERS = {
    MANIFEST: MAX_DOCUMENT_BYTES,
    EVIDENCE: MAX_EVIDENCE_BYTES,
    COMMITMENT: MAX_DOCUMENT_BYTES,
    TIMESTAMP: MAX_DOCUMENT_BYTES,
    KEY: MAX_DOCUMENT_BYTES,
}
"""The files of a bundle and the most bytes of each, in the order in which a zip holds them."""
_END = struct.Struct("<4s4H2LH")  # a zip's end record, without a comment
_LOCATOR = b"PK\6\7", 20  # begins what leads a reader to another end record, of a large zip; how long it is
_MAX_DIRECTORY = 4096
MAX_BUNDLE_BYTES = sum(MEMBERS.values()) + (1 << 16)


def pack(files: Mapping[str, bytes]) -> bytes:
    """Returns the one zip file of these files: stored, in the order of ``MEMBERS``, without times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in (name for name in MEMBERS if name in files):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.create_version, info.extract_version = 3, 20, 20
            info.external_attr = (stat.S_IFREG | 0o600) << 16
            archive.writestr(info, files[name])
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, bytes]:
    """Reads the zip file of a bundle in memory.

    Raises:
        EvidenceError: If it is not, byte for byte, what :func:`pack` makes of its files; names what is wrong.
    """
    files: dict[str, bytes] = {}
    end = _END.unpack(data[-_END.size :]) if len(data) >= _END.size else (b"",) * 8
    large = data[-_END.size - _LOCATOR[1] :].startswith(_LOCATOR[0])
    if end[0] != b"PK\5\6" or end[5] > _MAX_DIRECTORY or large:
        # a list of millions of members would fill the memory before the first name is looked at
        raise EvidenceError(
            "The bundle is not a readable zip file: it does not end with the short list of members of a bundle."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            starts = []
            for info in archive.infolist():
                _check_name(info.filename)
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits or info.file_size != info.compress_size:
                    raise EvidenceError(f"{info.filename} is compressed or encrypted, which no member of a bundle is.")
                if info.file_size > MEMBERS[info.filename]:
                    raise EvidenceError(f"{info.filename} is larger than {MEMBERS[info.filename]} bytes.")
                if info.filename in files:
                    raise EvidenceError(f"{info.filename} is in the bundle twice.")
                starts.append((info.header_offset, info.filename))
                with archive.open(info) as member:
                    files[info.filename] = member.read(MEMBERS[info.filename] + 1)
    except EvidenceError:
        raise
    except (
        zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError, struct.error, OverflowError, LookupError,
    ) as error:  # fmt: skip
        raise EvidenceError(f"The bundle is not a readable zip file: {str(error)!a:.200}.") from error
    expected = pack(files)
    if data != expected:
        same = min(len(data), len(expected))
        place = next((i for i in range(same) if data[i] != expected[i]), same)
        near = max((start for start in starts if start[0] <= place), default=(0, "its beginning"))[1]
        raise EvidenceError(
            f"The bundle's zip file was changed outside of its files, at byte {place} (at or after {near}). If another tool wrote "
            "it, unpack it and check the directory."
        )
    return files


def read_directory(path: Path) -> dict[str, bytes]:
    """Reads the files of a bundle directory, following no link.

    Raises:
        EvidenceError: If there is anything in it that is not a regular file of a bundle, or that is too large.
        OSError: If it cannot be read.
    """
    files = {}
    with os.scandir(path) as entries:
        for entry in entries:
            _check_name(entry.name)
            if not entry.is_file(follow_symlinks=False):
                raise EvidenceError(f"{entry.name} is not a regular file (a link, a directory or a device).")
            # it may have become a link or a pipe since
            flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(entry.path, os.O_RDONLY | flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise EvidenceError(f"{entry.name} is not a regular file.")
                files[entry.name] = file.read(MEMBERS[entry.name] + 1)
            if len(files[entry.name]) > MEMBERS[entry.name]:
                raise EvidenceError(f"{entry.name} is larger than {MEMBERS[entry.name]} bytes.")
    return files


def _check_name(name: str) -> None:
    if name not in MEMBERS:
        raise EvidenceError(f"{name!a:.100} is not part of a bundle, which holds only {', '.join(MEMBERS)}.")


def read_files(path: Path) -> dict[str, bytes]:
    """Reads a bundle directory or zip file into memory; nothing is extracted.

    Raises:
        EvidenceError: If it is missing, or holds what no bundle may hold; the message names it.
    """
    try:
        if path.is_dir():
            return read_directory(path)
        if not path.is_file():
            raise EvidenceError(f"There is no bundle {path}: neither a directory nor a file.")
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise EvidenceError(f"Cannot read the bundle {path}: {error.strerror}.") from error
    if len(data) > MAX_BUNDLE_BYTES:
        raise EvidenceError(f"{path} is larger than {MAX_BUNDLE_BYTES} bytes; this is not a bundle of ours.")
    return unpack(data)


def write_files(path: Path, files: Mapping[str, bytes], private: bool) -> Path:
    """Writes a directory, or a zip file if the path ends in ``.zip``.

    Args:
        path: What must not exist yet.
        files: Content of each file, by names of ``MEMBERS``.
        private: Whether only the owner may read it.

    Raises:
        OSError: If there is something already, or it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already, and evidence is never overwritten: choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # made aside, with mode 0700, so that a bundle is whole or not there
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}"))
    try:
        if path.suffix == ".zip":
            written = {aside / "bundle": pack(files)}
        else:
            (aside / "bundle").mkdir()
            written = {aside / "bundle" / name: content for name, content in files.items()}
        for target, content in written.items():
            with target.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            target.chmod(0o600 if private else 0o644)
        if path.suffix != ".zip":
            (aside / "bundle").chmod(0o700 if private else 0o755)
        (aside / "bundle").rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path
