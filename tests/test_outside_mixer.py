"""A mixer from outside the package, that of docs/extending.md, does all that an arm does; errors of plugins."""

import dataclasses
import importlib.util
import json
import pickle
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

import qies
from qies import cli, mixers, plugins, presets
from qies.accounting import memory
from qies.accounting.flops import forward_flops_per_token
from qies.accounting.parameters import model_weights
from qies.config import RunConfig, StudyConfig, content_hash, from_dict, load, to_dict
from qies.errors import UserError
from qies.model import QiesCache, QiesConfig, QiesForCausalLM
from qies.train.optim import Optimizers, parameter_groups

ROOT = Path(__file__).parent.parent
EXAMPLES = ("gated_recurrence", "fla_mixer")


@pytest.fixture
def workplace(tmp_path, monkeypatch, forget_plugins):
    """A folder of the user's, with the plugins in it, as the working directory."""
    for name in EXAMPLES:
        shutil.copy(ROOT / "examples" / f"{name}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return tmp_path


def call(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    out, err = capsys.readouterr()
    return e.value.code or 0, out, err


def built(**more) -> QiesForCausalLM:
    """A small model of the outside arm, away from its initial weights."""
    torch.manual_seed(0)
    model = QiesForCausalLM(QiesConfig(**presets.settings("gated", "50k", 97, **more))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_the_page_shows_the_code_that_is_tested_here():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)
    assert blocks == [(ROOT / "examples" / f"{name}.py").read_text() for name in EXAMPLES]


def test_a_study_with_it_is_trained_fitted_sampled_and_reported(workplace, forget_plugins, data_config, tiny, capsys):
    study = {
        "name": "outside", "plugins": ["gated_recurrence"], "arms": ["gated"], "sizes": ["50k", "100k", "200k"],
        "tokens_per_parameter": 0.012, "data": {k: v for k, v in to_dict(data_config).items() if k != "hash"},
        "train": to_dict(tiny), "prompts": ["Ada"],
    }  # fmt: skip
    (workplace / "study.yaml").write_text(yaml.safe_dump(study))
    code, out, err = call(capsys, "study", "study.yaml", "--out", "results", "--json")
    assert code == 0, err
    records = json.loads(out)
    assert [(r["arm"], r["status"], r["config"]["plugins"]) for r in records] == [
        ("gated", "done", ["gated_recurrence"])
    ] * 3
    assert all(r["params"]["gated_recurrence"] > 0 for r in records)
    fit = json.loads((workplace / "results" / "fits.json").read_text())["arms"]["gated"]["params"]
    assert fit["params"]["alpha"] == fit["params"]["alpha"]
    samples = json.loads((workplace / "results" / "samples.json").read_text())
    assert len(samples["arms"]["gated"]["continuations"]) == 1
    assert records[0]["config_hash"][:8] in (workplace / "results" / "report.html").read_text()

    forget_plugins()  # the record says what to import
    run = workplace / "results" / "runs" / records[0]["config_hash"]
    code, out, err = call(capsys, "generate", str(run), "--prompt", "Ada", "--max-new-tokens", "3")
    assert code == 0 and out.startswith("Ada"), err
    code, out, err = call(capsys, "report", "results")
    assert code == 0, err

    forget_plugins()  # and without it there is one line
    (workplace / "gated_recurrence.py").unlink()
    code, out, err = call(capsys, "generate", str(run), "--prompt", "Ada")
    assert code == 2 and err.count("\n") == 1 and "No plugin module 'gated_recurrence'" in err
    code, out, err = call(capsys, "generate", str(run / "model"), "--prompt", "Ada")
    assert code == 2 and err.count("\n") == 1 and "Unknown mixer 'gated_recurrence'" in err and "--plugin" in err


def test_plan_counts_its_parameters_flops_and_states(workplace, capsys):
    code, out, err = call(capsys, "plan", "--plugin", "gated_recurrence", "--arm", "gated", "--size", "100k", "--json")
    assert code == 0, err
    plan = json.loads(out)
    d, layers = plan["shape"]["hidden_size"], plan["shape"]["num_hidden_layers"]
    recurrent = 3 * layers // 4
    assert plan["params"]["gated_recurrence"] == recurrent * (4 * d * d + d)
    mixing = sum(plan["params"][group] for group in ("gated_recurrence", "attention"))
    assert plan["forward_flops_per_token"]["projections"] == 2 * mixing
    assert plan["forward_flops_per_token"]["convolution"] == 2 * plan["params"]["convolution"]
    assert plan["params"]["non_embedding"] == pytest.approx(100_000, rel=0.01)
    taps = 3 * d * (layers - recurrent)  # of the attention layers' convolutions
    cache = plan["inference"][0]["cache_bytes"]
    assert (cache["states"], cache["convolution"]) == (4 * recurrent * d, 2 * taps)
    assert plan["fits"] is None and plan["memory_unknown"] == (
        "the mixer 'gated_recurrence' declares no activation_bytes"
    )


def test_the_built_model_is_the_declared_one(workplace):
    plugins.load(["gated_recurrence"])
    model = built()
    values = vars(model.config)
    declared = {name: weight.shape for name, weight in model_weights(values).items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == declared
    assert presets.count_parameters(values)["total"] == sum(p.numel() for p in model.parameters())
    groups = {name.split("mixer.")[-1]: group for group, named in parameter_groups(model).items() for name, _ in named}
    assert (groups["in_proj.weight"], groups["decay_bias"], groups["out_proj.weight"]) == ("matrix", "vector", "matrix")


def test_generation_with_a_cache_is_generation_without(workplace):
    plugins.load(["gated_recurrence"])
    model = built()
    ids = torch.randint(1, 97, (3, 23), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))
    beams = {**how, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    cache = QiesCache(model.config)
    with torch.no_grad():
        whole = model(ids).logits
        parts = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([9, 1, 13], 1)], 1)
        assert torch.allclose(parts, whole, atol=1e-5)
        assert cache.state_bytes() > 0 == cache.state_bytes(entangled_only=True)
        mask = torch.ones_like(ids)
        mask[0, :5] = mask[1, 20:] = 0
        padded = model(ids.masked_fill(mask == 0, 7), attention_mask=mask).logits
        assert torch.allclose(padded[0, 5:], model(ids[:1, 5:]).logits[0], atol=1e-5)
        assert torch.allclose(padded[1, :20], model(ids[1:2, :20]).logits[0], atol=1e-5)
        texts = torch.tensor([[0] * 10 + [1] * 13])
        packed = model(ids[:1], seq_idx=texts, use_cache=False).logits[0]
        assert torch.allclose(packed[10:], model(ids[:1, 10:]).logits[0], atol=1e-5)


def test_a_saved_model_is_the_same_when_it_is_loaded(workplace, forget_plugins, tmp_path):
    plugins.load(["gated_recurrence"])
    model, ids = built(), torch.arange(1, 20)[None]
    model.save_pretrained(tmp_path / "model")
    loaded = QiesForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.layer_types == model.config.layer_types
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = QiesForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, weight in model_weights(vars(model.config)).items() if weight.fp32} != set()
    forget_plugins()
    with pytest.raises(ValueError, match=r"Unknown mixer 'gated_recurrence'.*--plugin"):
        QiesConfig.from_pretrained(tmp_path / "model")


