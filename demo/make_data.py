"""Make the data of `make demo`: a small SQuAD and a small pre-trained BERT, without a network.

    python demo/make_data.py --output_dir DIR     # same seed and machine: same files

**Data** (DIR/train.json and DIR/dev.json, in the format of SQuAD v1.1). A paragraph states four or
five facts about three people. A fact is a person, a relation and a value. Relations come in pairs
with values of the same type: where someone lives or was born (cities), what they do or want to
become (jobs), and so on. A paragraph contains both relations of a pair, and therefore several spans
of the right type: the answer depends on both the person and the relation of the question.
Each relation has several wordings in both orders ("Anna Berg lives in Oslo", "Oslo is home to Anna
Berg"), and half of the questions ask for the person. Values are drawn anew for each paragraph, so
no answer can be memorised. The people of dev.json never occur in train.json: their first names and
last names do, but not the combinations.

**Pre-training** (DIR/bert, a `from_pretrained` folder). Movement pruning is about transfer: weights
from one task are pruned while the model learns another. The encoder is therefore first trained on
text alone, without questions. The encoder reads a fact in other words, often with a gap ("[MASK]
hails from Oslo"), then a paragraph. For each word of the paragraph, the encoder predicts whether it
is in the fact, and whether it is in the sentence that states the fact. Reading comprehension builds
on this skill, which the model learns within a minute; predicting masked words took a model of this
size several times as long. Queries and keys start equal and positions start as sinusoids, so
attention to equal words does not have to be discovered first.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizerFast

FIRST_NAMES = """anna ben carla david elena felix grace henry ida jonas karin leo maria nils olga
paul rosa simon tara victor wanda xavier yusuf zoe amir bella chen dora emil fatma george hana
ivan julia kofi lena marco nadia oscar""".split()
LAST_NAMES = """abbott berg castro duarte evans fischer garcia hansen ito jensen kovacs larsen
moreau novak okafor petrov quinn rossi silva tanaka ueda vargas weber young zhang adler brandt
conti dubois engel ferrari gupta haas ibrahim jovic keller lopez meyer nilsson ortiz""".split()
CITIES = """oslo rome lima cairo delhi paris tokyo quito dublin lagos madrid vienna athens berlin
hanoi lisbon warsaw sofia accra bogota dakar geneva havana jakarta kiev london manila nairobi
ottawa prague riga seoul tunis zagreb|cape town|new york|buenos aires|san jose|port louis|tel
aviv"""
JOBS = """baker nurse pilot farmer lawyer dentist painter sailor teacher waiter miner tailor
plumber judge chemist banker writer singer gardener carpenter surgeon|fire fighter|bus driver|tax
clerk| night guard|book seller|zoo keeper"""
FOODS = """rice soup bread cheese salad pasta beans eggs honey olives mushrooms tofu spinach
garlic yoghurt noodles sushi figs|apple pie|lentil stew|fish cakes|dark chocolate|fried
potatoes|lemon ice"""
INSTRUMENTS = """piano violin guitar flute cello harp trumpet drums banjo clarinet oboe organ
tuba viola accordion saxophone|bass guitar|french horn|steel drum"""
ANIMALS = """cats dogs horses rabbits parrots snakes spiders goats hens turtles mice ducks bees
foxes sheep frogs|polar bears|grey wolves|sea lions|fruit bats"""
MAX_LENGTH = 96
YEARS = " ".join(str(year) for year in range(1950, 2000))

# fmt: off
# relation: (values, statements, questions for the value, questions for the person)
RELATIONS = {
    "home": (
        CITIES,
        ["{p} lives in {v}", "{v} is home to {p}", "{p} has a flat in {v}"],
        ["where does {p} live?", "in which city does {p} have a flat?",
         "what city is home to {p}?"],
        ["who lives in {v}?", "who has a flat in {v}?"],
    ),
    "birthplace": (
        CITIES,
        ["{p} was born in {v}", "{p} comes from {v}", "{v} is where {p} grew up"],
        ["where was {p} born?", "what city does {p} come from?", "where did {p} grow up?"],
        ["who was born in {v}?", "who comes from {v}?"],
    ),
    "job": (
        JOBS,
        ["{p} works as a {v}", "{p} is employed as a {v}", "a {v} by trade is {p}"],
        ["what does {p} work as?", "what is {p} by trade?", "what is the job of {p}?"],
        ["who works as a {v}?", "who is employed as a {v}?"],
    ),
    "dream": (
        JOBS,
        ["{p} hopes to become a {v}", "{p} dreams of being a {v}", "a {v} is what {p} wants to be"],
        ["what does {p} hope to become?", "what does {p} want to be?",
         "what does {p} dream of being?"],
        ["who hopes to become a {v}?", "who wants to be a {v}?"],
    ),
    "likes": (
        FOODS,
        ["{p} loves {v}", "{p} likes to eat {v}", "{v} tastes good to {p}"],
        ["what does {p} love?", "what does {p} like to eat?", "what tastes good to {p}?"],
        ["who loves {v}?", "who likes to eat {v}?"],
    ),
    "dislikes": (
        FOODS,
        ["{p} hates {v}", "{p} never eats {v}", "{v} tastes bad to {p}"],
        ["what does {p} hate?", "what does {p} never eat?", "what tastes bad to {p}?"],
        ["who hates {v}?", "who never eats {v}?"],
    ),
    "plays": (
        INSTRUMENTS,
        ["{p} plays the {v}", "{p} performs on the {v}", "the {v} is played by {p}"],
        ["what does {p} play?", "what does {p} perform on?", "what is played by {p}?"],
        ["who plays the {v}?", "who performs on the {v}?"],
    ),
    "sells": (
        INSTRUMENTS,
        ["{p} sold the {v}", "{p} gave away the {v}", "the {v} was given away by {p}"],
        ["what did {p} sell?", "what did {p} give away?", "what was given away by {p}?"],
        ["who sold the {v}?", "who gave away the {v}?"],
    ),
    "keeps": (
        ANIMALS,
        ["{p} keeps {v}", "{p} looks after {v}", "{v} are kept by {p}"],
        ["what does {p} keep?", "what does {p} look after?", "what animals are kept by {p}?"],
        ["who keeps {v}?", "who looks after {v}?"],
    ),
    "fears": (
        ANIMALS,
        ["{p} is afraid of {v}", "{p} runs away from {v}", "{v} frighten {p}"],
        ["what is {p} afraid of?", "what does {p} run away from?", "what animals frighten {p}?"],
        ["who is afraid of {v}?", "who runs away from {v}?"],
    ),
    "wedding": (
        YEARS,
        ["{p} married in {v}", "the wedding of {p} was in {v}", "in {v} came the wedding of {p}"],
        ["when did {p} marry?", "in what year was the wedding of {p}?",
         "when was the wedding of {p}?"],
        ["who married in {v}?", "who had a wedding in {v}?"],
    ),
    "degree": (
        YEARS,
        ["{p} left school in {v}", "the exam of {p} was in {v}", "in {v} came the exam of {p}"],
        ["when did {p} leave school?", "in what year was the exam of {p}?",
         "when was the exam of {p}?"],
        ["who left school in {v}?", "who had an exam in {v}?"],
    ),
}
PAIRS = [
    ("home", "birthplace"), ("job", "dream"), ("likes", "dislikes"), ("plays", "sells"),
    ("keeps", "fears"), ("wedding", "degree"),
]
# fmt: on


def phrases(text: str) -> list[str]:
    """Split "a b|c d" into ["a", "b", "c d"]: single words, then phrases between bars."""
    words, *longer = text.replace("\n", " ").split("|")
    return words.split() + [phrase.strip() for phrase in longer]


VALUES = {
    name: phrases(text if text is not CITIES else text.title())
    for name, (text, *_) in RELATIONS.items()
}


def make_people(rng: random.Random, dev_share: float = 0.1) -> tuple[list[str], list[str]]:
    """Two disjoint lists of full names (train, dev) with the same first and last names."""
    people = [f"{first} {last}".title() for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(people)
    held_out = int(dev_share * len(people))
    return people[held_out:], people[:held_out]


def make_paragraph(rng: random.Random, people: list[str]) -> tuple[str, list[dict]]:
    """Facts as a text, and as dictionaries with person, relation, value and their offsets."""
    names = rng.sample(people, 3)
    relations = list(rng.choice(PAIRS))
    if rng.random() < 0.5:
        relations.append(rng.choice([r for pair in PAIRS for r in pair if r not in relations]))
    cells = [(name, relation) for name in names for relation in relations]
    values = {RELATIONS[r][0]: rng.sample(VALUES[r], 6) for r in relations}
    context, facts = "", []
    for name, relation in rng.sample(cells, rng.choice((4, 5))):
        value = values[RELATIONS[relation][0]].pop()
        template = rng.choice(RELATIONS[relation][1])
        start = len(context)
        sentence = template.format(p=name, v=value)
        context += sentence[0].upper() + sentence[1:] + ". "
        facts.append(
            {
                "person": name,
                "relation": relation,
                "value": value,
                "person_at": start + template.format(p="\0", v=value).index("\0"),
                "value_at": start + template.format(p=name, v="\0").index("\0"),
            }
        )
    return context.rstrip(), facts


def make_squad(rng: random.Random, people: list[str], paragraphs: int, questions: int = 3) -> dict:
    """The content of a SQuAD v1.1 file with this number of `questions` per paragraph."""
    articles = []
    for i in range(paragraphs):
        context, facts = make_paragraph(rng, people)
        qas = []
        for j, fact in enumerate(rng.sample(facts, questions)):
            for_value, for_person = RELATIONS[fact["relation"]][2:]
            asked = rng.choice(("value", "person"))
            question = rng.choice(for_value if asked == "value" else for_person)
            question = question.format(p=fact["person"], v=fact["value"])
            start = fact[asked + "_at"]
            text = context[start : start + len(fact[asked])]
            qas.append(
                {
                    "id": f"{i:05d}-{j}",
                    "question": question[0].upper() + question[1:],
                    "answers": [{"text": text, "answer_start": start}],
                }
            )
        articles.append({"title": f"People {i}", "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": articles}


def make_tokenizer() -> BertTokenizerFast:
    """A WordPiece tokenizer with every word of the templates and values, and all characters."""
    texts = FIRST_NAMES + LAST_NAMES + [value for values in VALUES.values() for value in values]
    for _, *templates in RELATIONS.values():
        for template in sum(templates, []):
            texts.append(template.replace("{p}", " ").replace("{v}", " "))
    words = sorted({word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower())})
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'-", *characters]
    vocabulary += ["##" + character for character in characters]
    vocabulary += [word for word in words if len(word) > 1]
    ids = {word: number for number, word in enumerate(vocabulary)}
    return BertTokenizerFast(vocab=ids, do_lower_case=True, model_max_length=MAX_LENGTH)


def make_pretraining_set(
    rng: random.Random, people: list[str], tokenizer: BertTokenizerFast, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, token types, which tokens are in a paragraph, and labels; each [size, length].

    The labels have a last dimension of two: the fact contains the token, and the token is in the
    sentence that states the fact.
    """
    texts, contexts, starts, ends = [], [], [], []
    for _ in range(size):
        context, facts = make_paragraph(rng, people)
        told = rng.randrange(len(facts))
        slots = {"p": facts[told]["person"], "v": facts[told]["value"]}
        if rng.random() < 0.8:
            slots[rng.choice("pv")] = "[MASK]"
        texts.append(rng.choice(RELATIONS[facts[told]["relation"]][1]).format(**slots) + ".")
        contexts.append(context)
        sentences = context.split(". ")
        starts.append(sum(len(sentence) + 2 for sentence in sentences[:told]))
        ends.append(starts[-1] + len(sentences[told]))
    encoded = tokenizer(
        texts, contexts, padding=True, return_tensors="pt", return_offsets_mapping=True
    )
    ids, types = encoded["input_ids"], encoded["token_type_ids"]
    begins, stops = encoded["offset_mapping"].unbind(-1)
    in_context = (types == 1) & (stops > begins)
    in_text = (types == 0) & (ids > tokenizer.mask_token_id)
    inside = (begins >= torch.tensor(starts)[:, None]) & (stops <= torch.tensor(ends)[:, None])
    copied = []
    for rows, told in zip(ids.split(500), in_text.split(500)):  # in parts, to save memory
        equal = rows[:, :, None] == rows[:, None, :]
        copied.append((equal & told[:, None, :]).any(2))
    labels = torch.stack([torch.cat(copied) & in_context, inside & in_context], dim=-1)
    return ids, types, in_context, labels


