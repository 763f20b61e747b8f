"""The cost of masking: a training step and an evaluation of a masked model and the stock model.

    python benchmarks/training_step.py      # 8 x 384 and 2 x 128: 20 min on 2 cores; or on a GPU
    python benchmarks/training_step.py --shapes 16x384 --bf16 --compile --json step.json
    python benchmarks/training_step.py --family roberta     # the default size of another family

Both models run in one process, in turn. A ratio is the median of the ratios of neighbouring steps,
a time the median of all steps. The dense side is the stock model for questions, with frozen
embeddings, like ours. Both have the optimiser, the clipping and the penalty of a run of the
scripts. Peak memory is measured in one process per side (on a GPU, by the allocator). "allowed" is
the memory that masks need: scores, their gradient, two moments of Adam (for platon, the uncertainty
instead), one byte per weight for the mask (four for l0), and a masked copy of all matrices in the
precision of the computation.
With another --granularity, scores and masks are as many as its scores.
"""

import argparse
import contextlib
import functools
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import report
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForQuestionAnswering

from emmental.losses import regularization
from emmental.models.families import FAMILIES, MASKED, layers_of
from emmental.models.inputs import input_names
from emmental.models.masked import CLASSES, MaskedModel
from emmental.modules import find_masks, masked, masked_layers
from emmental.modules.granularity import GRANULARITIES
from emmental.modules.methods import METHODS
from emmental.modules.observation import observe_scores, observed_norms
from emmental.training.distributed import World, keep_freed_memory
from emmental.training.guards import GradientGuard
from emmental.training.optim import build_optimizer, trained_parameters

# fmt: off
THRESHOLD = {"topK": 0.15, "magnitude": 0.15, "sigmoied_threshold": 0.5, "threshold": 0.0,
             "l0": 1.0, "sensitivity": 0.15, "platon": 0.15}
COLUMNS = ["side", "step/dense", "cut-offs", "forward", "backward", "optimiser", "step s",
           "evaluation/dense", "evaluation s", "peak MiB", "added MiB", "allowed MiB"]
# fmt: on
PHASES = COLUMNS[2:6]
MIB = 2**20
STATUS = Path("/proc/self/status")


