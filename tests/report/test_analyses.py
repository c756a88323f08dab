"""Analyses: those of the package, and one from outside, which is the example of docs/analyses.md."""

import json
import re
from pathlib import Path
from statistics import stdev

import pytest
import yaml
from rich.console import Console
from study_pages import make_study, page_of

from qies import analyses, records
from qies.analyses import Finished
from qies.config import StudyConfig
from qies.errors import Stopped, UserError

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "analyses.md").read_text()


def finished(folder):
    found = [records.read(path.parent) for path in sorted(folder.glob("runs/*/run.json"))]
    return Finished(StudyConfig(seeds=(0, 1, 2)), folder, found)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A working directory with the document's module."""
    place = tmp_path / "lab"
    place.mkdir()
    (place / "seed_spread.py").write_text(re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[1])
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    return place


@pytest.fixture
def seeds(tmp_path):
    """A study of three seeds that names the document's analyses."""
    folder = make_study(tmp_path / "seeds", seeds=(0, 1, 2))
    [named] = re.findall(r"^    (analyses: .*)$", DOCUMENT, re.MULTILINE)
    with open(folder / "study.yaml", "a") as file:
        file.write(f"{named}\n")
    return folder


def test_every_analysis_of_the_package_is_registered():
    package = ROOT / "src" / "qies" / "analyses"
    found = {path.stem for path in package.glob("*.py") if re.search(r"^def section\(", path.read_text(), re.MULTILINE)}
    assert found == set(analyses.BUILTIN)
    assert [a.name for a in analyses.load(["builtin"])] == list(analyses.BUILTIN)
    assert {a.name for a in analyses.load(["builtin"]) if a.compute} == {
        "comparison",
        "fits",
        "efficiency",
        "entanglement",
        "samples",
    }


def test_an_analysis_from_outside_is_computed_stored_and_shown(outside, seeds):
    names = yaml.safe_load((seeds / "study.yaml").read_text())["analyses"]
    assert names == ["builtin", "seed_spread"]
    chosen = analyses.load(names)
    study = finished(seeds)
    analyses.compute(chosen[-1:], study, Console(quiet=True))
    own = [r.val_loss for r in study.done if (r.arm, r.size) == ("qies", "400k")]
    rows = json.loads((seeds / "seed_spread.json").read_text())["rows"]
    assert len(rows) == 12 and ["qies", "400k", 3, stdev(own)] in rows
    text = page_of(seeds).text
    assert "Spread over seeds" in text and f"qies 400k 3 {stdev(own):.4f}" in text
    assert text.index("Samples") < text.index("Spread over seeds") < text.index("Every run")


def test_a_page_has_the_analyses_that_the_study_names_and_no_others(seeds):
    edit_yaml(seeds / "study.yaml", analyses=["speed", "loss"])
    (seeds / "samples.json").write_text("{")
    text = page_of(seeds).text
    assert text.index("Speed and memory") < text.index("Validation loss against") < text.index("Run records")
    assert "Fitted laws" not in text and "samples.json" not in text  # nor a note on what was not asked for


def test_an_analysis_from_outside_that_fails_is_a_note(outside, seeds):
    (outside / "broken_lab.py").write_text(
        "class Depth:\n"
        "    def compute(study): raise RuntimeError('no depth')\n"
        "    def section(result, study): raise OSError('not drawn')\n"
    )
    edit_yaml(seeds / "study.yaml", analyses=["loss", "broken_lab:Depth", "gone_lab"])
    chosen = analyses.load(["loss", "broken_lab:Depth"])
    analyses.compute(chosen, finished(seeds), Console(quiet=True))
    assert json.loads((seeds / "Depth.json").read_text())["error"] == "RuntimeError: no depth"
    with pytest.raises(Stopped, match=r"1 analyses failed \(Depth: RuntimeError: no depth\)"):
        analyses.require_computed(chosen, seeds)
    text = page_of(seeds).text
    assert "The analysis of Depth.json failed" in text and "The part on Depth is left out" in text
    assert "Unknown analysis or module 'gone_lab'" in text and "Validation loss against" in text


def test_a_stored_result_of_the_same_inputs_is_kept(seeds):
    made = []

    def compute(study):
        made.append(study.hashes)
        return {"schema": 1}

    counted = analyses.Analysis("counted", lambda *_: None, compute, lambda study: {"runs": study.hashes})
    study, quiet = finished(seeds), Console(quiet=True)
    analyses.compute([counted], study, quiet)
    analyses.compute([counted], study, quiet)
    assert made == [study.hashes] and json.loads((seeds / "counted.json").read_text())["runs"] == study.hashes
    fewer = Finished(study.config, study.folder, study.done[1:])
    analyses.compute([counted], fewer, quiet)
    assert made == [study.hashes, fewer.hashes]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["los"], "Unknown analysis or module 'los'. Did you mean 'loss'"),
        (["lab.seed_spread"], "Known: builtin, loss"),
        (["json"], "json is not an analysis: it has no function section"),
        (["seed_spread:other"], "seed_spread:other is not an analysis"),
        (["builtin", "loss"], "two analyses 'loss'"),
        (["faulty_lab"], r"faulty_lab cannot be imported \(ZeroDivisionError"),
        (["needy_lab"], r"needy_lab cannot be imported \(ModuleNotFoundError: No module named 'absent_lab'"),
    ],
)
def test_names_that_are_no_analyses_are_one_line(names, words, outside):
    (outside / "faulty_lab.py").write_text("1 / 0\n")
    (outside / "needy_lab.py").write_text("import absent_lab\n")
    with pytest.raises(UserError, match=words) as error:
        analyses.load(names)
    assert "\n" not in str(error.value)


def edit_yaml(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
