"""What holds for any input: parsers, the way from tokens back to the text, the packed format.

`pytest tests/test_properties.py --hypothesis-profile long` tries a hundred times as many.
"""

import csv
import json
import shutil
import tempfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_coding import check_error
from tiny import tokenizer_of
from tokenizers.normalizers import NFKC

from emmental.data import glue, glue_tasks, squad_answers, squad_features, squad_read
from emmental.packing import coding
from emmental.system.errors import UserError

SPECIAL = """\U0001f600|\U0001d4d0|\U00020000|\u05e9|\u202e|\u200b|\u200d|\ufeff|\u0301|\u00e9|
e\u0301|\uac00|\u4e2d|\ufb01|\u0130|\u00df|\0|\r|\x1c|\x85|\u00a0|\u2028|\ufffd|'|##|[SEP]"""
SPECIAL = SPECIAL.replace("\n", "").split("|")
ANY = st.characters(exclude_categories=["Cs"])
TEXT = st.text(ANY | st.sampled_from("ab \t\n") | st.sampled_from("".join(SPECIAL)))
KINDS = ("bert", "roberta", "modernbert", "xlm-roberta", "albert", "deberta-v2")


@pytest.fixture(scope="module")
def tokenizers():
    found = {kind: tokenizer_of(kind) for kind in KINDS}
    found["xlm-roberta"].backend_tokenizer.normalizer = NFKC()  # SentencePiece's is like it
    return found


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


# ------------------------------------------------------------------------------------- span mapping