class Side:
    """A model with its optimiser: `method` is a pruning method, or "dense"."""

    def __init__(self, method: str, args: argparse.Namespace):
        self.method, self.args = method, args
        torch.manual_seed(0)
        size = report.size_of(args.family, args.layers, args.hidden)
        config = CONFIG_MAPPING[args.family](**size)
        self.model = AutoModelForQuestionAnswering.from_config(config)
        MaskedModel.freeze_embeddings(self.model)  # the function also serves stock models
        if method != "dense":
            config = CONFIG_MAPPING[MASKED + args.family](
                **size,
                pruning_method=method,
                mask_init="uniform",
                mask_scale=0.1,
                granularity=args.granularity,
            )
            state = self.model.state_dict()
            masked_class = CLASSES[f"Masked{type(self.model).__name__}"]
            self.model = masked_class.from_pretrained(None, config=config, state_dict=state)
        self.model.to(args.device).train()
        self.optimizer = build_optimizer(self.model, 3e-5, 1e-2, 0.0, 1e-8)
        self.layers = masked_layers(self.model)
        self.parameters = trained_parameters(self.model, self.optimizer)
        self.scaler = torch.amp.GradScaler(args.device, enabled=False)
        self.guard = GradientGuard(False, World(torch.device(args.device)))
        if args.compile:
            for layer in layers_of(self.model):
                layer.compile()

    def forward(self, batch: dict[str, Tensor]):
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        with torch.autocast(self.args.device, dtype, enabled=self.args.bf16):
            return self.model(**{name: batch[name] for name in input_names(self.model)})

    def step(self, batch: dict[str, Tensor], clock: Callable[[str], None]) -> None:
        """One update, as in `emmental.training.loop`. Calls `clock(phase)` after each phase."""
        penalty = METHODS[self.method].penalty if self.method != "dense" else None
        with masked(self.layers, THRESHOLD.get(self.method)):
            clock("cut-offs")
            outputs = self.forward(batch)
            target = torch.zeros_like(batch["input_ids"][:, 0])
            loss = F.cross_entropy(outputs.start_logits.float(), target)
            loss = loss + F.cross_entropy(outputs.end_logits.float(), target)
            if penalty:
                loss = loss + regularization(self.layers, penalty)
            clock("forward")
            loss.backward()
            clock("backward")
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.guard.skips(0, [norm, *observed_norms(self.layers)], {"loss": loss.detach()})
        observe_scores(self.layers, self.scaler, skipped=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock("optimiser")

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> None:
        self.forward(batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.eval()
        with masked(self.model, THRESHOLD.get(self.method)):
            yield
        self.model.train()


class Clock:
    """Seconds by phase. `phases=False` lets them overlap on a GPU: then only the total counts."""

    def __init__(self, device: str, phases: bool = True):
        self.device, self.phases = device, phases
        self.seconds = {}
        self._synchronize()
        self.start = self.last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        if self.phases:
            self._synchronize()
            now = time.perf_counter()
            self.seconds[phase], self.last = now - self.last, now

    def total(self) -> float:
        self._synchronize()
        return time.perf_counter() - self.start

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def make_batch(shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, shape, generator=torch.Generator().manual_seed(1)).to(device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def compare(dense: Side, masked: Side, batch: dict[str, Tensor], args: argparse.Namespace) -> dict:
    """Times of both sides, in turn, and the median ratios of neighbouring steps."""
    sides = {"dense": dense, "masked": masked}
    totals = {name: [] for name in sides}
    phases = {name: [] for name in sides}
    for repetition in range(-args.warmup, args.repeats):
        for name in ("dense", "masked") if repetition % 2 else ("masked", "dense"):
            clock = Clock(args.device)
            sides[name].step(batch, clock)
            total = clock.total()
            if args.device == "cuda":  # again, without waiting after each phase
                whole = Clock(args.device, phases=False)
                sides[name].step(batch, whole)
                total = whole.total()
            if repetition >= 0:
                totals[name].append(total)
                phases[name].append(clock.seconds)
    with dense.evaluating(), masked.evaluating():
        calls = {name: functools.partial(side.evaluate, batch) for name, side in sides.items()}
        evaluations = report.take_turns(calls, 1, args.repeats, args.device)
    result = {"step_ratio": _paired(totals), "evaluation_ratio": _paired(evaluations)}
    for name in sides:
        result[name] = {
            phase: statistics.median(times[phase] for times in phases[name]) for phase in PHASES
        }
        result[name] |= {
            "step": statistics.median(totals[name]),
            "evaluation": statistics.median(evaluations[name]),
        }
    return result


def _paired(times: dict[str, list[float]]) -> float:
    return statistics.median(m / d for d, m in zip(times["dense"], times["masked"], strict=True))


def peak_memory(method: str, shape: tuple[int, int], args: argparse.Namespace) -> float:
    """Peak MiB of a separate process that takes three steps of one side."""
    command = [sys.executable, __file__, "--peak_memory_of", method, "--device", args.device]
    command += ["--family", args.family, "--granularity", args.granularity]
    for name in ("layers", "hidden"):
        command += [f"--{name}", str(value)] if (value := getattr(args, name)) else []
    command += ["--shapes", "x".join(map(str, shape))]
    command += [f"--{flag}" for flag in ("bf16", "compile") if getattr(args, flag)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _measure_peak(args: argparse.Namespace) -> float:
    side = Side(args.peak_memory_of, args)
    batch = make_batch(args.shapes[0], args.device)
    for _ in range(3):
        side.step(batch, lambda phase: None)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    if STATUS.exists():  # ru_maxrss would include the parent's memory
        return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) / 1024
    unit = MIB if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def allowed_memory(masked: Side) -> float:
    """The MiB that masks need: see the top of this file."""
    copied = sum(layer.weight.numel() for layer in masked.layers.layers if layer.is_gate)
    copied *= 2 if masked.args.bf16 else 4
    method = METHODS[masked.method]
    scores = 4 * {"learned": 4, "observed": 2 + len(method.state), None: 0}[method.scores]
    masks = find_masks(masked.model, THRESHOLD[masked.method]).by_layer.values()
    masks = {id(mask): mask for mask in masks}.values()  # layers may share them
    return (sum(x.numel() * (scores + x.element_size()) for x in masks) + copied) / MIB


def shape(text: str) -> tuple[int, int]:
    try:
        batch, length = (int(part) for part in text.split("x"))
        if batch < 1 or not 2 <= length <= 512:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not batch x length, such as 8x384 (length 2 to 512)"
        ) from None
    return batch, length


def get_parser() -> argparse.ArgumentParser:
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--shapes", type=shape, nargs="+", default=[(8, 384), (2, 128)],
        help="batch x length (default: 8x384 2x128)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--granularity", choices=GRANULARITIES, default="weight", help="default: weight")
    add("--family", choices=FAMILIES, default="bert", help="default: bert")
    add("--layers", type=report.positive,
        help="layers of the model (default: the family's, 12 for bert)")
    add("--hidden", type=report.hidden_size,
        help="hidden size, a multiple of 64 (default: the family's, 768 for bert)")
    add("--repeats", type=report.positive, default=7,
        help="measured steps of each side (default: 7)")
    add("--warmup", type=report.at_least(0), default=2, help="first steps, unmeasured (default: 2)")
    add("--device", type=report.device, default=report.DEVICE,
        help="cpu or cuda (default: a GPU if there is one)")
    add("--bf16", action="store_true", help="autocast to bfloat16, like --bf16 of the scripts")
    add("--compile", action="store_true",
        help="compile the encoder layers, like --compile of the scripts")
    add("--no_memory", action="store_true", help="do not measure the peak memory")
    add("--peak_memory_of", help=argparse.SUPPRESS)
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.device == "cpu":
        keep_freed_memory()
    if args.peak_memory_of:
        print(_measure_peak(args))
    else:
        report.main(args, run)


def run(args: argparse.Namespace) -> dict:
    names = ("family", "granularity", "bf16", "compile")
    results = {name: getattr(args, name) for name in names}
    results["shapes"] = shapes = {}
    options = f", granularity {args.granularity}"
    options += ", bf16" * args.bf16 + ", compiled" * args.compile
    dense = Side("dense", args)
    layers, hidden = dense.model.config.num_hidden_layers, dense.model.config.hidden_size
    print(f"{args.family} of {layers} layers, hidden size {hidden}; {args.device}{options}")
    for size in args.shapes:
        batch = make_batch(size, args.device)
        name = "{} x {}".format(*size)
        shapes[name] = {}
        rows = []
        dense_memory = None if args.no_memory else peak_memory("dense", size, args)
        for method in args.methods:
            masked = Side(method, args)
            result = shapes[name][method] = compare(dense, masked, batch, args)
            if not args.no_memory:
                result["memory"] = {
                    "dense": dense_memory,
                    "masked": peak_memory(method, size, args),
                    "allowed": allowed_memory(masked),
                }
            rows += _rows(method, result)
            del masked
            print(f"  {name} {method}: step ratio {result['step_ratio']:.3f}", flush=True)
        report.print_table(f"batch {name}: seconds", COLUMNS, rows)
    return results


def _rows(method: str, result: dict) -> list[list]:
    """The rows of a method and of the dense side that ran in turn with it."""
    times = {
        side: [*(result[side][phase] for phase in PHASES), result[side]["step"]]
        for side in ("masked", "dense")
    }
    peaks = {"masked": [None] * 3, "dense": [None] * 3}
    if memory := result.get("memory"):
        added = memory["masked"] - memory["dense"]
        peaks["masked"] = [round(memory["masked"]), round(added), round(memory["allowed"])]
        peaks["dense"][0] = round(memory["dense"])
    ratios = {"masked": (result["step_ratio"], result["evaluation_ratio"]), "dense": (None, None)}
    rows = []
    for label, side in ((method, "masked"), ("  dense in turn", "dense")):
        step, evaluation = ratios[side]
        rows.append(
            [label, step, *times[side], evaluation, result[side]["evaluation"], *peaks[side]]
        )
    return rows


if __name__ == "__main__":
    main()
