import fcntl
from pathlib import Path

import pytest

from qies.data.files import exclusive, replacing
from qies.errors import UserError


def test_one_at_a_time(tmp_path: Path) -> None:
    marker = tmp_path / "new" / ".marker"
    with exclusive(marker.parent, marker.name), marker.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path, ".marker"):
        _ = 1 / 0
    assert (tmp_path / ".marker").exists()  # so that the next one knows whose remains these are
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), exclusive(tmp_path / "file", ".marker"):
        pass


def test_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new, but")
        _ = 1 / 0
    assert path.read_bytes() == b"old"
