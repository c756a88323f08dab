"""The package's shape: who may import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "qies"
# A module may import from its own tier and from those before it. FLOPs are arithmetic on the
# presets, and the objective is arithmetic on the ops that the model's loss needs.
TIERS = [
    {"errors", "strict_yaml", "storage", "_register", "terminal"},
    {"config", "presets", "accounting"},
    {"ops"},
    {"objective"},
    {"model"},
    {"data", "train", "records"},
    {"ladder", "plotting"},
    {"evaluation", "scaling", "entanglement", "probes", "bench", "decoding"},
    {"report"},
    {"study"},
    {"cli"},
    {"__main__"},
]
FILES = sorted(ROOT.rglob("*.py"))


def tier(module: str) -> int:
    """The tier of `a.b.c` below qies: that of its longest known prefix."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        for i, names in enumerate(TIERS):
            if ".".join(parts[:n]) in names:
                return i
    raise AssertionError(f"qies.{module} belongs to no tier; add it to TIERS")


def imported(path: Path) -> set[str]:
    """Modules below qies that the file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qies."):
            found.add(node.module.removeprefix("qies."))
        elif isinstance(node, ast.ImportFrom) and node.module == "qies":
            found |= {a.name for a in node.names if (ROOT / a.name).is_dir() or (ROOT / f"{a.name}.py").is_file()}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("qies.") for a in node.names if a.name.startswith("qies.")}
    return found


@pytest.mark.parametrize(
    "path", [f for f in FILES if f != ROOT / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_up_the_list(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name != "_register":  # it reaches down to the model, but only once transformers is there
        assert {m for m in imported(path) if tier(m) > tier(name)} == set()


@pytest.mark.parametrize("module", ["qies", "qies.config", "qies.presets", "qies.scaling.laws", "qies.accounting.plan"])
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "first",
    [
        "import qies, transformers",
        "import transformers.models.auto.modeling_auto, qies",
        pytest.param("import transformers.models.auto.configuration_auto, qies", marks=SLOW),
        pytest.param("from qies import QiesForCausalLM", marks=SLOW),
        pytest.param("import qies, transformers.models.qwen3_next.modeling_qwen3_next", marks=SLOW),
        pytest.param("import qies, transformers.modeling_layers", marks=SLOW),
    ],
)
def test_auto_classes_know_the_model_whichever_is_imported_first(first):
    check = (
        "from transformers import AutoConfig as C, AutoModelForCausalLM as A; c = C.for_model('qies', vocab_size=9);"
        "assert type(A.from_config(c)).__name__ == 'QiesForCausalLM'"
    )
    assert subprocess.run([sys.executable, "-c", f"{first}; {check}"]).returncode == 0


def test_no_test_imports_a_conftest():
    """Several folders have one, so which it is would depend on the files named on the command line."""
    tests = Path(__file__).parent
    named = [
        path.name for path in tests.rglob("*.py") if re.search(r"^(from|import) conftest\b", path.read_text(), re.M)
    ]
    assert named == []
    shared = [path.name for path in tests.rglob("*.py") if path.name != "conftest.py"]
    assert len(shared) == len(set(shared))
