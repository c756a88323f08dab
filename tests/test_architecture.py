"""The package's shape: who may import whom."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "qies"
# A module may import from its own tier and from those before it. FLOPs are arithmetic on the
# presets, and the objective is arithmetic on the ops that the model's loss needs.
TIERS = [
    {"errors", "strict_yaml", "storage", "_register", "terminal", "plugins", "workers"},
    {"config", "presets", "accounting", "mixers"},
    {"ops"},
    {"objective"},
    {"model"},
    {"data", "train", "records"},
    {"ladder", "plotting"},
    {"evaluation", "scaling", "entanglement", "probes", "bench", "decoding"},
    {"analyses"},
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


def name_of(path: Path, root: Path = ROOT) -> str:
    """The dotted name of the module below qies, "" for qies itself."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, inside functions too, but not what `if TYPE_CHECKING` guards: it is never executed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from statements(other)
        else:
            yield child
            yield from statements(child)


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """The modules below qies that each module imports, at its top or in a function.

    An import executes the packages above the module imported, so what their `__init__` re-exports counts. The packages
    above the importer are excepted, as they are under way already, unless it takes a name from them.
    """
    modules = {name_of(path, root): path for path in root.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = graph[name] = set()
        for node in statements(ast.parse(path.read_text())):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} has a relative import; the package's style is absolute"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.append(inner if inner.removeprefix("qies.") in modules else node.module)
            for target in targets:
                if target.split(".")[0] == "qies":
                    parts = target.split(".")[1:]
                    found.add(".".join(parts))
                    above = {".".join(parts[:n]) for n in range(1, len(parts))}
                    found |= {a for a in above if not f"{package}.".startswith(f"{a}.")}
        found.discard(name)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


IMPORTS = import_graph()


@pytest.mark.parametrize(
    "path", [f for f in FILES if f != ROOT / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_up_the_list(path):
    name = name_of(path)
    if name != "_register":  # it reaches down to the model, but only once transformers is there
        assert {m for m in IMPORTS[name] if m and tier(m) > tier(name)} == set()


def test_no_modules_import_each_other_in_a_circle():
    assert circles(IMPORTS) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "from qies.b import x", "b": "def f():\n    import qies.a"}, [["a", "b"]]),
        ({"a": "from qies.b import x", "b": "if TYPE_CHECKING:\n    from qies.a import y"}, []),
        ({"p/__init__": "from qies.p.a import x", "p/a": "from qies.p.b import y", "p/b": ""}, []),
        ({"p/__init__": "from qies.p.a import x", "p/a": "from qies.p import y"}, [["p", "p.a"]]),
        ({"p/__init__": "from qies.p.a import x", "p/a": "import qies.c", "p/b": "", "c": "from qies.p import b"},
         [["c", "p", "p.a"]]),
    ],
    ids=["function", "types only", "a package and its parts", "from the own package", "what a package re-exports"],
)  # fmt: skip
def test_circles_are_found(files, expected, tmp_path):
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert circles(import_graph(tmp_path)) == expected


@pytest.mark.parametrize("module", ["data.batches", "data.shards", "data.manifest", "data.tokenizer"])
def test_readers_of_data_import_no_builder_and_no_source(module):
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += IMPORTS[name]
    assert {name for name in reached if name.startswith(("data.builder", "data.sources", "train"))} == set()
    assert len({name for name in reached if name.startswith("data")}) <= 6


@pytest.mark.parametrize(
    "module", ["qies", "qies.config", "qies.presets", "qies.scaling.laws.power_law", "qies.accounting.plan"]
)
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