def answers(contexts, slices, tokenizer, folder, size):
    """What perfect logits predict for these slices: through a file, features and windows."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        paragraphs = []
        for n, (text, (a, b)) in enumerate(zip(contexts, slices, strict=True)):
            asked = {"id": f"{n}", "question": "where ?"}
            asked["answers"] = [{"text": text[a:b], "answer_start": a}]
            paragraphs.append({"context": text, "qas": [asked]})
        path = Path(place) / "squad.json"
        path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
        examples = squad_read.read_examples(path, False, cache_dir=place)
        assert list(examples["context"]) == list(contexts)
        sizes = {"max_seq_length": size, "doc_stride": max(1, size // 4), "max_query_length": 4}
        training = squad_features.build_features(examples, tokenizer, training=True, **sizes)
        features = squad_features.build_features(examples, tokenizer, training=False, **sizes)
        starts, ends, shown = [], [], set()
        for labels, feature in zip(training, features, strict=True):
            start, end = labels["start_position"], labels["end_position"]
            starts.append(9.0 * (np.arange(labels["length"]) == start))
            ends.append(9.0 * (np.arange(labels["length"]) == end))
            if start and feature["max_context"][start - feature["context_start"]]:
                shown.add(feature["example_index"])
        limits = {"n_best_size": 5, "max_answer_length": 1000}
        limits |= {"version_2_with_negative": False, "null_score_diff_threshold": 0.0}
        predictions, _, _ = squad_answers.postprocess(examples, features, starts, ends, **limits)
        # BERT's rule drops an answer if no window shows it whole and most of its surroundings.
        return [predictions[f"{n}"] if n in shown else None for n in range(len(contexts))]


def is_seen(char):
    """Whether a BERT tokenizer makes a token of a character."""
    category = unicodedata.category(char)
    return not (char.isspace() or char in "\0\ufffd" or category[0] == "C" or category == "Mn")


def seen_part(text, start, end):
    """The slice without what tokenizers drop at its edges; accents belong to what precedes."""
    places = [place for place in range(start, end) if is_seen(text[place])]
    if not places:
        return None
    last = places[-1] + 1
    while last < len(text) and unicodedata.category(text[last]) == "Mn":
        last += 1
    return text[places[0] : last]


OLD = st.characters(exclude_categories=["Cs", "Cn", "Co", "Zs", "Zl", "Zp"]).filter(
    lambda char: (
        unicodedata.ucd_3_2_0.category(char) == unicodedata.category(char) and not char.isspace()
    )
)  # which the tokenizers, made with another Unicode, classify alike
ODD = st.sampled_from([char for char in "".join(SPECIAL) if not char.isspace()])
WORD = st.text(OLD | ODD | st.sampled_from("abc"), min_size=1, max_size=8)


@given(
    words=st.lists(WORD, min_size=1, max_size=12),
    data=st.data(),
    size=st.sampled_from([12, 16, 24, 40, 200]),
    kind=st.sampled_from(KINDS),
)
def test_the_text_of_an_answer_is_read_back(words, data, size, kind, tokenizers, folder):
    tokenizer = tokenizers[kind]
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    text = " ".join(words)
    start = len(" ".join(words[:first])) + (first > 0)
    end = start + len(" ".join(words[first : last + 1]))
    wanted = seen_part(text, start, end) if kind == "bert" else text[start:end]
    assume(wanted is not None)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = [n for n, (a, b) in enumerate(encoding["offset_mapping"]) if a < end and b > start]
    assume(tokens)
    (predicted,) = answers([text], [(start, end)], tokenizer, folder, size)
    assume(predicted is not None)
    assert predicted == wanted


@given(text=TEXT, data=st.data(), kind=st.sampled_from(KINDS))
def test_any_slice_of_any_text_gives_a_slice(text, data, kind, tokenizers, folder):
    tokenizer = tokenizers[kind]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    (predicted,) = answers([text], [(start, end)], tokenizer, folder, 512)
    assume(predicted is not None)
    assert predicted in text and predicted == predicted.strip()
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token of some kinds begins with the space before its word, which belongs to no answer.
    words = [(b - len(text[a:b].lstrip()), b) for a, b in encoding["offset_mapping"]]
    if covered := [(a, b) for a, b in words if a < end and b > start]:
        assert text[covered[0][0] : covered[-1][1]].strip() in predicted


# ------------------------------------------------------------------------------------------ parsers

NAMES = st.text(max_size=4) | st.just("data")
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def documents(draw):
    """The text of a JSON object with "data", or of another value, perhaps with an error."""
    document = draw(st.dictionaries(st.text(max_size=4), VALUES, max_size=3))
    document["data"] = draw(st.lists(VALUES, max_size=4) | VALUES)
    value = draw(st.sampled_from([document] * 4 + [draw(VALUES)]))
    indent = draw(st.none() | st.integers(0, 3))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)
    if draw(st.booleans()):
        place = draw(st.integers(0, len(text)))
        other = draw(st.sampled_from(["", " ", ",", "}", "]", '"', "\\", "0", "e", "\0"]))
        text = text[:place] + other + text[place + draw(st.integers(0, 2)) :]
    return text.encode("utf-8", "surrogatepass")


@given(content=st.binary(max_size=200) | documents())
def test_whatever_a_squad_file_holds(content, folder):
    path = folder / "squad.json"
    path.write_bytes(content)
    try:
        assert len(squad_read.read_examples(path, True, cache_dir=folder)) > 0
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)


FIELD = st.text(ANY.filter(lambda char: char not in "\t\n")).filter(
    lambda text: not text.endswith("\r")
)


@given(rows=st.lists(st.tuples(FIELD, st.sampled_from("01")), min_size=1))
def test_a_tsv_gives_back_what_was_written(rows, folder):
    lines = "".join(f"{text}\t{label}\n" for text, label in [("sentence", "label"), *rows])
    (folder / "train.tsv").write_bytes(lines.encode())
    examples = glue.read_examples(glue_tasks.TASKS["sst-2"], folder, "train", cache_dir=folder)
    assert list(zip(examples["text_a"], map(str, examples["label"]), strict=True)) == rows


def read_own(path):
    """The examples and labels of a file that has the columns text and label."""
    task = glue_tasks.custom_task((), ("text",), "label")
    task = glue_tasks.custom_task(glue.find_labels(path, task), ("text",), "label")
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        shutil.copy(path, place)
        return glue.read_examples(task, place, "train", cache_dir=place), task.labels


ONE_LINE = st.text(ANY.filter(lambda char: char not in "\r\n"))


@given(rows=st.lists(st.tuples(ONE_LINE, st.sampled_from("ny")), min_size=2))
def test_csv_and_jsonl_give_back_what_was_written(rows, folder):
    assume(len({label for _, label in rows}) == 2)
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    for name in ("train.csv", "train.jsonl"):
        examples, labels = read_own(folder / name)
        assert labels == ("n", "y")
        found = (labels[label] for label in examples["label"])
        assert list(zip(examples["text_a"], found, strict=True)) == rows


@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["train.tsv", "train.csv", "train.jsonl"]),
    header=st.booleans(),
)
def test_whatever_a_table_holds(content, name, header, folder):
    path = folder / name
    names = b"text,label\n" if name.endswith("csv") else b"text\tlabel\n"
    path.write_bytes(names * header + content)
    try:
        examples, labels = read_own(path)
        assert len(examples) > 0 and len(labels) > 1
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error)


# ----------------------------------------------------------------------------------- packed format


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensor = rng.standard_normal((rows, columns)) * 10.0 ** draw(st.integers(-30, 30))
    tensor *= rng.random((rows, columns)) < draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
    if draw(st.booleans()):  # whole rows and columns that keep nothing
        tensor[rng.random(rows) < 0.5] = 0
        tensor[:, rng.random(columns) < 0.5] = 0
    tensor = tensor.astype(np.float32)
    return tensor if draw(st.booleans()) else tensor.reshape(-1)


@given(tensor=matrices(), bits=st.sampled_from(coding.BITS), by_row=st.booleans())
def test_packing_keeps_the_mask_and_the_bound(tensor, bits, by_row):
    by_row = by_row and tensor.ndim == 2
    try:
        coded = coding.encode(tensor, bits, by_row)
    except UserError as error:
        assert "half precision" in str(error) and np.abs(tensor).max() > np.finfo(np.float16).max
        return
    decoded = coding.decode(coded.words, tensor.shape, bits, by_row)
    assert coded.kept == (np.count_nonzero(tensor) if tensor.ndim == 2 else tensor.size)
    assert np.array_equal(decoded != 0, tensor != 0) or tensor.ndim == 1 and bits < 32
    check_error(tensor, decoded, bits, by_row)


@given(tensor=matrices(), bits=st.sampled_from(coding.BITS), data=st.data())
def test_a_spoilt_stream_is_refused_or_gives_a_matrix(tensor, bits, data):
    words = coding.encode(np.clip(tensor, -6e4, 6e4), bits).words.copy()
    kind = data.draw(st.sampled_from(["flip", "cut", "other", "shape"]))
    shape = tensor.shape
    if kind == "flip" and len(words):
        place = data.draw(st.integers(0, len(words) - 1))
        words[place] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    elif kind == "cut":
        words = words[: data.draw(st.integers(0, len(words)))]
    elif kind == "other":
        words = np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=20)), np.uint32)
    else:
        shape = tuple(data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=2)))
    try:
        decoded = coding.decode(words, shape, bits)
        assert decoded.shape == shape and np.isfinite(decoded).all()
    except (UserError, ValueError) as error:  # as `storage` takes it
        assert str(error)
