"""Hidden-state distillation, `--alpha_hidden`."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import same, weights
from transformers import BertForQuestionAnswering

import masked_run_squad
from emmental.training.hidden import PROJECTION, hidden_distillation_loss

ROOT = Path(__file__).parent.parent
WIDTHS = {"same": {}, "wider": {"hidden_size": 48}, "deeper": {"num_hidden_layers": 5}}


@pytest.fixture
def teachers(tmp_path, tiny_tokenizer):
    """Folders of teachers: one of the student's size, a wider and a deeper one."""
    folders = {}
    for seed, (name, sizes) in enumerate(WIDTHS.items(), 5):
        model = tiny.plain_bert(seed=seed, **sizes)
        folders[name] = tiny.save(model, tmp_path / f"{name}_teacher", tiny_tokenizer)
    return folders


@pytest.fixture
def flags(flags, teachers):
    """The command line of a run with a teacher."""

    def make(name, *more, teacher="same", **options):
        own = (
            f"--do_train --teacher_type bert --teacher_name_or_path {teachers[teacher]}",
            "--final_threshold 0.3 --logging_steps 1 --save_steps 0 --per_gpu_train_batch_size 6",
            "--alpha_hidden 0.5 --alpha_ce 0.2 --alpha_distil 0.3",
        )
        return flags(name, *own, *more, **options)

    return make


def curves(folder):
    return {tag: list(values.values()) for tag, values in tiny.scalars(folder).items()}


def plain_loss(student, teacher, mask, projection=None):
    """The loss in loops over layers, examples and tokens."""
    layers = []
    for number, ours in enumerate(student, 1):
        place = next(k for k in range(1, 99) if k * len(student) >= number * len(teacher))
        theirs, examples = teacher[place - 1], []
        for example in range(len(mask)):
            errors = []
            for token in np.flatnonzero(mask[example]):
                vector = ours[example][token]
                vector = vector if projection is None else projection @ vector
                errors.append(((vector - theirs[example][token]) ** 2).mean())
            examples.append(np.mean(errors))
        layers.append(np.mean(examples))
    return np.mean(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "depth, teacher_depth, teacher_width",
    [(3, 3, 6), (3, 6, 6), (3, 4, 6), (5, 12, 6), (4, 2, 6), (1, 7, 9), (3, 5, 4)],
)
def test_the_loss_is_the_mean_over_tokens_examples_and_layers(
    depth, teacher_depth, teacher_width, dtype
):
    random = np.random.default_rng(depth)
    student, teacher = (
        [torch.tensor(random.normal(size=(3, 5, width))).to(dtype) for _ in range(layers)]
        for layers, width in ((depth, 6), (teacher_depth, teacher_width))
    )
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    projection = torch.nn.Linear(6, teacher_width, bias=False) if teacher_width != 6 else None
    loss = hidden_distillation_loss(student, teacher, torch.tensor(mask), projection)
    choices = torch.tensor(mask)[None]  # (batch, choices, length), as of a multiple choice
    assert torch.equal(hidden_distillation_loss(student, teacher, choices, projection), loss)
    matrix = projection and projection.weight.detach().double().numpy()
    student, teacher = ([h.double().numpy() for h in states] for states in (student, teacher))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(student, teacher, mask, matrix), rel=1e-5)


def test_layers_are_spread_evenly():
    """The student's states are 0, and those of layer k of the teacher k."""
    for depth, teacher_depth, places in (
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (4, 4, [1, 2, 3, 4]),
        (4, 6, [2, 3, 5, 6]),
        (4, 2, [1, 1, 2, 2]),
    ):
        student = [torch.zeros(1, 1, 2)] * depth
        teacher = [torch.full((1, 1, 2), k) for k in range(1, teacher_depth + 1)]
        loss = hidden_distillation_loss(student, teacher, torch.ones(1, 1))
        assert loss.item() == pytest.approx(np.mean(np.square(places)))


def hidden_of(folder, inputs):
    """The hidden states after each layer of a dense model, as arrays."""
    model = BertForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[1:]
    return [state.numpy() for state in states]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("teacher", WIDTHS)
def test_the_loss_of_the_first_update(teacher, accumulation, run, teachers, tiny_bert, monkeypatch):
    collate, batches = masked_run_squad.Squad.collate, []
    note = lambda self, features: batches.append(collate(self, features)) or batches[-1]  # noqa: E731
    monkeypatch.setattr(masked_run_squad.Squad, "collate", note)
    words = f"--max_steps 4 --gradient_accumulation_steps {accumulation}"
    seen = curves(run("out", words, teacher=teacher))  # at the first update, all weights remain
    torch.manual_seed(42)
    width = WIDTHS[teacher].get("hidden_size")
    projection = width and torch.nn.Linear(32, width, bias=False).weight.detach().numpy()
    losses = []
    for batch in batches[:accumulation]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        states = [hidden_of(folder, inputs) for folder in (tiny_bert, teachers[teacher])]
        mask = batch["attention_mask"].numpy()
        assert not mask.all()  # there is padding
        losses.append(plain_loss(*states, mask, projection))
    assert seen["loss/hidden"][0] == pytest.approx(np.mean(losses), rel=1e-4)
    for loss, task, distil, hidden in zip(
        *(seen[tag] for tag in ("loss", "loss/task", "loss/distil", "loss/hidden")), strict=True
    ):
        assert loss == pytest.approx(0.2 * task + 0.3 * distil + 0.5 * hidden, rel=1e-5)


