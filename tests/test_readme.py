"""What README and docs say can be typed, can be typed."""

import argparse
import csv
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest
from conftest import launch

import bertarize
import counts_parameters
import masked_run_glue
import masked_run_ner
import masked_run_squad
import paper_tables
import saving_prunebert
from emmental.training.checks import check_common_arguments
from paper.points import TASKS, find_point

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
README, ALL = TEXTS["README.md"], "\n".join(TEXTS.values())
SCRIPTS = [masked_run_squad, masked_run_glue, masked_run_ner, counts_parameters, bertarize]
SCRIPTS = {script.__name__: script for script in [*SCRIPTS, saving_prunebert, paper_tables]}
BENCHMARKS = "training_step launches selection features scale storage inference compact".split()
VARIABLES = {"SERIALIZATION_DIR": "runs/x", "SQUAD_DATA": "data/squad", "GLUE_DATA": "glue"}
VARIABLES |= {"TEACHER": "runs/teacher"}


def commands(folder=""):
    """Script and flags of every command in a bash block; folder: of the script."""
    for block in re.findall(r"```bash\n(.*?)```", ALL, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0]
            if match := re.match(rf"python {folder}(\w+)\.py ?(.*)", line.strip()):
                yield match[1], match[2]


def split(flags):
    for variable, value in VARIABLES.items():
        flags = flags.replace(f"${variable}", value)
    return shlex.split(flags)


COMMANDS = list(commands())


def test_the_four_published_commands_are_there():
    sign = "--warmup_steps 5400"
    pruning = [flags for _, flags in COMMANDS if sign in flags and "masked_bert" in flags]
    methods = [re.search(r"--pruning_method (\w+)", flags)[1] for flags in pruning]
    assert methods == ["topK", "sigmoied_threshold", "l0", "magnitude"]


def test_the_points_of_paper_md_are_the_papers():
    """Commands of MNLI and QQP are printed by paper_tables.py; the page names the points."""
    titles = {"teacher": "dense", "L0": "l0"}
    points = TEXTS["docs/paper.md"].partition("## Points")[2]
    header, _, *rows = re.findall(r"^\|(.*)\|$", points, re.M)[:5]
    methods = [titles.get(name.strip(), name.strip()) for name in header.split("|")[1:]]
    assert methods == ["dense", "movement", "soft movement", "l0", "magnitude"]
    for row, task in zip(rows, TASKS, strict=True):
        task_and_metrics, *cells = row.split("|")
        assert task_and_metrics.strip().startswith(f"{task}, ")
        for method, cell in zip(methods, cells, strict=True):
            point = find_point(task, re.search("`(.*)`", cell)[1])
            figures = "/".join(f"{value:.1f}" for value in point.metrics.values())
            at = "" if method == "dense" else f" at {point.remaining:.1f}%"
            assert cell.strip() == f"`{point.name}` {figures}{at}"
            assert point.method == method and point.distil == (method != "dense")


def test_the_commands_of_paper_md_are_those_that_are_printed(capsys):
    paper_tables.main(["command", "mnli", "10D3", "--data_dir", "glue/MNLI"])
    printed = capsys.readouterr().out.splitlines()
    found = [split(flags) for name, flags in COMMANDS if "runs/mnli/" in flags]
    assert found == [shlex.split(line)[2:] for line in printed]


