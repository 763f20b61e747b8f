"""Imports point one way, and the published names stay importable."""

import ast
import importlib
import pathlib
import sys
import warnings

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "emmental"
SCRIPTS = "masked_run_squad masked_run_glue masked_run_ner counts_parameters bertarize"
SCRIPTS += " saving_prunebert paper_tables"
SCRIPTS = set(SCRIPTS.split())
ALLOWED = {  # room: (rooms of emmental it may import, third-party libraries; None: any)
    "system": (set(), set()),
    "modules": (set(), {"torch", "numpy"}),
    "schedule": (set(), set()),
    "steering": (set(), set()),
    "losses": ({"modules"}, {"torch"}),
    "models": ({"modules"}, {"torch", "transformers"}),
    "configuration_bert_masked": ({"models"}, set()),
    "modeling_bert_masked": ({"models"}, set()),
    "compact": ({"models"}, {"torch", "transformers", "numpy", "scipy"}),
    "checkpoints": ({"system", "modules", "models", "compact"}, None),
    "data": ({"system", "models"}, None),
    "inference": (
        {"system", "modules", "models", "compact", "checkpoints"},
        {"torch", "transformers", "numpy", "scipy", "onnxruntime"},
    ),
    "packing": (
        {"system", "models", "checkpoints", "inference"},
        {"torch", "transformers", "numpy", "scipy", "constriction"},
    ),
    "storage": ({"packing"}, set()),
    "training": (
        {"system", "modules", "schedule", "steering", "losses"}
        | {"models", "checkpoints", "inference"},
        None,
    ),
}
TASKS = {"squad", "glue", "cola", "sst", "mrpc", "sts", "qqp", "mnli", "qnli", "rte", "wnli"}
TASKS |= {"ner", "conll", "tags"}


def room_of(path):
    """The first name below `emmental` of a source file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Absolute dotted names of all that a source file imports, at any depth."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_is_known():
    assert {room_of(path) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    rooms, libraries = ALLOWED[room_of(path)]
    names = list(imported(path))
    ours = {name.split(".")[1] for name in names if name.split(".")[0] == "emmental"}
    assert ours <= rooms | {room_of(path)}
    assert not {name.split(".")[0] for name in names} & SCRIPTS
    if libraries is not None:
        assert {name.split(".")[0] for name in names} <= libraries | sys.stdlib_module_names | {
            "emmental"
        }


def test_relative_imports_are_resolved():
    assert "emmental.modules.masks.masked_layers" in imported(PACKAGE / "losses.py")
    assert "emmental.training.guards.GradientGuard" in imported(PACKAGE / "training" / "loop.py")


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "training").glob("*.py")), ids=lambda path: path.name
)
def test_training_knows_no_task(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names |= {
            name
            for name in (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
            if name
        }
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names.add(node.value)
    words = {word for name in names for word in name.lower().replace("-", "_").split("_")}
    assert not words & TASKS


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_a_script(path):
    assert not {name.split(".")[0] for name in imported(path)} & SCRIPTS


BINARIZERS = "TopKBinarizer ThresholdBinarizer MagnitudeBinarizer"
HEADS = "QuestionAnswering SequenceClassification TokenClassification MultipleChoice".split()
MODELS = " ".join(["MaskedBertModel", *(f"MaskedBertFor{head}" for head in HEADS)])


@pytest.mark.parametrize("module, names", [
    ("emmental", f"MaskedBertConfig MaskedLinear {MODELS} {BINARIZERS}"),
    ("emmental.modules", f"MaskedLinear {BINARIZERS}"),
    ("emmental.modules.binarizer", BINARIZERS),
    ("emmental.modules.masked_nn", "MaskedLinear compute_mask"),
    ("emmental.configuration_bert_masked", "MaskedBertConfig"),
    ("emmental.modeling_bert_masked", MODELS),
    ("emmental.schedule", "schedule_threshold"),
    ("emmental.losses", "regularization distillation_loss"),
    ("emmental.training.optim", "build_optimizer"),
    ("emmental.storage", "load_packed"),
    ("emmental.inference", "sparsify"),
])  # fmt: skip
def test_public_names(module, names):
    module, names = importlib.import_module(module), names.split()
    for name in names:
        assert callable(getattr(module, name))
    if hasattr(module, "__all__"):
        assert set(names) <= set(module.__all__)


def test_functions_and_files_are_short():
    for file in [*SOURCES, *ROOT.glob("*.py"), *ROOT.glob("paper/*.py")]:
        text = file.read_text()
        if len(text.splitlines()) > 500:
            warnings.warn(f"{file} has more than 500 lines", stacklevel=1)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                warnings.warn(f"{file}: {node.name} has more than 80 lines", stacklevel=1)
