"""A batch for every family: padded, with the inputs that its forward takes, as long as it takes."""

import pytest
import tiny
import torch
from tiny import TOKENIZERS, make_squad, tokenizer_of

from emmental.data import squad_features, squad_read
from emmental.data.padding import padding_of
from emmental.models.inputs import MODEL_INPUTS, input_names, longest_input
from emmental.training.passes import forward
from masked_run_squad import Squad

SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions count from behind padding's


def model_of(kind, tokenizer, **changes):
    """A small stock model for 64 tokens, with a head for question answering."""
    own = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    own |= {"max_position_embeddings": 64 + 2 * (kind in SHIFTED), "initializer_range": 0.5}
    case = "deberta-v3" if kind == "deberta-v2" else kind
    return tiny.model_of(case, **(own | changes))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_padded_batch_gives_what_each_pair_gives_alone(tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    model = model_of(kind, tokenizer)
    examples = squad_read.read_examples(
        make_squad(tmp_path / "squad.json"), False, cache_dir=tmp_path
    )
    sizes = {"max_seq_length": 64, "doc_stride": 16, "max_query_length": 24}
    features = squad_features.build_features(examples, tokenizer, training=True, **sizes)
    chosen = [row for row in features if row["length"] < 64][:8]
    task = Squad()
    task.padding = padding_of(tokenizer, model)
    batch = task.collate(chosen)
    assert batch["input_ids"].shape[1] % 8 == 0 and len({row["length"] for row in chosen}) > 2
    with torch.no_grad():
        start, end = forward(task, model, batch, None)
        for number, row in enumerate(chosen):
            example = examples[row["example_index"]]
            # transformers 5 leaves ALBERT's token types out, unless asked
            options = {"return_token_type_ids": "token_type_ids" in input_names(model)}
            texts = example["question"], example["context"]
            pair = tokenizer(*texts, return_tensors="pt", **options)
            stock, length = model(**pair), row["length"]
            for ours, theirs in (start, stock.start_logits), (end, stock.end_logits):
                torch.testing.assert_close(ours[number, :length], theirs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_longest_input_is_what_the_model_can_compute(kind):
    model = model_of(kind, tokenizer_of(kind))
    longest = longest_input(model)
    assert longest == (None if kind == "deberta-v2" else 64)
    with torch.no_grad():
        model(input_ids=torch.full((1, longest or 100), 7))
        if longest and kind != "modernbert":  # its positions are rotations, trained up to here
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, longest + 1), 7))


def test_token_types_go_to_the_models_that_tell_them_apart():
    for kind in TOKENIZERS:
        tokenizer = tokenizer_of(kind)
        model = model_of(kind, tokenizer)
        takes = kind in ("bert", "electra", "albert")
        assert input_names(model) == list(MODEL_INPUTS[: 2 + takes])
    student, teacher = (tokenizer_of(kind) for kind in ("distilbert", "bert"))
    padding = padding_of(student, model_of("distilbert", student))
    assert "token_type_ids" in padding["input_names"]  # for a teacher
    assert input_names(model_of("deberta-v2", teacher, type_vocab_size=2))[-1] == "token_type_ids"


@pytest.mark.parametrize(
    "kind, changes, wanted",
    [("roberta", {"pad_token_id": 0}, 0), ("mpnet", {"pad_token_id": 5}, 1)],
)
def test_padding_has_the_id_of_the_model(kind, changes, wanted):
    """Which numbers the positions; that of the tokenizer would count as a token."""
    tokenizer = tokenizer_of(kind)
    assert padding_of(tokenizer, model_of(kind, tokenizer, **changes))["pad_token_id"] == wanted
