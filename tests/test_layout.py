"""Imports point one way, and the published names stay importable."""

import ast
import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "emmental"
SCRIPTS = {
    "masked_run_squad",
    "masked_run_glue",
    "counts_parameters",
    "bertarize",
    "saving_prunebert",
    "paper_tables",
}
LEAVES = {"errors", "files", "hardware", "launcher"}  # of the standard library alone
SCIENCE = {"modules", "schedule", "steering", "losses"}
STATEMENTS = {
    path.stem for kind in ("configuration", "modeling") for path in PACKAGE.glob(f"{kind}_*.py")
}
MODELS = {"families"} | STATEMENTS
ALLOWED = {  # part: (parts of emmental it may import, third-party libraries; None: any)
    **{leaf: (LEAVES, set()) for leaf in LEAVES},
    "modules": ({"modules"}, {"torch", "numpy"}),
    "schedule": (set(), set()),
    "steering": (set(), set()),
    "losses": ({"modules"}, {"torch"}),
    "inputs": (set(), {"transformers"}),
    "families": ({"modules"}, {"torch", "transformers"}),
    **{part: (MODELS | {"modules"}, {"torch", "transformers"}) for part in STATEMENTS},
    "export": ({"modules"} | MODELS, {"torch", "transformers"}),
    "tokenizer": (LEAVES, {"tokenizers", "transformers"}),
    "configs": (LEAVES | {"families"}, {"transformers"}),
    "labels": (LEAVES | {"configs"}, {"torch", "transformers"}),
    "loading": (LEAVES | {"configs", "labels", "modules"} | MODELS, {"torch", "transformers"}),
    "card": (
        LEAVES | {"modules", "export", "configuration_bert_compact"},
        {"transformers", "huggingface_hub"},
    ),
    "data": (LEAVES | {"data", "inputs"}, None),
    "training": (
        LEAVES
        | SCIENCE
        | MODELS
        | {"card", "configs", "export", "inputs", "labels", "loading", "tokenizer", "training"},
        None,
    ),
    "coding": (LEAVES, {"numpy", "constriction"}),
    "inference": (
        LEAVES | {"modules", "export", "inference", "inputs"} | MODELS,
        {"torch", "transformers", "numpy", "scipy", "onnxruntime"},
    ),
    "embeddings": (LEAVES | {"configs", "families"}, {"torch", "transformers"}),
    "storage": (
        LEAVES
        | {"card", "coding", "embeddings", "export", "inference", "loading", "tokenizer"}
        | MODELS,
        {"torch", "transformers", "numpy", "scipy"},
    ),
    "tables": (
        LEAVES | {"tables", "data", "export", "families", "loading", "modules", "training"},
        {"torch", "matplotlib", "numpy", "scipy", "sklearn"},
    ),
}
TASKS = {"squad", "glue", "cola", "sst", "mrpc", "sts", "qqp", "mnli", "qnli", "rte", "wnli"}


def part_of(path):
    """First name below `emmental` of a source file."""
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


def test_every_part_is_known():
    assert {part_of(path) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts, libraries = ALLOWED[part_of(path)]
    names = list(imported(path))
    ours = {name.split(".")[1] for name in names if name.split(".")[0] == "emmental"}
    assert ours <= parts
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


HEADS = ["QuestionAnswering", "SequenceClassification", "TokenClassification", "MultipleChoice"]


@pytest.mark.parametrize(
    "module, names",
    [
        (
            "emmental",
            [
                *("MaskedBertConfig", "MaskedBertModel", "MaskedLinear"),
                *(f"MaskedBertFor{head}" for head in HEADS),
                *("TopKBinarizer", "ThresholdBinarizer", "MagnitudeBinarizer"),
            ],
        ),
        (
            "emmental.modules",
            ["TopKBinarizer", "ThresholdBinarizer", "MagnitudeBinarizer", "MaskedLinear"],
        ),
        (
            "emmental.modules.binarizer",
            ["TopKBinarizer", "ThresholdBinarizer", "MagnitudeBinarizer"],
        ),
        ("emmental.modules.masked_nn", ["MaskedLinear", "compute_mask"]),
        ("emmental.configuration_bert_masked", ["MaskedBertConfig"]),
        (
            "emmental.modeling_bert_masked",
            ["MaskedBertModel", *(f"MaskedBertFor{head}" for head in HEADS)],
        ),
        ("emmental.schedule", ["schedule_threshold"]),
        ("emmental.losses", ["regularization", "distillation_loss"]),
        ("emmental.training.optim", ["build_optimizer"]),
        ("emmental.storage", ["load_packed"]),
        ("emmental.inference", ["sparsify"]),
    ],
)
def test_public_names(module, names):
    found = importlib.import_module(module)
    for name in names:
        assert callable(getattr(found, name))
    if hasattr(found, "__all__"):
        assert set(names) <= set(found.__all__)


def test_functions_and_files_are_short():
    for file in [*SOURCES, *ROOT.glob("*.py")]:
        text = file.read_text()
        assert len(text.splitlines()) <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"
