"""The small things of all tests: sizes, models, tokenizers, data, command lines."""

import dataclasses
import json
import random
import string

import torch

SIZES = {  # sizes of a model
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LINEARS = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # weights of the pruned matrices
QA = "ForQuestionAnswering"
SUFFIXES = ("Model", QA, *(f"For{x}" for x in ("SequenceClassification", "TokenClassification")))
SUFFIXES += ("ForMultipleChoice",)
LAYER = "encoder.layer.1.output.dense"
IDS = torch.randint(5, 120, (3, 12), generator=torch.Generator().manual_seed(0))
INPUTS = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1] * 12, [1] * 9 + [0] * 3, [1] * 5 + [0] * 7]),
    "token_type_ids": (torch.arange(12) > 5).long().expand(3, 12),
}
LABELS = {
    QA: {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 4, 4])},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1])},
    "ForTokenClassification": {"labels": IDS % 2},
    "ForMultipleChoice": {"labels": torch.tensor([2])},
}


def batch_for(suffix, labels=True):
    """INPUTS for a head: of multiple choice, one example with three choices; and its labels."""
    inputs = dict(INPUTS)
    if suffix == "ForMultipleChoice":
        inputs = {name: tensor[None] for name, tensor in INPUTS.items()}
    return inputs | (LABELS.get(suffix, {}) if labels else {})


# --- models ---


def make(method="topK", suffix="Model", seed=1, **settings):
    """A masked BERT with random scores and without dropout, in evaluation."""
    import emmental

    torch.manual_seed(seed)
    random_scores = {"mask_init": "uniform", "mask_scale": 1.0, "initializer_range": 0.2}
    settings = SIZES | NO_DROPOUT | random_scores | {"pruning_method": method} | settings
    model = getattr(emmental, f"MaskedBert{suffix}")(emmental.MaskedBertConfig(**settings))
    return observed(model).eval()


def observed(model):
    """The model, with observed scores that are positive and distinct, as after a training."""
    for module in model.modules():
        if getattr(getattr(module, "method", None), "scores", None) != "observed":
            continue
        if module.mask_scores is not None:  # others share those of another layer
            for tensor in (module.mask_scores.data, *module.buffers(recurse=False)):
                tensor.uniform_(0.1, 1.0)
    return model


def plain_bert(head="QuestionAnswering", seed=0, **settings):
    """A stock BERT in evaluation; `head` "" is the base model."""
    import transformers

    torch.manual_seed(seed)
    kind = getattr(transformers, f"BertFor{head}" if head else "BertModel")
    return kind(transformers.BertConfig(**{**SIZES, "initializer_range": 0.2, **settings})).eval()


def save(model, folder, tokenizer=None):
    """Save a model, and its tokenizer if there is one; returns the folder."""
    for part in (model, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    return folder


V3 = {"relative_attention": True, "position_buckets": 8, "position_biased_input": False}
V3 |= {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
CASES = {  # case: model_type, and settings such as published checkpoints have
    **{name: (name, {}) for name in ("bert", "electra", "distilbert", "mpnet", "albert")},
    **{name: (name, {"type_vocab_size": 1}) for name in ("roberta", "xlm-roberta", "camembert")},
    "albert, groups": ("albert", {"num_hidden_groups": 2, "inner_group_num": 2}),
    "deberta-v2": ("deberta-v2", V3 | {"conv_kernel_size": 3}),
    "deberta-v3": ("deberta-v2", V3 | {"share_att_key": True}),
    "modernbert": ("modernbert", {"local_attention": 16}),
}


def config_of(case, prefix="", **settings):
    """A tiny configuration of a family, without dropout; without settings that it does not have."""
    from transformers import CONFIG_MAPPING

    model_type, own = CASES[case]
    kind = CONFIG_MAPPING[prefix + model_type]
    known = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map, *own}
    sizes = SIZES | {"hidden_dim": 64, "embedding_size": 16, "pad_token_id": 1}
    settings = sizes | {"max_position_embeddings": 66, "initializer_range": 0.2} | own | settings
    config = kind(**{name: value for name, value in settings.items() if name in known})
    for name in vars(config):
        if "dropout" in name:
            setattr(config, name, 0.0)
    return config


def model_of(case, head="QuestionAnswering", prefix="", seed=0, **settings):
    """A tiny model of a family in evaluation: stock, or with the prefix "masked_"."""
    import transformers

    import emmental  # noqa: F401, registers the masked classes

    torch.manual_seed(seed)
    auto = getattr(transformers, f"AutoModelFor{head}")
    return auto.from_config(config_of(case, prefix, **settings)).eval()


def padded_batch(model, padding=True):
    """A batch of three lengths for a model of any head; without `padding`, of whole sequences."""
    torch.manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (3, 21))
    mask = torch.ones(3, 21).long()
    for row, length in enumerate((21, 9, 4) if padding else ()):
        ids[row, length:] = model.config.pad_token_id
        mask[row, length:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: tensor[None] for name, tensor in batch.items()}
    return batch


