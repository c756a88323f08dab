import fcntl
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from qies.config import RunConfig
from qies.errors import UserError
from qies.storage import exclusive, make_writable_folder, replacing
from qies.train.checkpoint import _partial
from qies.train.loop import _Run, build_model
from qies.train.run_directory import CHECKPOINTS, claim


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


def test_no_folder_that_a_run_makes_can_be_written_by_everyone(tmp_path: Path) -> None:
    """Or the run refuses it when it goes on."""
    before = os.umask(0)
    try:
        make_writable_folder(tmp_path / "a" / "run")
        _partial(tmp_path / "a" / "run" / CHECKPOINTS, 1)
        with exclusive(tmp_path / "b" / "run" / "data", ".building"):
            pass
        assert claim(RunConfig(), tmp_path / "b" / "run") is None
        made = [path for path in tmp_path.rglob("*") if path.is_dir()]
        assert len(made) == 7 and not any(path.stat().st_mode & stat.S_IWOTH for path in made)
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_follow_the_umask(mask: int, mode: int, shards, tmp_path: Path) -> None:
    config = RunConfig("transformer", "50k")
    state = build_model(config, shards.manifest.vocab_size).state_dict()
    before = os.umask(mask)
    try:
        _Run._publish(SimpleNamespace(config=config, shards=shards, folder=tmp_path / "run"), state)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == mode