def test_a_wrapped_operator_of_fla_follows_its_state(workplace, monkeypatch):
    found = importlib.util.find_spec("fla")
    if found is None or found.origin is None:
        pytest.skip("the definition is in the package flash-linear-attention: pip install 'qies[test]'")
    definition = runpy.run_path(str(Path(found.origin).parent / "ops" / "gla" / "naive.py"))
    package = ModuleType("fla.ops.gla")
    package.chunk_gla = definition["naive_recurrent_gla"]
    for name, module in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), ("fla.ops.gla", package)):
        monkeypatch.setitem(sys.modules, name, module)
    plugins.load(["fla_mixer"])
    values = presets.settings("gla", "50k", 97)
    torch.manual_seed(0)
    model = QiesForCausalLM(QiesConfig(**values)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert presets.count_parameters(values)["total"] == sum(p.numel() for p in model.parameters())
    ids, cache = torch.arange(1, 24)[None], QiesCache(model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([9, 1, 13], 1)], 1)
    assert torch.allclose(parts, whole, atol=1e-5)
    k, heads = values["hidden_size"] // values["num_attention_heads"], values["num_attention_heads"]
    recurrent = values["layer_types"].count("gla")
    assert forward_flops_per_token(values, 512)["gla"] == recurrent * heads * (2 * 64 * k + 4 * k * k)


def test_plugins_are_named_in_a_run_but_are_no_part_of_its_identity(workplace, forget_plugins, tmp_path):
    plain, named = RunConfig(), RunConfig(plugins=("gated_recurrence",))
    assert content_hash(plain) == content_hash(named) == "f83df5cbe46531eb"
    assert to_dict(named)["plugins"] == ["gated_recurrence"]
    study = StudyConfig(arms=("transformer", "gated"), plugins=("gated_recurrence",))
    assert {run.plugins for run in study.runs()} == {("gated_recurrence",)}
    kept = pickle.dumps(RunConfig(arm="gated", plugins=("gated_recurrence",)))
    forget_plugins()
    assert pickle.loads(kept).arm in presets.ARMS  # so a job of a cluster knows the arm
    forget_plugins()
    assert from_dict(RunConfig, {"arm": "gated", "plugins": ["gated_recurrence"]}).plugins == ("gated_recurrence",)


