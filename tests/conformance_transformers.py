"""
transformers' own tests of a model, which its source distribution brings, on the network of this repository.

    python tests/conformance_transformers.py                     those of the installed release
    python tests/conformance_transformers.py -k resize           arguments are pytest's
    TRANSFORMERS_SOURCE=FOLDER python tests/conformance_transformers.py
                                                                 a checkout of its repository at the same release

The source distribution has the tests of modelling, but not tests/generation and tests/exporters: those run with a
checkout only. The distribution is downloaded once, into .cache/.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from conformance import SETTINGS  # noqa: E402
from conftest import TINY, configuration_qwen, modeling_qwen, random_ids, torch, transformers  # noqa: E402

# What the suite imports and the source distribution lacks: (module, class whose tests then don't run).
LEFT_OUT = (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin"))


def source() -> Path:
    """The folder of transformers' tests."""
    checkout = os.environ.get("TRANSFORMERS_SOURCE")
    if checkout:
        return Path(checkout) / "tests"
    name = f"transformers-{transformers.__version__}"
    folder = ROOT / ".cache" / "transformers-source"
    if not (folder / name / "tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        release = f"transformers=={transformers.__version__}"
        subprocess.run([*pip, "--no-build-isolation", release, "--dest", folder], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder)
    return folder / name / "tests"


def suite():
    """The module test_modeling_common; what it lacks is an empty class, so that nothing pretends to be tested."""
    folder = source()
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(folder)]
    sys.modules["transformers_tests"] = package
    for module, name in LEFT_OUT:
        path = folder / (module.replace(".", "/") + ".py")
        if not path.exists():
            stub = types.ModuleType(f"transformers_tests.{module}")
            setattr(stub, name, type(name, (), {}))
            parent = types.ModuleType(stub.__name__.rpartition(".")[0])
            sys.modules[parent.__name__], sys.modules[stub.__name__] = parent, stub
    return importlib.import_module("transformers_tests.test_modeling_common")


def register() -> None:
    """The tables in which the suite looks a model up."""
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    tables.MODEL_MAPPING_NAMES["qwen"] = "QWenModel"
    tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["qwen"] = "QWenLMHeadModel"
    transformers.AutoConfig.register("qwen", configuration_qwen.QWenConfig, exist_ok=True)
    transformers.AutoModel.register(configuration_qwen.QWenConfig, modeling_qwen.QWenModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(
        configuration_qwen.QWenConfig, modeling_qwen.QWenLMHeadModel, exist_ok=True
    )


class SmallModel:
    """The small model and its inputs, under the names that the suite reads."""

    base_model_class = modeling_qwen.QWenModel
    causal_lm_class = modeling_qwen.QWenLMHeadModel
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, vocab_size = TINY["hidden_size"], TINY["vocab_size"]
    num_hidden_layers, num_attention_heads = 2, TINY["num_attention_heads"]

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        values = {**TINY, "num_hidden_layers": self.num_hidden_layers, "initializer_range": 0.02}
        return configuration_qwen.QWenConfig(**{**values, "seq_length": 512, "max_position_embeddings": 512})

    def prepare_config_and_inputs(self):
        ids = random_ids(self.batch_size, self.seq_length, vocab_size=self.vocab_size)
        return self.get_config(), ids, torch.ones_like(ids)

    def prepare_config_and_inputs_for_common(self):
        config, ids, mask = self.prepare_config_and_inputs()
        return config, {"input_ids": ids, "attention_mask": mask}


common = suite()
register()


class TestQWen(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (modeling_qwen.QWenModel, modeling_qwen.QWenLMHeadModel)

    def setUp(self):
        self.model_tester = SmallModel(self)

    @unittest.skipIf(not hasattr(common.GenerationTesterMixin, "test_greedy_generate"), "needs TRANSFORMERS_SOURCE")
    def test_generation_tests_are_there(self):
        """So that their absence shows among the skipped."""

    if not hasattr(common.GenerationTesterMixin, "test_greedy_generate"):

        def test_generation_tester_mixin_inheritance(self):
            """Asks for the class that the source distribution leaves out."""
            pytest.skip("needs TRANSFORMERS_SOURCE")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *map(str, SETTINGS), *sys.argv[1:]]))
