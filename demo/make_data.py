"""Write what `make demo` needs: a small SQuAD and a small pre-trained BERT, without a network.

    python demo/make_data.py --output_dir DIR       (about 75 s on 2 CPU cores; same seed, same files)

**The data** (DIR/train.json, DIR/dev.json, format of SQuAD v1.1). A paragraph tells four or five
facts about three people; a fact is (person, relation, value). Relations come in pairs that take
values of one type: where someone lives / was born (cities), what they do / want to become (jobs),
... A paragraph mixes both relations of a pair, so that it always holds several spans of the right
type and a question has to be read for the person *and* for the relation. Each relation has several
wordings in both orders ("anna berg lives in oslo", "oslo is home to anna berg"), and half of
the questions ask for the person ("who lives in oslo?"). Values are drawn afresh for each paragraph:
nothing about an answer can be learned by heart. The people of dev.json never occur in train.json
(each first and each last name does, the combination does not).

**The pre-training** (DIR/bert, a `from_pretrained` folder). Movement pruning is about transfer:
weights learned on one task are pruned while the model learns another, and their size tells little
about their use there. So the encoder is first trained as a masked language model, never on questions:
its inputs are a reworded fact, [SEP], and a paragraph that contains this fact, and a fifth of the
words on either side is masked. To fill in a name or a value the model has to find the same fact
on the other side, which is the skill that reading comprehension later builds on. No question word
and no answer position is ever seen.
"""
import argparse
import json
import math
import os
import random
import re
import time

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

FIRST_NAMES = """anna ben carla david elena felix grace henry ida jonas karin leo maria nils olga paul
rosa simon tara victor wanda xavier yusuf zoe amir bella chen dora emil fatma george hana ivan julia kofi
lena marco nadia oscar""".split()
LAST_NAMES = """abbott berg castro duarte evans fischer garcia hansen ito jensen kovacs larsen moreau
novak okafor petrov quinn rossi silva tanaka ueda vargas weber young zhang adler brandt conti dubois
engel ferrari gupta haas ibrahim jovic keller lopez meyer nilsson ortiz""".split()
CITIES = """oslo rome lima cairo delhi paris tokyo quito dublin lagos madrid vienna athens berlin
hanoi lisbon warsaw sofia accra bogota dakar geneva havana jakarta kiev london manila nairobi ottawa
prague riga seoul tunis zagreb|cape town|new york|buenos aires|san jose|port louis|tel aviv"""
JOBS = """baker nurse pilot farmer lawyer dentist painter sailor teacher waiter miner tailor plumber
judge chemist banker writer singer gardener carpenter surgeon|fire fighter|bus driver|tax clerk|
night guard|book seller|zoo keeper"""
FOODS = """rice soup bread cheese salad pasta beans eggs honey olives mushrooms tofu spinach garlic
yoghurt noodles sushi figs|apple pie|lentil stew|fish cakes|dark chocolate|fried potatoes|lemon ice"""
INSTRUMENTS = """piano violin guitar flute cello harp trumpet drums banjo clarinet oboe organ tuba viola
accordion saxophone|bass guitar|french horn|steel drum"""
ANIMALS = """cats dogs horses rabbits parrots snakes spiders goats hens turtles mice ducks bees foxes
sheep frogs|polar bears|grey wolves|sea lions|fruit bats"""
YEARS = " ".join(str(year) for year in range(1950, 2000))

# relation: (values, statements, questions for the value, questions for the person)
RELATIONS = {
    "home": (CITIES, ["{p} lives in {v}", "{v} is home to {p}", "{p} has a flat in {v}"],
             ["where does {p} live?", "in which city does {p} have a flat?", "what city is home to {p}?"],
             ["who lives in {v}?", "who has a flat in {v}?"]),
    "birthplace": (CITIES, ["{p} was born in {v}", "{p} comes from {v}", "{v} is where {p} grew up"],
                   ["where was {p} born?", "what city does {p} come from?", "where did {p} grow up?"],
                   ["who was born in {v}?", "who comes from {v}?"]),
    "job": (JOBS, ["{p} works as a {v}", "{p} is employed as a {v}", "a {v} by trade is {p}"],
            ["what does {p} work as?", "what is {p} by trade?", "what is the job of {p}?"],
            ["who works as a {v}?", "who is employed as a {v}?"]),
    "dream": (JOBS, ["{p} hopes to become a {v}", "{p} dreams of being a {v}", "a {v} is what {p} wants to be"],
              ["what does {p} hope to become?", "what does {p} want to be?", "what does {p} dream of being?"],
              ["who hopes to become a {v}?", "who wants to be a {v}?"]),
    "likes": (FOODS, ["{p} loves {v}", "{p} likes to eat {v}", "{v} tastes good to {p}"],
              ["what does {p} love?", "what does {p} like to eat?", "what tastes good to {p}?"],
              ["who loves {v}?", "who likes to eat {v}?"]),
    "dislikes": (FOODS, ["{p} hates {v}", "{p} never eats {v}", "{v} tastes bad to {p}"],
                 ["what does {p} hate?", "what does {p} never eat?", "what tastes bad to {p}?"],
                 ["who hates {v}?", "who never eats {v}?"]),
    "plays": (INSTRUMENTS, ["{p} plays the {v}", "{p} performs on the {v}", "the {v} is played by {p}"],
              ["what does {p} play?", "what does {p} perform on?", "what is played by {p}?"],
              ["who plays the {v}?", "who performs on the {v}?"]),
    "sells": (INSTRUMENTS, ["{p} sold the {v}", "{p} gave away the {v}", "the {v} was given away by {p}"],
              ["what did {p} sell?", "what did {p} give away?", "what was given away by {p}?"],
              ["who sold the {v}?", "who gave away the {v}?"]),
    "keeps": (ANIMALS, ["{p} keeps {v}", "{p} looks after {v}", "{v} are kept by {p}"],
              ["what does {p} keep?", "what does {p} look after?", "what animals are kept by {p}?"],
              ["who keeps {v}?", "who looks after {v}?"]),
    "fears": (ANIMALS, ["{p} is afraid of {v}", "{p} runs away from {v}", "{v} frighten {p}"],
              ["what is {p} afraid of?", "what does {p} run away from?", "what animals frighten {p}?"],
              ["who is afraid of {v}?", "who runs away from {v}?"]),
    "wedding": (YEARS, ["{p} married in {v}", "the wedding of {p} was in {v}", "in {v} came the wedding of {p}"],
                ["when did {p} marry?", "in what year was the wedding of {p}?", "when was the wedding of {p}?"],
                ["who married in {v}?", "who had a wedding in {v}?"]),
    "degree": (YEARS, ["{p} left school in {v}", "the exam of {p} was in {v}", "in {v} came the exam of {p}"],
               ["when did {p} leave school?", "in what year was the exam of {p}?", "when was the exam of {p}?"],
               ["who left school in {v}?", "who had an exam in {v}?"]),
}
PAIRS = [("home", "birthplace"), ("job", "dream"), ("likes", "dislikes"), ("plays", "sells"),
         ("keeps", "fears"), ("wedding", "degree")]