def test_a_study_takes_a_plugin_in_addition_and_keeps_its_runs(workplace, tmp_path):
    from qies.ladder.grid import claim

    old = StudyConfig(arms=("transformer",), sizes=("50k",))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.yaml").write_text(
        yaml.safe_dump({k: v for k, v in to_dict(old).items() if k != "plugins"})
    )
    new = dataclasses.replace(old, arms=("gated",), plugins=("gated_recurrence",))
    both = claim(new, tmp_path / "s").study
    assert (both.arms, both.plugins) == (("transformer", "gated"), ("gated_recurrence",))
    assert content_hash(old.runs()[0]) in {content_hash(run) for run in both.runs()}


def test_the_option_is_an_override_of_the_verbs_that_record_it(workplace, monkeypatch):
    seen = {}

    def train(overrides: tuple[str, ...] = (), /, arm: str = "") -> None:
        """Train."""
        seen["train"] = (overrides, arm)

    def plan(overrides: tuple[str, ...] = (), /, arm: str = "") -> None:
        """Plan."""
        seen["plan"] = (overrides, arm)

    from qies.terminal import run

    for verb in (train, plan):
        train.__annotations__["overrides"] = plan.__annotations__["overrides"] = tuple[str, ...]
        words = [verb.__name__, "--plugin", "gated_recurrence", "--arm", "gated"]
        assert run({"train": train, "plan": plan}, words, "") == 0
    assert seen == {"train": (("plugins=[gated_recurrence]",), "gated"), "plan": ((), "gated")}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--plugin", "absent.mixer", "--out", "OUT"], "No plugin module 'absent.mixer'. Install it, or run"),
        (["train", "--out", "OUT", "plugins=[absent]"], "No plugin module 'absent'"),
        (["train", "--out", "OUT", "plugins=absent"], "plugins must be a list"),
        (["plan", "--plugin", "../x.py"], "which is no module; write it as in an import"),
        (["plan", "--plugin"], "--plugin needs a module"),
        (["--plugin", "json"], "--plugin needs a verb"),
        (["plan", "--plugin", "broken"], "The plugin broken cannot be imported (ZeroDivisionError: division by zero)"),
        (["plan", "--plugin", "needs"], "The plugin needs needs the module absent, which is not installed"),
        (["plan", "--plugin", "twice"], "The mixer 'full_attention' is registered already with another declaration"),
        (["plan", "--plugin", "gated_recurrence", "--arm", "gate"], "Did you mean 'gated'"),
        (["plan", "--arm", "gated"], "Unknown arm 'gated'"),
    ],
)
def test_a_bad_plugin_is_one_line_before_anything_is_spent(argv, words, workplace, capsys):
    Path("broken.py").write_text("1 / 0\n")
    Path("needs.py").write_text("import absent\n")
    Path("twice.py").write_text(
        "import qies\nqies.register_mixer(qies.MixerSpec('full_attention', 'a:B', lambda values: {}))\n"
    )
    code, _, err = call(capsys, *argv)
    assert code == 2 and err.count("\n") == 1 and words in err
    assert not Path("OUT").exists()


def spec(name="mine", shape=(4, 4), module=f"{__name__}:Mine", **more) -> qies.MixerSpec:
    return qies.MixerSpec(name, module, lambda values: {"w": qies.Weight(shape, **more)})


class Mine(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4, 4))
        self.extra = torch.nn.Parameter(torch.zeros(2))


def test_registering_twice(forget_plugins):
    one = spec()
    qies.register_mixer(one)
    qies.register_mixer(one)
    with pytest.raises(UserError, match="'mine' is registered already"):
        qies.register_mixer(spec(shape=(2, 2)))
    qies.register_arm("own", ["mine"])
    qies.register_arm("own", ["mine"])
    with pytest.raises(UserError, match="'own' is registered already"):
        qies.register_arm("own", ["mine", "full_attention"])
    with pytest.raises(UserError, match="'qies' is registered already"):
        qies.register_arm("qies", ["mine"])


@pytest.mark.parametrize(
    ("pattern", "settings", "words"),
    [
        (["full_atention"], {}, "Unknown mixer 'full_atention'. Did you mean 'full_attention'"),
        ([], {}, "empty pattern"),
        (["full_attention"], {"rope_tetha": 1}, "Unknown field 'rope_tetha' in arm 'odd'. Did you mean 'rope_theta'"),
    ],
)
def test_an_arm_that_makes_no_sense(pattern, settings, words, forget_plugins):
    with pytest.raises(UserError, match=words):
        qies.register_arm("odd", pattern, **settings)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (spec(group="mlp"), "counts w in the group 'mlp', which is the backbone's"),
        (spec(optimizer="muon"), "with the optimizer 'muon'"),
        (spec(shape=(4,)), r"shape \[4\] with the optimizer 'matrix'"),
        (spec(shape=(4, 3)), r"declares the shape \[4, 3\] for its parameter w, but the module has the shape \[4, 4\]"),
        (spec(), r"declares nothing for its parameter extra, but the module has the shape \[2\]"),
        (spec(module="absent_module:A"), "No module 'absent_module'"),
        (spec(module=f"{__name__}:Absent"), "has no 'Absent'"),
    ],
)
def test_a_declaration_that_nothing_can_count_or_that_the_module_does_not_keep(declared, words, forget_plugins):
    qies.register_mixer(declared)
    with pytest.raises(UserError, match=words):
        QiesForCausalLM(QiesConfig(layer_types=["mine"] * 4))


