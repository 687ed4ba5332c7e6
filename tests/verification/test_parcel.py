"""Archives that are made to be large in memory: refused before their members are listed."""

import struct
import zipfile

import pytest

from meadef_lightning.verification import EvidenceError
from meadef_lightning.verification import parcel as module
from meadef_lightning.verification.parcel import MANIFEST, pack, unpack

_NAME = MANIFEST.encode()
_MEMBER = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *(0,) * 8, len(_NAME), *(0,) * 6) + _NAME


def directory_of(members, large, comment=b""):
    """A zip file that is hardly more than a list of members; a large one says in a second end record how long the list is."""
    listed = _MEMBER * members
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46 if large else len(listed), 0, len(comment)) + comment
    if not large:
        return listed + end
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, members, members, len(listed), 0)
    return listed + record + struct.pack("<4sLQL", b"PK\6\7", 0, len(listed), 1) + end


@pytest.mark.parametrize("comment", [b"", b"x"])
@pytest.mark.parametrize("large", [False, True])
def test_a_list_of_many_members_is_not_read(monkeypatch, large, comment):
    def opened(*_, **__):
        raise AssertionError("the archive was opened")

    monkeypatch.setattr(module.zipfile, "ZipFile", opened)
    with pytest.raises(EvidenceError, match="does not end with the short list of members"):
        unpack(directory_of(500, large, comment))


def test_the_second_record_is_what_a_reader_would_have_believed(tmp_path):
    """The test above tests something: Python lists all members of such a file, whatever its last record says."""
    path = tmp_path / "large.zip"
    path.write_bytes(directory_of(500, large=True))
    try:
        with zipfile.ZipFile(path) as archive:
            assert len(archive.infolist()) == 500
    except zipfile.BadZipFile:
        pytest.skip("this Python is not deceived")


def test_what_is_packed_is_unpacked():
    files = {MANIFEST: b"{}\n", module.KEY: b"PK\6\7" * 9}
    assert unpack(pack(files)) == files
