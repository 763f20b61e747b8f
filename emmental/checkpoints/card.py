"""Model cards: the README.md of a saved model, which the hub shows as its page.

The card of a fine-pruned model ends with the section `MADE`: its data, metrics and command. The
bertarized and the packed forms of the model take over its metadata and this section.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..models.families import COMPACT
from ..modules.masks import masked_layers
from ..modules.methods import METHODS
from ..system.errors import TrainingError, first_line
from ..system.files import write_text
from .counts import plain_percents, remaining_weights

CARD_FILE = "README.md"
MADE = "## How it was made"
PAPER = "[Movement Pruning: Adaptive Sparsity by Fine-Tuning](https://arxiv.org/abs/2005.07683)"
PIPELINES = {
    "QuestionAnswering": "question-answering",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "MultipleChoice": "multiple-choice",
}


def write_run_card(
    folder: Path,
    model: PreTrainedModel,
    *,
    base: str,
    data: str,
    dataset: str | None,
    teacher: str | None,
    metrics: dict[str, float],
    command: Sequence[str],
) -> None:
    """Write the card of the model that a training run saved to `folder`.

    base: the model that the run started from. data, dataset: the training data, and their name on
    the hub. metrics: of the evaluation. command: the words of the command of the run.
    """
    head = type(model).__name__.partition("For")[2]
    scores = [
        EvalResult(
            task_type=PIPELINES[head],
            dataset_type=dataset or data,
            dataset_name=data,
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[head],
        tags=["movement-pruning"] if masked_layers(model) else None,
        base_model=None if Path(base).exists() else base,
        datasets=[dataset] if dataset else None,
        model_name=folder.resolve().name if scores else None,
        eval_results=scores or None,
    )
    rows = {"started from": f"`{base}`", "data": data}
    if teacher:
        rows["teacher"] = f"`{teacher}`"
    rows |= {name: f"{value:.4g}" for name, value in metrics.items()}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    made = f"{MADE}\n\n| | |\n|---|---|\n{table}\n```bash\n{shlex.join(command)}\n```\n"
    write_text(folder / CARD_FILE, _card(metadata, folder.resolve().name, model, made))


def derived_card(card: str | None, name: str, model: PreTrainedModel, origin: str) -> str:
    """The card of a plain model made from a fine-pruned one.

    card: the card of the fine-pruned model, if there is one. name: of the plain model. origin: a
    sentence that says what the plain model was made from.
    """
    metadata = ModelCard(card).data if card else ModelCardData(library_name="transformers")
    if metadata.eval_results:
        metadata.model_name = name
    made = (card or "").partition(MADE)[2].lstrip("\n")
    return _card(metadata, name, model, f"{MADE}\n\n{origin}\n\n{made}")


def read_card(folder: Path) -> str | None:
    """The card in a folder; None if there is none."""
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def loading_of(model: PreTrainedModel, name: str | Path) -> str:
    """The call that loads the model from the folder `name`, which has the code of a compact one."""
    kind, trusted = type(model).__name__, ""
    if model.config.model_type.startswith(COMPACT):
        kind, trusted = f"AutoModel{''.join(kind.partition('For')[1:])}", ", trust_remote_code=True"
    return f'{kind}.from_pretrained("{name}"{trusted})'


def push_to_hub(folder: Path, repo_id: str) -> str:
    """Upload a saved model with its card, and return its URL. Raises TrainingError."""
    api = HfApi()
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo_id)
    except Exception as error:  # no network, no token, no permission: each has its own type
        raise TrainingError(
            f"{folder} is written, but cannot be pushed to {repo_id}: {first_line(error)}"
        ) from error
    return str(url)


def _card(metadata: ModelCardData, name: str, model: PreTrainedModel, made: str) -> str:
    kind = type(model).__name__
    config = model.config
    note = ""
    if masked_layers(model):
        counts = remaining_weights(model)
        linear, published = counts.linear_percent, counts.published_percent
        method = METHODS[config.pruning_method]
        intro = (
            f"A `{kind}` after {method.title} pruning (`{config.pruning_method}`"
            f"{counts.conditions}, {PAPER}). "
            "The files hold all weights, and the scores from which masks follow."
        )
        note = "\n\nInstall `emmental` with `pip install .` in a clone of its project."
    else:
        linear, published = plain_percents(model)
        if config.model_type.startswith(COMPACT):
            intro = (
                f"A `{kind}`, without the heads and neurons that pruning emptied ({PAPER}). Its "
                f"layers have {sum(config.layer_heads):,} heads and {sum(config.layer_neurons):,} "
                "neurons in all."
            )
            note = (
                "\n\nThe two files of code in the folder need nothing but torch and transformers. "
                "After `import emmental` (`pip install .` in a clone), none of them runs."
            )
        else:
            intro = f"A plain `{kind}`, whose pruned weights are zero ({PAPER})."
            if linear == 100:
                intro = f"A `{kind}` without pruned weights."
    remain = (
        f"{linear:.1f}% of the weights of its encoder's linear layers remain "
        f"({published:.1f}% of the encoder, bias and LayerNorm included)."
    )
    package = "emmental" if masked_layers(model) else "transformers"
    load = loading_of(model, name)
    load = f"from {package} import {load.partition('.')[0]}\n\nmodel = {load}"
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n{intro} {remain}\n\n"
        f"## Load\n\n```python\n{load}\n```{note}\n\n{made}"
    )