@torch.no_grad()
def assert_same(model, other, tolerance=1e-4):
    """Both models have the same outputs, with padding and without."""
    for padding in (True, False):
        batch = padded_batch(model, padding)
        pairs = zip(other(**batch).to_tuple(), model(**batch).to_tuple(), strict=True)
        for outputs, expected in pairs:
            torch.testing.assert_close(
                outputs.float(), expected, rtol=tolerance, atol=tolerance / 5
            )


# --- tokenizers ---

NAMES = ["ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana"]
PLACES = ["oslo", "rome", "lima", "kyoto", "cairo", "paris", "quito", "delhi"]
WORDS = "lives in where does live ? . , the and yes no a is who".split()
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = [*BERT_TOKENS, *NAMES, *PLACES, *WORDS]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-éß漢字"


def _word_pieces(special):
    words = [*special, *NAMES, *PLACES, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {"vocab": {word: place for place, word in enumerate(dict.fromkeys(words))}}


def _byte_pairs(special):
    """Every byte is a token, and so is each word after a space."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{word}" for word in (*NAMES, *PLACES, *WORDS)]
    merges = dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word)))
    tokens = dict.fromkeys([*special, *alphabet, *("".join(pair) for pair in merges)])
    return {"vocab": {token: place for place, token in enumerate(tokens)}, "merges": [*merges]}


def _unigrams(special):
    words = {f"▁{word}": -3.0 for word in (*NAMES, *PLACES, *WORDS)}
    letters = dict.fromkeys(["▁", *LETTERS], -9.0)
    return {"vocab": [*{**dict.fromkeys(special, 0.0), **words, **letters}.items()]}


def bert_tokenizer(folder):
    """The tokenizer of a vocab.txt in the folder, with as many words as SIZES says."""
    from transformers import BertTokenizerFast

    unused = (f"[unused{n}]" for n in range(SIZES["vocab_size"] - len(VOCABULARY)))
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, *unused]))
    return BertTokenizerFast(str(folder / "vocab.txt"))


TOKENIZERS = {  # model_type: its class in transformers, its vocabulary and special tokens
    "bert": ("BertTokenizerFast", _word_pieces, BERT_TOKENS),
    "electra": ("ElectraTokenizerFast", _word_pieces, BERT_TOKENS),
    "distilbert": ("DistilBertTokenizerFast", _word_pieces, BERT_TOKENS),
    "mpnet": ("MPNetTokenizerFast", _word_pieces, [*ROBERTA_TOKENS, "[UNK]"]),
    "roberta": ("RobertaTokenizerFast", _byte_pairs, ROBERTA_TOKENS),
    "modernbert": ("PreTrainedTokenizerFast", _byte_pairs, BERT_TOKENS),
    "xlm-roberta": ("XLMRobertaTokenizerFast", _unigrams, ROBERTA_TOKENS),
    "camembert": ("CamembertTokenizerFast", _unigrams, ROBERTA_TOKENS),
    "albert": ("AlbertTokenizerFast", _unigrams, ["<pad>", "<unk>", *BERT_TOKENS[2:]]),
    "deberta-v2": ("DebertaV2TokenizerFast", _unigrams, BERT_TOKENS),
}


def tokenizer_of(model_type, **options):
    """A small tokenizer of the class, algorithm and frame that the models of a type have.

    The vocabulary is NAMES, PLACES, WORDS and some letters. options: of the class. The padding id
    is 1 where that of the model is.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    name, vocabulary, special = TOKENIZERS[model_type]
    vocabulary = vocabulary(special)
    if model_type != "modernbert":
        return getattr(transformers, name)(**vocabulary, **options)
    backend = Tokenizer(models.BPE(**vocabulary))  # its tokenizer.json alone says what it does
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    frame = {"single": "[CLS] $A [SEP]", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    ids = [(token, BERT_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(**frame, special_tokens=ids)
    special = {f"{token[1:-1].lower()}_token": token for token in BERT_TOKENS}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


# --- data ---


def make_squad(path, questions=24, seed=0, unanswerable=0):
    """A SQuAD file: 'ada lives in oslo . ben lives in rome .', 'where does ada live ?'."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(questions):
        names = rng.sample(NAMES, rng.randint(2, 6))
        places = rng.sample(PLACES, len(names))
        context = " . ".join(f"{name} lives in {place}" for name, place in zip(names, places))
        context += " ."
        asked = rng.randrange(len(names))
        qa = {"id": f"q{number}", "question": f"where does {names[asked]} live ?"}
        if number < unanswerable:
            absent = next(name for name in NAMES if name not in names)
            qa |= {"question": f"where does {absent} live ?", "answers": [], "is_impossible": True}
        else:
            qa["answers"] = [{"text": places[asked], "answer_start": context.index(places[asked])}]
            if unanswerable:
                qa["is_impossible"] = False
        paragraphs.append({"context": context, "qas": [qa]})
    data = [{"title": "people", "paragraphs": paragraphs}]
    path.write_text(json.dumps({"version": "x", "data": data}))
    return path


def refusal(call, *args, **options):
    """The one line of the UserError that a call raises."""
    import pytest

    from emmental.system.errors import UserError

    with pytest.raises(UserError) as stop:
        call(*args, **options)
    assert "\n" not in str(stop.value)
    return str(stop.value)


# --- SQuAD by hand ---

CONTEXT = "The Normans (Norman: Nourmands) were the people who gave their name to Normandy, "
CONTEXT += "a region in France."
UNICODE = "L'école à Besançon: 漢字 und 😀 𝔘ber cafe\u0301, nai\u0308ve e\u0301tude 한국 "
UNICODE += "x\u200by İstanbul re\u0301sume\u0301"
ANSWERS = ["L'école", "Besançon", "漢字 und 😀", "字", "𝔘ber cafe\u0301", "nai\u0308ve"]
ANSWERS += ["한국", "İstanbul", "re\u0301sume\u0301"]
WINDOWS = {"max_seq_length": 24, "doc_stride": 5, "max_query_length": 6}


def letters_tokenizer(words=("the", "normans", "people", "france", "region", "##s", "name")):
    """Word pieces: letters, and these words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits + string.punctuation + "漢字😀𝔘"
    vocabulary = [*BERT_TOKENS, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(vocabulary))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "CLS", "SEP", "PAD")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def qa(id_, context, *texts, question="who gave the name?", **more):
    answers = [{"text": text, "answer_start": context.index(text)} for text in texts]
    return {"id": id_, "question": question, "answers": answers, **more}


def document(*paragraphs, title="Normans"):
    paragraphs = [{"context": context, "qas": qas} for context, qas in paragraphs]
    return {"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}


def good_document():
    a, b, c = ["Normans", "The Normans"], ["France"], ["a region"]
    d, e, f = ["Besançon"], ["漢字 und 😀"], ["nai\u0308ve"]
    return document(
        (CONTEXT, [qa(id_, CONTEXT, *texts) for id_, texts in zip("abc", (a, b, c))]),
        (UNICODE, [qa(id_, UNICODE, *texts) for id_, texts in zip("def", (d, e, f))]),
    )


def write(path, content):
    """Write bytes, a text, or values as JSON; returns the path."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def examples_of(folder, content, version_2_with_negative=False, **options):
    """The examples of a SQuAD file with this content."""
    from emmental.data.squad_read import read_examples

    return read_examples(write(folder / "squad.json", content), version_2_with_negative, **options)


def features_of(examples, tokenizer, training=False, **changes):
    """The features of SQuAD's examples in WINDOWS of other sizes."""
    from emmental.data.squad_features import build_features

    return build_features(examples, tokenizer, training=training, **(WINDOWS | changes))


# --- GLUE ---

PAIR, IDENTITIES, STRINGS = "sentence1,sentence2", "#1 ID,#2 ID", "#1 String,#2 String"
PARSES = "sentence1_binary_parse,sentence2_binary_parse,sentence1_parse,sentence2_parse"
MNLI = f"index,promptID,pairID,genre,{PARSES},{PAIR}"
STSB = f"index,genre,filename,year,old_index,source1,source2,{PAIR}"
QQP, QNLI, YES_NO = "question1,question2", "question,sentence", "entailment,not_entailment"
MRPC = f"{IDENTITIES},{STRINGS}"
LAYOUTS = {  # headers of GLUE's labelled and test files; text columns; label column; labels
    "cola": "source,label,mark,sentence / index,sentence / sentence / label / 0,1",
    "sst-2": "sentence,label / index,sentence / sentence / label / 0,1",
    "mrpc": f"Quality,{MRPC} / index,{MRPC} / {STRINGS} / Quality / 0,1",
    "sts-b": f"{STSB},score / {STSB} / {PAIR} / score / 0.000,5.000,3.25",
    "qqp": f"id,qid1,qid2,{QQP},is_duplicate / id,{QQP} / {QQP} / is_duplicate / 0,1",
    "mnli": f"{MNLI},label1,gold_label / {MNLI} / {PAIR} / gold_label / "
    "contradiction,entailment,neutral",
    "qnli": f"index,{QNLI},label / index,{QNLI} / {QNLI} / label / {YES_NO}",
    "rte": f"index,{PAIR},label / index,{PAIR} / {PAIR} / label / {YES_NO}",
    "wnli": f"index,{PAIR},label / index,{PAIR} / {PAIR} / label / 0,1",
}
LAYOUTS |= {"mnli-mm": LAYOUTS["mnli"], "ax": LAYOUTS["mnli"]}
LAYOUTS = {name: [part.split(",") for part in row.split(" / ")] for name, row in LAYOUTS.items()}


def table(header, rows, newline="\n"):
    """A file of tab-separated lines; `header` may be empty."""
    return "".join("\t".join(fields) + newline for fields in ([header] if header else []) + rows)


def sentence(rng, label):
    """A text that gives its label away, by how many places it names: something to learn."""
    return f'"{rng.choice(NAMES)} lives in {" and ".join([rng.choice(PLACES)] * (1 + label))} .'


def write_split(path, name, rows, seed, *, test=False):
    """A file in GLUE's layout, with a byte order mark, quotes and QQP's short rows."""
    labelled, unlabelled, columns, (label_column,), labels = LAYOUTS[name]
    header, rng, lines = (unlabelled if test else labelled), random.Random(seed), []
    for row in range(rows):
        label = row % len(labels)
        fields = {column: sentence(rng, label) for column in columns}
        fields |= {label_column: labels[label], "index": str(100 + row), "id": str(100 + row)}
        lines.append([fields.get(column, "x") for column in header])
    if name == "qqp" and not test:
        lines.insert(1, lines[0][:3])
    text = table(None if name == "cola" and not test else header, lines)
    path.write_text(("\ufeff" if name == "mrpc" else "") + text, encoding="utf-8")


# --- command lines, and what a run leaves ---

SHORT = "--max_seq_length 48 --max_query_length 16 --doc_stride 16 --per_gpu_train_batch_size 4"
SHORT = SHORT.split()
TOPK = "--pruning_method topK --initial_threshold 1 --final_threshold 0.2"
SOFT = "--pruning_method sigmoied_threshold --initial_threshold 0 --regularization l1"
L0 = "--pruning_method l0 --initial_threshold 1 --final_threshold 1 --mask_scale 2.197"
L0 += " --regularization l0"
RUNS = {  # flags of each method
    "topK": TOPK,
    "magnitude": TOPK.replace("topK", "magnitude"),
    "threshold": "--pruning_method threshold --initial_threshold=-0.1 --final_threshold=0.0",
    "sigmoied_threshold": f"{SOFT} --final_threshold 0.5 --final_lambda 20",
    "l0": f"{L0} --final_lambda 20 --mask_scores_learning_rate 0.1",
    "sensitivity": TOPK.replace("topK", "sensitivity"),
    "platon": TOPK.replace("topK", "platon"),
}
TOGETHER = "--global_topk --global_topk_frequency_compute 3"
TARGETS = {  # penalties whose lambda is steered
    "soft to a target": f"{SOFT} --final_threshold 0.1 --mask_scores_learning_rate 0.3",
    "l0 to a target": f"{L0} --mask_scores_learning_rate 0.5",
}
TARGETS = {name: f"{flags} --target_remaining 0.3" for name, flags in TARGETS.items()}
RUNS |= {f"global {name}": f"{RUNS[name]} {TOGETHER}" for name in ("topK", "magnitude")}


def command(folder, model, data, name, *more):
    """The words of a short run on SQuAD, in the folder `name` of a folder; later flags win."""
    places = {"model_name_or_path": model, "data_dir": data, "output_dir": folder / name}
    places["cache_dir"] = folder / "cache"
    return [
        *(word for flag, place in places.items() for word in (f"--{flag}", str(place))),
        *"--model_type masked_bert --do_lower_case --no_cuda --learning_rate 1e-3".split(),
        *"--max_seq_length 48 --max_query_length 16 --doc_stride 16".split(),
        *"--max_steps 8 --warmup_steps 1 --per_gpu_train_batch_size 5".split(),
        *(word for words in more for word in words.split()),
    ]


def read(path):
    """The values of a JSON file."""
    return json.loads(path.read_text())


def edit(path, *without, **values):
    """Change values of a JSON file, and leave some out."""
    kept = {name: value for name, value in read(path).items() if name not in without}
    path.write_text(json.dumps(kept | values))


def weights(folder):
    """The tensors of a checkpoint."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rewrite(folder, change):
    """Put change(its tensors) in the place of the tensors of a checkpoint."""
    from safetensors.torch import save_file

    save_file(change(weights(folder)), folder / "model.safetensors", {"format": "pt"})
    return folder


def same(a, b):
    """Whether two folders, or their tensors, are equal bit by bit."""
    a, b = (weights(x) if hasattr(x, "exists") else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def events(folder):
    """The events that TensorBoard reads of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(folder):
    """The curves of a run: {tag: {step: value}}."""
    found = events(folder)
    tags = found.Tags()["scalars"]
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in tags}