def phrases(text):
    """Split "a b|c d" into ["a", "b", "c d"]: single words, then phrases between bars."""
    words, *longer = text.replace("\n", " ").split("|")
    return words.split() + [phrase.strip() for phrase in longer]


VALUES = {name: phrases(text if text is not CITIES else text.title())
          for name, (text, *_) in RELATIONS.items()}


def make_people(rng, dev_share=0.1):
    """Return two disjoint lists of full names (train, dev) made of the same first and last names."""
    people = [f"{first} {last}".title() for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(people)
    held_out = int(dev_share * len(people))
    return people[held_out:], people[:held_out]


def make_paragraph(rng, people):
    """Return (context, facts): five facts as text, and as dicts with person, relation, value, offsets."""
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
        facts.append({"person": name, "relation": relation, "value": value,
                      "person_at": start + template.format(p="\0", v=value).index("\0"),
                      "value_at": start + template.format(p=name, v="\0").index("\0")})
    return context.rstrip(), facts


def make_squad(rng, people, paragraphs, questions=3):
    """Return a data set as the dict of a SQuAD v1.1 file, `questions` per paragraph."""
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
            qas.append({"id": f"{i:05d}-{j}", "question": question[0].upper() + question[1:],
                        "answers": [{"text": text, "answer_start": start}]})
        articles.append({"title": f"People {i}", "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": articles}


def make_tokenizer(folder):
    """Write a WordPiece vocabulary (every word of the templates and lists, and all characters)."""
    texts = FIRST_NAMES + LAST_NAMES + [v for values in VALUES.values() for v in values]
    texts += [t.replace("{p}", " ").replace("{v}", " ") for r in RELATIONS.values() for ts in r[1:] for t in ts]
    words = sorted({word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower())})
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'-", *characters]
    vocab += ["##" + character for character in characters] + [w for w in words if len(w) > 1]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as f:
        f.write("\n".join(vocab) + "\n")
    tokenizer = BertTokenizerFast(os.path.join(folder, "vocab.txt"), do_lower_case=True, model_max_length=96)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_pretraining_set(rng, people, tokenizer, size):
    """Return (input_ids, token_type_ids), each (size, length): a reworded fact, [SEP], its paragraph."""
    rewordings, contexts = [], []
    for _ in range(size):
        context, facts = make_paragraph(rng, people)
        fact = rng.choice(facts)
        rewordings.append(rng.choice(RELATIONS[fact["relation"]][1]).format(p=fact["person"], v=fact["value"]) + ".")
        contexts.append(context)
    encoded = tokenizer(rewordings, contexts, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["token_type_ids"]


def build_bert(vocab_size, seed, **sizes):
    """Return a small random BertForMaskedLM whose position embeddings start as sinusoids."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=vocab_size, max_position_embeddings=96, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, **sizes)
    model = BertForMaskedLM(config)
    return model


def pretrain(model, tokenizer, input_ids, token_type_ids, steps, batch_size=32, learning_rate=1e-3, log=print):
    """Train `model` in place as a masked language model: 20% of the words, by [MASK]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    lr = lambda t: min((t + 1) / (0.05 * steps), (steps - t) / (0.95 * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr)
    lengths = (input_ids != tokenizer.pad_token_id).sum(-1)
    model.train()
    start, running, hits = time.time(), [], []
    for step in range(steps):
        rows = torch.randint(len(input_ids), (batch_size,))
        length = int(lengths[rows].max())
        ids, types = input_ids[rows, :length], token_type_ids[rows, :length]
        masked = (torch.rand(ids.shape) < 0.2) & (ids > tokenizer.mask_token_id)
        hidden = model.bert(ids.masked_fill(masked, tokenizer.mask_token_id), token_type_ids=types,
                            attention_mask=(ids != tokenizer.pad_token_id).long())[0]
        logits = model.cls(hidden[masked])
        loss = torch.nn.functional.cross_entropy(logits, ids[masked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        running.append(loss.item())
        hits.append((logits.argmax(-1) == ids[masked]).float().mean().item())
        if (step + 1) % 250 == 0:
            log(f"  step {step + 1}: loss {sum(running) / len(running):.3f}, accuracy {sum(hits) / len(hits):.3f}, {time.time() - start:.0f} s")
            running, hits = [], []