def build_bert(vocab_size: int) -> BertModel:
    """A small BERT whose positions start as sinusoids and whose queries start equal to its keys."""
    size = 128
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.09,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False)
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(0, size, 2) / size)
    angles = torch.arange(MAX_LENGTH)[:, None] * frequencies
    sinusoids = 0.3 * torch.cat([angles.sin(), angles.cos()], dim=1)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.copy_(sinusoids)
        for layer in model.encoder.layer:
            layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
    return model


def pretrain(
    model: BertModel,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
) -> None:
    """Train `model` to predict the labels of `make_pretraining_set`."""
    ids, types, in_context, labels = data
    lengths = (ids != 0).sum(1)
    head = torch.nn.Linear(model.config.hidden_size, 2)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    started, hits = time.perf_counter(), []
    for step in range(steps):
        rows = torch.randint(len(ids), (batch_size,))
        length = int(lengths[rows].max())
        batch, where = ids[rows, :length], in_context[rows, :length]
        mask = (batch != 0).long()
        hidden = model(batch, token_type_ids=types[rows, :length], attention_mask=mask)[0]
        logits, wanted = head(hidden[where]), labels[rows, :length][where]
        loss = 2 * F.binary_cross_entropy_with_logits(logits, wanted.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        hits.append(((logits > 0) == wanted).float().mean(0))
        if (step + 1) % 140 == 0:
            in_fact, in_sentence = torch.stack(hits).mean(0).tolist()
            print(
                f"  update {step + 1}: accuracy {in_fact:.1%} for words of the fact, "
                f"{in_sentence:.1%} for its sentence, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            hits = []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=lambda text: Path(text).expanduser(), required=True)
    add("--seed", type=int, default=0)
    add("--paragraphs", type=int, default=4000, help="in train.json, with three questions each")
    add("--pretraining_steps", type=int, default=700)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    train_people, dev_people = make_people(random.Random(args.seed))
    rng = random.Random(args.seed + 1)
    splits = {"train": (train_people, args.paragraphs), "dev": (dev_people, 300)}
    for name, (people, paragraphs) in splits.items():
        squad = make_squad(rng, people, paragraphs)
        (args.output_dir / f"{name}.json").write_text(json.dumps(squad), encoding="utf-8")
        print(f"{name}.json: {paragraphs} paragraphs, {3 * paragraphs} questions", flush=True)

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = build_bert(len(tokenizer))
    weights = sum(parameter.numel() for parameter in model.encoder.parameters())
    print(f"pre-training a BERT with {weights:,} encoder weights", flush=True)
    size = min(15_000, 32 * args.pretraining_steps)
    data = make_pretraining_set(random.Random(args.seed), train_people, tokenizer, size)
    pretrain(model, data, args.pretraining_steps)
    folder = args.output_dir / "bert"
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable for the owner only
    tokenizer.save_pretrained(folder)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
