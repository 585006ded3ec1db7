"""Tokens per second and peak memory of a training step of each model, at the sizes of the full experiment.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --lengths 4096 --repeats 1 --backends auto
    python benchmarks/training_step.py --device cuda --lengths 1024 4096

A step is forward, loss, backward, gradient clipping and AdamW, on random tokens without padding; float32 on
the CPU, bf16 autocast on CUDA. Each step of a model is measured right after one of the anchor, the
conventional model on PyTorch's fused attention; "dense" is the same model on the dense formulas, measured
where it fits into --memory-limit. Peak memory is the allocator's on CUDA; on the CPU it is the whole resident
set, libraries included, of a fresh process that takes one step. Writes <date>_<device>_training_step.json.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: Python looks for modules in this folder only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from attention_kernels import use_backend
from benchmarks.benchmarking import (
    Seconds,
    chosen_device,
    clock,
    peak_process,
    results_stem,
    take_turns,
    write_results,
)
from command_line import (
    EXIT_DONE,
    Parser,
    add_settings,
    check_settings,
    choose,
    described,
    exit_code,
    given_settings,
    setting,
)
from experiment.models import COMPARED, Model, build
from reporting.text_tables import NONE, TextTable, markdown_table, short
from train_and_evaluate import ModelSettings, TrainingSettings
from training.device_memory import PeakMemory

VOCAB_SIZE, NUM_CLASSES = 257, 2  # of the byte-level text task


@dataclass(frozen=True)
class StepSettings:
    """Benchmark"""

    lengths: tuple[int, ...] = setting((1024,), "tokens of a sequence, N", minimum=1)
    batch_size: int = setting(32, "sequences of a step", minimum=1)
    models: tuple[str, ...] = setting(COMPARED, "what to measure")
    backends: tuple[str, ...] = setting(("auto", "dense"), "of the attention engine")
    repeats: int = setting(5, "measured steps of each case, of which the median is taken", minimum=1)
    device: str = setting("auto", "cpu, cuda or auto")
    threads: int | None = setting(None, "CPU threads of PyTorch", minimum=1)
    memory: bool = setting(True, "measure peak memory too")
    memory_limit: float = setting(12.0, "GB that a dense case may take to be measured", above=0)
    output_dir: str = setting("benchmarks/results", "folder of the results")

    def __post_init__(self) -> None:
        check_settings(self)
        for model in self.models:
            Model.parse(model)
        for backend in self.backends:
            choose(backend, ("auto", "native", "tiled", "dense"), "backend")


class Case(NamedTuple):
    """One line of the table."""

    model: str
    backend: str
    length: int


def fits(case: Case, settings: StepSettings, model: ModelSettings) -> bool:
    """Whether a dense case fits: each layer keeps about four score matrices for its backward."""
    if case.backend != "dense":
        return True
    timescales = getattr(Model.parse(case.model).attention(model)(), "num_timescales", 1)
    matrices = 4 * model.num_layers * timescales * model.num_heads * settings.batch_size
    return 4 * matrices * case.length**2 <= settings.memory_limit * 1e9


def make_step(
    case: Case, settings: StepSettings, model_settings: ModelSettings, device: torch.device
) -> Callable[[], Seconds]:
    """A function that takes a training step of a new model on tokens of its own."""
    training = TrainingSettings()
    model = build(Model.parse(case.model), model_settings, VOCAB_SIZE, NUM_CLASSES).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB_SIZE, (settings.batch_size, case.length), generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (settings.batch_size,), generator=generator).to(device)
    padding = torch.zeros(settings.batch_size, case.length, dtype=torch.bool, device=device)

    def step() -> Seconds:
        started = clock(device)
        optimizer.zero_grad()
        with use_backend(case.backend):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens, padding)
            F.cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(parameters, training.gradient_clip)
        optimizer.step()
        return {"step": clock(device) - started}

    return step


def peak_bytes(case: Case, settings: StepSettings, model: ModelSettings, device_name: str) -> int | None:
    """The most that is held while one step is taken."""
    device = chosen_device(device_name, settings.threads)
    step = make_step(case, settings, model, device)
    peak = PeakMemory(device)
    step()
    return peak.read()


def measure(settings: StepSettings, model: ModelSettings, device: torch.device) -> list[dict[str, Any]]:
    """A row for each length, model and backend; the anchor is the conventional model on "auto"."""
    rows = []
    for length in settings.lengths:
        cases = [Case(name, backend, length) for name in settings.models for backend in settings.backends]
        cases = [case for case in cases if fits(case, settings, model)]
        anchor = make_step(Case("conventional", "auto", length), settings, model, device)
        steps = {" ".join(case[:2]): make_step(case, settings, model, device) for case in cases}
        timed = take_turns(anchor, steps, settings.repeats)
        for case, times in zip(cases, timed.values(), strict=True):
            row: dict[str, Any] = {**case._asdict(), **times}
            row["tokens_per_second"] = settings.batch_size * length / times["step"]["seconds"]
            if settings.memory:
                row["peak_bytes"] = peak_process(device)(peak_bytes, case, settings, model, str(device))
            rows.append(row)
            ratio = times["step"]["ratio"]
            print(f"N = {length:,}: {case.model}, {case.backend}: {ratio:.2f}", file=sys.stderr, flush=True)
    return rows


def table_of(rows: Sequence[dict[str, Any]], settings: StepSettings, device: torch.device) -> TextTable:
    header = ["model", "backend", "N", "seconds", "tokens/s", "ratio", "of least times", "peak GB"]
    lines = []
    for row in rows:
        step, peak = row["step"], row.get("peak_bytes")
        found = [step["ratio"], step["ratio_of_least"]]
        texts = [f"{row['length']:,}", short(step["seconds"]), short(round(row["tokens_per_second"]))]
        texts += [*(f"{ratio:.2f}" for ratio in found), NONE if peak is None else f"{peak / 1e9:.2f}"]
        lines.append([row["model"], row["backend"], *texts])
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    note = f"batch {settings.batch_size}, {device.type}{threads}, {settings.repeats} measured steps; "
    return TextTable("Training step", header, lines, note + "ratios are to conventional, auto", names=2)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(**described(__doc__))
    add_settings(parser, StepSettings)
    add_settings(parser, ModelSettings)
    arguments = parser.parse_args(argv)

    def run() -> int:
        settings = replace(StepSettings(), **given_settings(arguments, StepSettings))
        model = replace(ModelSettings(), **given_settings(arguments, ModelSettings))
        device = chosen_device(settings.device, settings.threads)
        stem = results_stem(settings.output_dir, "training_step", device)
        rows = measure(settings, model, device)
        write_results(stem, device, {"benchmark": asdict(settings), "model": asdict(model)}, rows)
        print(markdown_table(table_of(rows, settings, device)))
        return EXIT_DONE

    return exit_code("training_step.py", run)


if __name__ == "__main__":
    sys.exit(main())