def close(folder, other):
    torch.testing.assert_close(weights(other), weights(folder), rtol=1e-3, atol=1e-5)
    assert curves(folder)["loss/hidden"] == pytest.approx(curves(other)["loss/hidden"], rel=1e-4)


@pytest.mark.parametrize("teacher", ["deeper", "wider"])
def test_accumulated_batches_are_one_large_batch(teacher, run):
    common = "--adam_epsilon 1e-4 --per_gpu_train_batch_size"
    one = run("one", common, "24", teacher=teacher)
    close(one, run("parts", common, "5 --gradient_accumulation_steps 5", teacher=teacher))


def test_two_ranks_are_one_process(run, flags, tmp_path, on_two_ranks):
    common = "--adam_epsilon 1e-4 --gradient_accumulation_steps 2 --per_gpu_train_batch_size"
    one = run("one", common, "10", teacher="wider")
    on_two_ranks(flags("two", common, "5 --check_ranks --save_steps 8", teacher="wider"))
    close(one, tmp_path / "two")


@pytest.mark.parametrize(
    "teacher, words",
    [
        ("wider", "--gradient_accumulation_steps 2"),
        ("wider", "--bf16 --pruning_method platon"),
        ("deeper", "--model_type bert"),
    ],
)
def test_resume_is_bit_for_bit_and_the_projection_stays_out_of_the_model(
    teacher, words, run, refused
):
    whole = run("whole", words, "--save_steps 4", teacher=teacher)
    stopped = f"--resume_from_checkpoint {whole / 'checkpoint-4'}"
    again = run("again", words, "--save_steps 4", stopped, teacher=teacher)
    assert same(whole, again)
    assert curves(again)["loss/hidden"] == curves(whole)["loss/hidden"][4:]
    first, *states = (
        torch.load(folder / "training_state.pt", weights_only=True)["projection"]
        for folder in (whole / "checkpoint-4", whole / "checkpoint-8", again / "checkpoint-8")
    )
    if teacher == "wider":
        start, one, two = (state["weight"] for state in (first, *states))
        assert start.shape == (48, 32) and torch.equal(one, two) and not torch.equal(start, one)
    else:
        assert [first, *states] == [None] * 3
    plain = run("plain", words, "--alpha_hidden 0", teacher=teacher)
    for folder in whole, whole / "checkpoint-4":
        assert weights(folder).keys() == weights(plain).keys()
        assert not any(PROJECTION in file.read_text() for file in folder.glob("*.json"))
    assert "loss/hidden" not in curves(plain)
    more = words, "--save_steps 4", stopped, "--alpha_hidden 0.1 --overwrite_output_dir"
    said = refused(run, "again", *more, teacher=teacher)
    assert "--alpha_hidden was 0.5 and is 0.1" in said


def test_compiled_layers(run, monkeypatch):
    traced = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    words = "--adam_epsilon 1e-4 --evaluate_during_training --logging_steps 2"
    close(run("out", words, teacher="wider"), run("compiled", words, "--compile", teacher="wider"))


def test_evaluation_with_sparse_kernels_does_not_mind_the_projection(run):
    out = run("out", "--do_eval --sparse_inference --evaluate_during_training", teacher="wider")
    assert "f1" in json.loads((out / "eval_results.json").read_text())


def test_a_checkpoint_from_before_the_flag_is_resumed(run, refused):
    whole = run("whole", "--save_steps 4 --alpha_hidden 0")
    folder = whole / "checkpoint-4"
    (folder / "files.json").unlink()
    assert tiny.read(folder / "training_args.json")["alpha_hidden"] == 0
    tiny.edit(folder / "training_args.json", "alpha_hidden")
    stopped = f"--resume_from_checkpoint {folder}"
    again = run("again", "--save_steps 4 --alpha_hidden 0", stopped)
    assert same(whole, again)
    said = refused(run, "again", "--save_steps 4 --overwrite_output_dir", stopped)
    assert "--alpha_hidden was None and is 0.5" in said


def test_the_student_comes_nearer_to_its_teacher(run):
    """Also where nothing else is learned."""
    words = "--alpha_ce 0 --alpha_distil 0 --alpha_hidden 1 --max_steps 40 --final_threshold 1"
    for teacher in "same", "wider":
        seen = curves(run(teacher, words, teacher=teacher))["loss/hidden"]
        assert seen[-1] < 0.8 * seen[0]


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_values_that_are_refused(value, run, refused):
    assert "--alpha_hidden: must be" in refused(run, "out", f"--alpha_hidden={value}")