def test_a_parameter_that_nothing_declares_is_never_left_out_of_the_optimizer(forget_plugins):
    model = QiesForCausalLM(QiesConfig())
    model.model.layers[0].mixer.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"No declaration names the parameter model\.layers\.0\.mixer\.extra"):
        parameter_groups(model)


def test_fields_of_its_own(forget_plugins):
    own = dataclasses.replace(
        spec(optimizer="vector"),
        fields={"mine_scale": 2.0},
        check=lambda values: None if values["mine_scale"] > 0 else "model.mine_scale must be positive.",
    )
    qies.register_mixer(own)
    qies.register_arm("own", ["mine", "full_attention"], mine_scale=3.0)
    assert presets.settings("own", "50k", 97)["mine_scale"] == 3.0
    assert presets.settings("own", "50k", 97, mine_scale=5)["mine_scale"] == 5.0
    assert "mine_scale" not in presets.settings("transformer", "50k", 97)
    assert presets.settings("transformer", "50k", 97, mine_scale=5.0)["layer_types"] == ["full_attention"] * 4
    assert QiesConfig(layer_types=["mine"] * 4).mine_scale == 2.0
    with pytest.raises(UserError, match="mine_scale must be positive"):
        presets.settings("own", "50k", 97, mine_scale=-1.0)
    with pytest.raises(ValueError, match="mine_scale must be positive"):
        QiesConfig(layer_types=["mine"] * 4, mine_scale=-1.0)
    with pytest.raises(UserError, match="must be of type float"):
        presets.settings("own", "50k", 97, mine_scale="large")
    qies.register_mixer(dataclasses.replace(own, name="other", fields={"rope_theta": 1.0}))
    with pytest.raises(UserError, match=r"'other' takes names of other fields \(rope_theta\)"):
        qies.register_arm("third", ["other"])


def test_unknown_activations_are_told_and_known_ones_counted(forget_plugins):
    declared = spec(optimizer="vector")
    qies.register_mixer(declared)
    values = {**presets.settings("transformer", "50k", 97), "layer_types": ["mine"] * 4}
    with pytest.raises(mixers.NotCounted, match="'mine' declares no activation_bytes"):
        memory.activation_bytes(values, checkpointing=False)
    mixers._SPECS["mine"] = dataclasses.replace(declared, activation_bytes=lambda values: 1000.0)
    bare = memory.block_bytes(values, "full_attention") - mixers.mixer("full_attention").kept_bytes(values)
    assert memory.block_bytes(values, "mine") == bare + 1000


def test_the_optimizers_take_momentum_and_betas_from_the_rule():
    rule = dataclasses.replace(presets.hyperparameters(100_000, 10**6), momentum=0.8, betas=(0.5, 0.6))
    muon, adam = Optimizers(QiesForCausalLM(QiesConfig()), rule, 0.01).all
    assert {group["momentum"] for group in muon.param_groups} == {0.8}
    assert {group["betas"] for group in adam.param_groups} == {(0.5, 0.6)}


def test_processes_of_a_probe_load_what_their_parent_has_loaded(workplace, forget_plugins, monkeypatch):
    from qies.probes.sweep import _start

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plugins.load(["gated_recurrence"])
    inherited = plugins.loaded()
    forget_plugins()
    assert inherited == ("gated_recurrence",) and "gated" not in presets.ARMS
    _start(inherited)
    assert "gated" in presets.ARMS


def test_a_study_file_names_them(workplace):
    Path("study.yaml").write_text("plugins: [gated_recurrence]\narms: [gated]\nsizes: [50k]\n")
    assert load(StudyConfig, "study.yaml").runs()[0].plugins == ("gated_recurrence",)


def test_no_layer_kind_is_named_where_the_registry_is_read():
    """Mixers are told apart by their declarations alone."""
    readers = SimpleNamespace(
        all=[p for p in (ROOT / "src" / "qies").rglob("*.py") if p.parent.name != "mixers" and "report" not in p.parts]
    )
    named = {p.name for p in readers.all if re.search(r"[\"'](full|linear)_attention[\"']", p.read_text())}
    assert named <= {"attention.py"}  # which counts the attention layers before its own
