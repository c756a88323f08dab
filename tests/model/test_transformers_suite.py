"""The tests that transformers runs on every model of its own, run on every arm.

`make test-all` fetches the source distribution of the installed version into .venv/sdist. It holds `ModelTesterMixin`
and `TrainingTesterMixin` but leaves out the folders of the generation and export mixins (test_generation.py here covers
generation). Each arm is one test, which runs every test of the two mixins.
"""

import importlib
import inspect
import re
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import ARMS, config
from transformers import testing_utils
from transformers.models.auto import modeling_auto

from qies.model import QiesConfig, QiesForCausalLM, QiesModel

NAME = f"transformers-{transformers.__version__}"
ARCHIVE = Path(sys.prefix) / "sdist" / f"{NAME}.tar.gz"

# Tests that cannot pass, and why. Each is run all the same and must fail, or it does not belong here.
NOT_APPLICABLE = {
    "test_num_layers_is_small": "allows two layers; a hybrid repeats after four",
    "test_generation_tester_mixin_inheritance": "asks for the generation mixin, which is not in the distribution",
}
NOT_APPLICABLE_TO_HYBRIDS = {
    "test_attention_outputs": "counts attention weights from every layer; entanglement layers have none",
}


@pytest.fixture(scope="module")
def mixins(tmp_path_factory, request):
    """The two mixins, imported from the source distribution as the package `transformers_tests`."""
    if not ARCHIVE.is_file():
        pytest.skip(f"{ARCHIVE} is missing; make test-all fetches it")
    folder = tmp_path_factory.mktemp("transformers")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, [m for m in archive if m.name.startswith(f"{NAME}/tests/")], filter="data")
    folder = folder / NAME / "tests"
    marks = inspect.getsource(testing_utils) + (folder / "test_modeling_common.py").read_text()
    for mark in {"accelerate_tests", *re.findall(r"mark\.(\w+)", marks)}:
        request.config.addinivalue_line("markers", f"{mark}: a mark of transformers")
    with pytest.MonkeyPatch.context() as patch:
        package = types.ModuleType("transformers_tests")
        package.__path__ = [str(folder)]  # type: ignore[attr-defined]
        patch.setitem(sys.modules, package.__name__, package)
        for part, name in (
            ("exporters.test_export", "ExportTesterMixin"),
            ("generation.test_utils", "GenerationTesterMixin"),
        ):
            module = types.ModuleType(f"{package.__name__}.{part}")
            setattr(module, name, type(name, (), {}))
            patch.setitem(sys.modules, module.__name__.rpartition(".")[0], types.ModuleType(part))
            patch.setitem(sys.modules, module.__name__, module)
        # By these tables the mixins tell which class takes labels and which is the base.
        patch.setitem(modeling_auto.MODEL_MAPPING_NAMES, "qies", "QiesModel")
        patch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "qies", "QiesForCausalLM")
        common = importlib.import_module("transformers_tests.test_modeling_common")
        training = importlib.import_module("transformers_tests.test_training_mixin")
        yield common.ModelTesterMixin, training.TrainingTesterMixin


class Tiny:
    """What the mixins ask of a model: a small configuration and a batch."""

    batch_size, seq_length, is_training = 3, 7, True
    base_model_class, causal_lm_class = QiesModel, QiesForCausalLM

    def __init__(self, arm: str) -> None:
        self.arm = arm
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(self.get_config(), name))

    def get_config(self) -> QiesConfig:
        return config(self.arm, max_position_embeddings=512)

    def prepare_config_and_inputs_for_common(self) -> tuple[QiesConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arm", ARMS)
def test_the_tests_of_transformers_pass(mixins, arm):
    members = {"all_model_classes": (QiesModel, QiesForCausalLM), "model_tester": Tiny(arm)}
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(type(f"Test_{arm}", (*mixins, unittest.TestCase), members))
    result = unittest.TestResult()
    suite.run(result)

    def names(of):  # a subtest counts as its test
        return {getattr(case, "test_case", case)._testMethodName: message for case, message in of}

    failed, skipped = names(result.failures + result.errors), names(result.skipped)
    passed = result.testsRun - len(failed.keys() | skipped.keys())
    print(
        f"\n{arm}: {passed} passed, {len(skipped)} skipped by transformers, {len(failed)} failed of {result.testsRun}"
    )
    expected = NOT_APPLICABLE | (NOT_APPLICABLE_TO_HYBRIDS if "linear_attention" in config(arm).layer_types else {})
    unexpected = {name: trace for name, trace in failed.items() if name not in expected}
    assert not unexpected, "\n".join(unexpected.values())
    assert expected.keys() <= failed.keys(), "tests that are said not to apply have passed"
    assert passed > 80  # a suite that skips everything would tell nothing
