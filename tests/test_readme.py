"""What the README says can be typed, can be typed."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import bertarize
import counts_parameters
import masked_run_glue
import masked_run_squad
import paper_tables
import saving_prunebert
from emmental.training.args import check_common_arguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    script.__name__: script
    for script in (masked_run_squad, masked_run_glue, counts_parameters, bertarize, saving_prunebert, paper_tables)
}
VARIABLES = {"SERIALIZATION_DIR": "runs/x", "SQUAD_DATA": "data/squad", "GLUE_DATA": "glue", "TEACHER": "runs/teacher"}


def commands():
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0]
            if match := re.match(r"python (\w+)\.py (.*)", line.strip()):
                yield match[1], match[2]


COMMANDS = list(commands())


def test_the_four_published_commands_are_there():
    for sign in "--warmup_steps 5400", "--task_name mnli", "--task_name qqp":
        pruning = [flags for _, flags in COMMANDS if sign in flags and "masked_bert" in flags]
        methods = [re.search(r"--pruning_method (\w+)", flags)[1] for flags in pruning]
        assert methods == ["topK", "sigmoied_threshold", "l0", "magnitude"]


@pytest.mark.parametrize("name, flags", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_parse(name, flags, tmp_path, monkeypatch):
    for variable, value in VARIABLES.items():
        flags = flags.replace(f"${variable}", value)
    monkeypatch.chdir(tmp_path)
    parser = SCRIPTS[name].get_parser()
    args = parser.parse_args(shlex.split(flags))
    given = parser.given(shlex.split(flags))
    if name.startswith("masked_run"):
        assert check_common_arguments(args, given) == []
    if name == "masked_run_glue":
        Path(args.data_dir).mkdir(parents=True)
        assert masked_run_glue.check_glue_arguments(args, given) == []


def test_every_flag_of_the_readme_exists():
    parsers = [script.get_parser() for script in SCRIPTS.values()]
    parsers += [importlib.import_module(name).get_parser() for name in ("training_step", "features", "scale", "storage", "inference")]
    known = set()
    for parser in parsers:
        for action in parser._actions:
            known |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                known |= {flag for verb in action.choices.values() for a in verb._actions for flag in a.option_strings}
    known |= {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--logdir"}
    known |= {"--hypothesis"}  # -profile, of pytest
    assert set(re.findall(r"--[a-z_0-9]+", README)) <= known


def test_the_file_tree_is_true():
    tree = re.search(r"## Files\n+```\n(.*?)```", README, re.S)[1]
    folder = ""
    for line in tree.splitlines():
        entry = line.split("  ")[0] if not line.startswith("  ") else line.strip().split("   ")[0]
        for name in entry.split(", "):
            path = ROOT / (folder if line.startswith("  ") else "") / name.strip()
            assert path.exists(), path
        if not line.startswith("  ") and entry.endswith("/"):
            folder = entry


def test_help_says_what_a_flag_is_for(capsys):
    for script in SCRIPTS.values():
        for action in script.get_parser()._actions:
            assert action.help, action.option_strings
        with pytest.raises(SystemExit) as stop:
            script.main(["--help"])
        assert stop.value.code == 0
    assert "(default: 0.7)" in capsys.readouterr().out
