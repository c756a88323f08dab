"""What every verb of the command line shares."""

from pathlib import Path

import pytest

from qies.terminal import run


@pytest.mark.parametrize(("word", "path"), [("~", ""), ("~/a b", "a b"), ("~nobody-of-this-name/x", None)])
def test_a_path_may_begin_with_the_home_folder(word: str, path: str | None, tmp_path: Path, monkeypatch) -> None:
    seen: list[object] = []

    def verb(first: Path, /, more: tuple[Path, ...] = (), text: str = "", none: Path | None = None) -> None:
        """A verb."""
        seen.extend([first, *more, text, none])

    monkeypatch.setenv("HOME", str(tmp_path))
    assert run({"verb": verb, "other": verb}, ["verb", word, "--more", word, "x", "--text", word], "") == 0
    expected = Path(word) if path is None else tmp_path / path
    assert seen == [expected, expected, Path("x"), word, None]