@pytest.mark.parametrize("name, flags", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_parse(name, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = SCRIPTS[name].get_parser()
    args = parser.parse_args(split(flags))
    if name.startswith("masked_run"):
        assert check_common_arguments(args) == []
    if name == "masked_run_glue":
        Path(args.data_dir).mkdir(parents=True)
        assert masked_run_glue.Glue().check(args) == []
    if name == "masked_run_ner":
        assert masked_run_ner.Tagging().check(args) == []


def test_benchmark_commands_parse(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = list(commands("benchmarks/"))
    assert {name for name, _ in found} == set(BENCHMARKS)
    for name, flags in found:
        importlib.import_module(name).get_parser().parse_args(split(flags))


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }, link


def test_every_flag_of_the_readme_exists():
    parsers = [script.get_parser() for script in SCRIPTS.values()]
    parsers += [importlib.import_module(name).get_parser() for name in BENCHMARKS]
    known = set()
    for parser in parsers:
        for action in parser._actions:
            known |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for verb in action.choices.values():
                    known |= {flag for each in verb._actions for flag in each.option_strings}
    known |= {f"--{name}" for name in "nproc_per_node nnodes node_rank master_addr".split()}
    known |= {"--master_port", "--logdir"}
    known |= {"--hypothesis", "--score_memory"}  # -profile, of pytest; of docs/extending.md
    page = TEXTS["docs/coming-from.md"]  # the first column of its tables has the flags of others
    text = ALL.replace(page, re.sub(r"^\|[^|]*", "", page, flags=re.M))
    assert set(re.findall(r"--[a-z_0-9]+", text)) <= known


def table_of(text, start):
    """The rows of the first Markdown table after `start`, as lists of cells without bold."""
    lines = text[text.index(start) :].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return [[c.strip(" *") for c in row.strip("|").split("|")] for row in rows if "---" not in row]


def test_the_readme_is_short_and_its_figures_are_those_of_results():
    assert len(README.splitlines()) <= 160
    header, *rows = table_of(README, "Ours on SST-2")
    short = table_of((ROOT / "results" / "README.md").read_text(), "## From the dense model")
    methods = {"magnitude": 0, "movement": 1, "soft movement": 2, "recipe": 3}
    short = {row[0]: row[1:] for row in short if row[0] in methods}
    for level, row in enumerate(rows[:2]):
        assert row[1:] == [short[name][level] for name in methods], row
    with open(ROOT / "results" / "long" / "runs.csv", newline="") as file:
        runs = [run for run in csv.DictReader(file) if not run["folder"].endswith("fast")]
    for level, row in zip((10, 3), rows[2:], strict=True):
        for name, cell in zip(header[1:], row[1:], strict=True):
            figures = [
                float(run["metrics"].removeprefix("acc "))
                for run in runs
                if (run["method"], run["updates"]) == (name, "30000")
                and round(float(run["of the Linears %"])) == level
            ]
            shown = [float(figure) for figure in cell.split(",") if figure]
            assert shown == pytest.approx(figures, abs=0.0501), (name, level)


def test_the_file_tree_is_true():
    tree = re.search(r"## Files\n+```\n(.*?)```", README, re.S)[1]
    folders = {}  # indentation: folder that is open there
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = {depth: folder for depth, folder in folders.items() if depth < indent}
        entry = re.split(r"\s{2,}", line.strip())[0]
        names = [name for name in entry.split(", ") if re.search(r"\.\w+$|/$", name)]
        assert names, line
        for name in names:
            assert Path(ROOT, *folders.values(), name).exists(), name
        if len(names) == 1 and entry.endswith("/"):
            folders[indent] = entry


def test_help_says_what_a_flag_is_for(capsys):
    for script in SCRIPTS.values():
        for action in script.get_parser()._actions:
            assert action.help, action.option_strings
        with pytest.raises(SystemExit) as stop:
            script.main(["--help"])
        assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "(default: 0.7)" in said and "(default: 0.0)" in said


EXTENDED = """
import sys
from pathlib import Path
import transformers
from emmental.modules import find_masks, masked_layers
from emmental.training.flags import make_parser
from emmental.modules import observe_scores

for method in "sign_movement", "peak":
    layer = MaskedLinear(6, 4, mask_init="uniform", mask_scale=1.0, pruning_method=method)
    assert find_masks(layer, 0.5).by_layer[""].sum() == 12
    before = layer.mask_scores.detach().clone()
    layer.train()(torch.randn(3, 6), threshold=0.5).sum().backward()
    if method == "peak":
        observe_scores(masked_layers(layer), torch.amp.GradScaler("cpu", enabled=False), False)
        assert layer.mask_scores.grad is None and not torch.equal(layer.mask_scores, before)
    else:
        assert layer.mask_scores.grad.abs().unique().tolist() == [1.0]
assert make_parser(Summaries(), "x").parse_args(
    '''--data_dir x --model_type masked_bert --model_name_or_path x --output_dir x
    --pruning_method peak'''.split()
)

layer = MaskedLinear(8, 6, mask_init="uniform", mask_scale=1.0, granularity="row")
layer(torch.randn(5, 8), threshold=0.5).sum().backward()
assert layer.mask_scores.shape == layer.mask_scores.grad.shape == (6,)
assert model[0].mask_scores.grad.shape == (16,)

parser = make_parser(Summaries(), "x")
words = "--data_dir x --model_type masked_bert --model_name_or_path x --output_dir x"
assert parser.parse_args([*words.split(), "--granularity", "row"]).granularity == "row"

sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
kind = transformers.CONFIG_MAPPING["masked_ernie"]
config = kind(vocab_size=30, **sizes, granularity="structure")
ernie = transformers.AutoModel.from_config(config)
shapes = {n: p.shape for n, p in ernie.named_parameters() if n.endswith("mask_scores")}
assert [*shapes.values()] == [(2,), (16,)], shapes
config.granularity = "row"
ids = torch.arange(5, 15)[None]
for auto in transformers.AutoModel, transformers.AutoModelForQuestionAnswering:
    ernie = auto.from_config(config)
    assert type(ernie).__name__.startswith("MaskedErnie")
    assert ernie(ids, threshold=0.5)[0].shape[:2] == (1, 10)
assert type(ernie) is MaskedErnieForQuestionAnswering

place = Path(sys.argv[1])
words = "[PAD] [UNK] [CLS] [SEP] [MASK] ada ben lives in oslo rome ##me".split()
vocabulary = {word: n for n, word in enumerate(words)}
transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(place / "bert")
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
transformers.BertModel(config).save_pretrained(place / "bert")
rows = "text\\tsummary\\tcontent\\twording\\nada lives in oslo\\tada in rome\\t1\\t2.5\\n"
rows += "ben lives in oslo\\tben lives\\t3\\t-2\\n"
for split in "train", "dev":
    (place / f"{split}.tsv").write_text(rows)
flags = f'''--model_type masked_bert --do_train --do_eval --do_lower_case --max_seq_length 16
    --max_steps 3 --final_threshold 0.5 --pruning_method peak --no_cuda
    --data_dir {place} --model_name_or_path {place / "bert"} --output_dir {place / "out"}'''
results = main(flags.split())
assert -1 <= results["pearson_wording"] <= 1 and abs(results["remaining_percent_linear"] - 50) < 1
"""


def test_the_changes_of_extending_run(tmp_path):
    """In a process of their own, in order and in one namespace, as registrations last."""
    blocks = re.findall(r"```python\n(.*?)```", TEXTS["docs/extending.md"], re.S)
    assert len(blocks) >= 6
    script = tmp_path / "extended.py"
    script.write_text("\n".join([*blocks, EXTENDED]), encoding="utf-8")
    done = launch(script, tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", TEXTS)
def test_python_blocks_compile(name):
    for block in re.findall(r"```python\n(.*?)```", TEXTS[name], re.S):
        compile(block, name, "exec")
