"""Run transformers' own model tests on the masked classes, and on the stock classes beside them.

    pip install parameterized
    python tests/stress/transformers_tests.py               # bert and roberta: 3 minutes
    python tests/stress/transformers_tests.py electra albert

The tests are those of the source distribution of the installed version, which pip downloads. It
lacks what they use to test generation and export, which no class here has. Prints what the masked
classes fail, and what they alone skip. Exit status 1 if the stock classes pass what they fail, or
if no test ran.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tiny

import emmental  # noqa: F401, registers the masked classes
from emmental.models.families import FAMILIES, HEADS, MASKED

SOURCE, TYPES = "TRANSFORMERS_SOURCE", "MODEL_TYPES"  # environment variables for pytest
KINDS = ("Stock", "Masked")


def fetch(folder: str) -> Path:
    """The unpacked source distribution of the installed transformers."""
    name = f"transformers=={transformers.__version__}"
    flags = "--quiet --no-deps --no-build-isolation --no-binary :all:".split()
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *flags, "-d", folder, name], check=True
    )
    (archive,) = Path(folder).glob("transformers-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


class Results:
    """Collects the outcome of each test, as a plugin of pytest."""

    def __init__(self):
        self.outcomes, self.reasons = {}, {}

    def pytest_runtest_logreport(self, report):
        key = tuple(report.nodeid.rsplit("::", 2)[1:])
        if report.outcome != "passed" or report.when == "call":
            if self.outcomes.get(key) != "failed":  # a test fails with one of its subtests
                self.outcomes[key] = report.outcome
            lines = [x for x in report.longreprtext.splitlines() if x.startswith("E ")]
            if report.outcome == "skipped":
                lines = [f" {report.longrepr[-1]}"]
            self.reasons.setdefault(key, []).extend(line[1:].strip() for line in lines[:1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}")
    model_types = parser.parse_args().families or ["bert", "roberta"]
    if unknown := {*model_types} - {*FAMILIES}:
        parser.error(
            f"unknown family {', '.join(sorted(unknown))}: choose of {', '.join(FAMILIES)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {SOURCE: str(fetch(folder)), TYPES: " ".join(model_types)}
        results = Results()
        quiet = "--tb=short -q --no-header --disable-warnings -p no:cacheprovider -n 0".split()
        pytest.main([__file__, *quiet], plugins=[results])
    if not results.outcomes:
        print("no test ran: see above")
        return 1
    worse = 0
    for model_type in model_types:
        stock, masked = (
            {test: o for (k, test), o in results.outcomes.items() if k == f"{kind}_{model_type}"}
            for kind in KINDS
        )
        counts = [
            [list(o.values()).count(x) for x in ("passed", "failed", "skipped")]
            for o in (stock, masked)
        ]
        for kind, (passed, failed, skipped) in zip(KINDS, counts, strict=True):
            print(
                f"{model_type}, {kind.lower()}: {passed} passed, {failed} failed, {skipped} skipped"
            )
        for test in (t for t in masked if masked[t] != "passed"):
            same = stock.get(test) == masked[test]
            if same and masked[test] == "skipped":
                continue
            worse += not same and masked[test] == "failed"
            reasons = "; ".join(dict.fromkeys(results.reasons[f"Masked_{model_type}", test]))
            print(f"  {test} {masked[test]}{' (stock too)' * same}: {reasons[:300]}")
    return int(bool(worse))


def define(source: str, model_types: list[str]) -> None:
    """Make the test classes, which pytest collects from this module."""
    package = types.ModuleType("transformers_tests_source")
    package.__path__ = [f"{source}/tests"]
    sys.modules[package.__name__] = package
    for missing, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
        ("utils.test_configuration_utils", None),
    ):
        module = types.ModuleType(f"{package.__name__}.{missing}")
        setattr(module, mixin or "config_common_kwargs", type(mixin, (), {}) if mixin else {})
        parent = module.__name__.rpartition(".")[0]
        sys.modules |= {module.__name__: module, parent: types.ModuleType(parent)}
    from transformers.models.auto import modeling_auto
    from transformers_tests_source.test_modeling_common import ModelTesterMixin, ids_tensor

    class Tester:
        """A tiny model and a batch for it."""

        batch_size, seq_length, num_choices, is_training = 3, 7, 3, True
        vocab_size, hidden_size = tiny.SIZES["vocab_size"], tiny.SIZES["hidden_size"]
        num_hidden_layers = tiny.SIZES["num_hidden_layers"]
        num_attention_heads = tiny.SIZES["num_attention_heads"]

        def __init__(self, config_class):
            self.config_class = config_class

        def get_config(self):
            masked = self.config_class.model_type.startswith(MASKED)
            masks = {"threshold": 0.5, "mask_init": "uniform", "mask_scale": 1.0} if masked else {}
            return self.config_class(**tiny.SIZES, pad_token_id=1, **masks)

        def prepare_config_and_inputs_for_common(self):
            ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}

    for model_type in model_types:
        for kind, prefix in zip(KINDS, ("", MASKED), strict=True):
            config_class = transformers.CONFIG_MAPPING[prefix + model_type]
            autos = [transformers.AutoModel]
            autos += [getattr(transformers, f"AutoModelFor{head}") for head in HEADS]
            mappings = [auto._model_mapping for auto in autos]
            classes = tuple(m[config_class] for m in mappings if config_class in m)
            for each in classes:  # the tests know a head by its name in these tables
                table = re.sub(r"(?<!^)([A-Z])", r"_\1", each.__name__.partition("For")[2]).upper()
                table = f"MODEL_FOR_{table}_MAPPING_NAMES" if table else "MODEL_MAPPING_NAMES"
                getattr(modeling_auto, table)[config_class.model_type] = each.__name__

            def setup(self, config_class=config_class):
                self.model_tester = Tester(config_class)

            members = {"all_model_classes": classes, "setUp": setup}
            name = f"{kind}_{model_type}"
            globals()[name] = type(name, (ModelTesterMixin, unittest.TestCase), members)


if SOURCE in os.environ:
    define(os.environ[SOURCE], os.environ[TYPES].split())
elif __name__ == "__main__":
    sys.exit(main())
