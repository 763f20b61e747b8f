"""Fine-prune (or fine-tune) an encoder, such as BERT, to tag words: entities, parts of speech.

Movement pruning towards 15% of the encoder's weights:

    python masked_run_ner.py --model_type masked_bert --model_name_or_path bert-base-cased \\
        --data_dir CONLL2003 --output_dir OUT --do_train --do_eval --do_predict \\
        --per_gpu_train_batch_size 16 --num_train_epochs 10 --learning_rate 3e-5 \\
        --warmup_ratio 0.1 --initial_threshold 1 --final_threshold 0.15 --pruning_method topK

The dense teacher: --model_type bert. Several GPUs: torchrun --nproc_per_node 8 masked_run_ner.py
--data_dir holds train, dev (or valid) and test files: CoNLL columns, or JSON lines. Without
it, --dataset_name comes from the hub. Tags in IO, BIO, BIOES or BILOU mark entities: precision,
recall and F1 follow the rules of conlleval. For other tags, the metric is the accuracy over words.
"""

import argparse

from datasets import Dataset
from torch.nn import functional as F

from emmental.checkpoints.labels import checkpoint_labels
from emmental.data import tags
from emmental.data.entities import entity_metrics, has_entities, tag_accuracy
from emmental.data.padding import pad_batch, padding_of
from emmental.data.reading import name_outputs, take_first
from emmental.losses import distillation_loss
from emmental.system.files import write_json, write_text
from emmental.training import run
from emmental.training.flags import make_parser
from emmental.training.parser import Parser, number
from emmental.training.task import Task

PREDICTIONS, TEST_RESULTS = "predictions.txt", "test_results.json"


class Tagging(Task):
    """A tag for each word of a sentence."""

    head = "TokenClassification"
    max_seq_length, logging_steps, save_steps = 128, 50, 50
    result_files = ("eval_results.*", PREDICTIONS, TEST_RESULTS)

    # fmt: off
    def add_arguments(self, parser):
        add = parser.add_argument_group("tagging").add_argument
        add("--data_dir", help="folder of the train, dev (or valid) and test files")
        add("--dataset_name", help="data set on the hub, without --data_dir")
        add("--dataset_config", help="configuration of that data set, if it has several")
        add("--word_column",
            help="column of the words: a number from 1 (default: 1), or the name of the field in "
                 "JSON lines and on the hub (default: words or tokens)")
        add("--tag_column",
            help="column of the tags: a number (default: the last), or a name (default: tags or "
                 "ner_tags)")
        add("--stride", type=number(int, at_least=1),
            help="tokens between the starts of the windows over a long sentence (default: half of "
                 "--max_seq_length)")
        add("--do_predict", action="store_true",
            help=f"write the tags of the test set to {PREDICTIONS}, and {TEST_RESULTS} if it has "
                 "tags")
    # fmt: on

    def check(self, args):
        problems = []
        if bool(args.data_dir) == bool(args.dataset_name):
            problems.append("give --data_dir, or --dataset_name for data from the hub")
        if args.dataset_config and not args.dataset_name:
            problems.append("--dataset_config needs --dataset_name: give both")
        names = ("word_column", "tag_column")
        return problems + [f"--{name} is empty" for name in names if getattr(args, name) == ""]

    def load_examples(self, args, checkpoint):
        self.examples = {}
        for split, limit in self.splits(args).items():
            examples, where = read_split(args, split)
            places = tags.tag_places(examples, where)
            if split == "train":
                self.labels = tags.labels_of(places, where)
            elif not self.examples:
                outputs = checkpoint_labels(checkpoint, args.cache_dir)
                self.labels = name_outputs(outputs, tuple(places), where)
            examples = tags.compared(examples, places, self.labels, where, split == "test")
            self.examples[split] = take_first(examples, limit)
        if args.dataset_name:
            self.data = self.dataset = args.dataset_name

    def make_features(self, args, tokenizer, model):
        self.padding = padding_of(tokenizer, model)
        options = {name: getattr(args, name) for name in ("max_seq_length", "overwrite_cache")}
        options["stride"] = args.stride or max(1, args.max_seq_length // 2)
        features = {
            split: tags.build_features(examples, tokenizer, self.labels, **options)
            for split, examples in self.examples.items()
        }
        self.set_features(features)

    def collate(self, features):
        return pad_batch(features, columns={"tags": tags.IGNORED}, **self.padding)

    def loss(self, logits, batch):
        return F.cross_entropy(logits[0].transpose(1, 2), batch["tags"])

    def distillation_loss(self, student, teacher, batch, temperature):
        words = batch["tags"] != tags.IGNORED
        return distillation_loss((student[0][words],), (teacher[0][words],), temperature)

    def weight(self, batch):
        return float((batch["tags"] != tags.IGNORED).sum())

    def predicted(self, split, logits):
        features = (self.evaluation_sets | self.test_sets)[split]
        rows = [row for (row,) in logits]
        return tags.predicted_tags(self.examples[split], features, rows, self.labels)

    def score(self, split, logits, step, output_dir):
        metrics = entity_metrics if has_entities(self.labels) else tag_accuracy
        return metrics([*self.examples[split]["tags"]], self.predicted(split, logits))

    def submit(self, split, logits, output_dir):
        examples = self.examples[split]
        text = tags.columns_of(examples, self.predicted(split, logits))
        write_text(output_dir / PREDICTIONS, text)
        (output_dir / TEST_RESULTS).unlink(missing_ok=True)  # may be of another test set
        if "tags" in examples.column_names:
            write_json(output_dir / TEST_RESULTS, self.score(split, logits, None, output_dir))


def read_split(args: argparse.Namespace, split: str) -> tuple[Dataset, str]:
    """The sentences of a split, and the name of their file, or of the data set on the hub."""
    columns = args.word_column, args.tag_column
    if args.data_dir:
        path = tags.split_file(args.data_dir, split)
        return tags.read_examples(path, columns, split == "test", args.cache_dir), str(path)
    name = tuple(filter(None, (args.dataset_name, args.dataset_config)))
    return tags.load_hub_examples(name, split, columns, args.cache_dir), f"{name[0]} ({split})"


def get_parser() -> Parser:
    return make_parser(Tagging(), __doc__)


def main(argv: list[str] | None = None) -> dict[str, float | str]:
    return run.main(Tagging(), __doc__, argv)


if __name__ == "__main__":
    main()
