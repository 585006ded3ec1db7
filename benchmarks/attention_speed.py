"""Time and peak memory of each attention mechanism, as ratios to PyTorch's own softmax attention.

    python benchmarks/attention_speed.py
    python benchmarks/attention_speed.py --lengths 128 --batch-heads 128 --no-memory      # as in training
    python benchmarks/attention_speed.py --device cuda --dtype bfloat16 --lengths 1024 4096 16384

The anchor is `F.scaled_dot_product_attention` on the same shape (batch x heads, N, head dim), measured right
before each case. A case of T timescales does T times the anchor's work, but for what it skips or shares: its
ratio is also told per score matrix. "differences" is the straightforward gravity, with q_i - k_j as an
(N, N, head dim) tensor; it and the dense formulas are measured where they fit into --memory-limit.
On the CPU the multiply-adds of matrix products, which no exact attention can do without, are told as a
share of the processor's peak, measured in the same run (forward and backward: 7 products for a score
matrix of its own q and k, 4 + 3 T for T that share them); not where far keys are skipped.
Memory is what is held at most above inputs, outputs and gradients: by the allocator on CUDA, in the resident
set of a fresh process on the CPU. Writes .json, .png and .pdf, named by date, device and CPU threads.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: Python looks for modules in this folder only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from attention_engine.attention_scores import Clock, DotProduct, Gravity, Mask, Score
from attention_engine.native_build import library, unavailable
from attention_kernels import BACKENDS, attend
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
    InputError,
    Parser,
    add_settings,
    check_settings,
    choose,
    described,
    exit_code,
    given_settings,
    setting,
)
from experiment.run_plan import find_device
from reporting.figure_style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    figure_style,
    new_figure,
    save_figure,
)
from reporting.text_tables import NONE, TextTable, markdown_table, short
from training.device_memory import PeakMemory

SHORT_HORIZONS, DEFAULT_GAMMAS = (0.6, 0.9, 0.99), (0.9, 0.99, 0.999)
SOFTENING = 0.1  # the modules' default
ANCHOR, DIFFERENCES = "sdpa", "differences"
LINES: dict[str, Any] = {
    "native": "-",
    ANCHOR: (0, (1, 1)),
    "tiled": (0, (6, 2)),
    "triton": "-.",
    "dense": "--",
    DIFFERENCES: ":",
}


class Mechanism(NamedTuple):
    """What is measured. normalization: gravity's, or None for the dot product. gammas: one a timescale.
    adaptive: whether time passes by clocks."""

    color: str
    normalization: Any = None
    gammas: tuple[float, ...] = ()
    skip_far_keys: bool = True
    adaptive: bool = False

    @property
    def timescales(self) -> int:
        return max(1, len(self.gammas))

    @property
    def products(self) -> int:
        """Matrix products of a forward and a backward, each a multiply-add for each pair and head width."""
        return 7 * self.timescales if self.normalization is None else 4 + 3 * self.timescales


MECHANISMS = {
    "dot product": Mechanism(BLACK),
    "gravitational softmax": Mechanism(VERMILLION, "softmax"),
    "gravitational force": Mechanism(ORANGE, "force"),
    "multi-timescale, all keys": Mechanism(BLUE, gammas=DEFAULT_GAMMAS, skip_far_keys=False),
    "multi-timescale 0.6 0.9 0.99": Mechanism(SKY, gammas=SHORT_HORIZONS),
    "adaptive": Mechanism(PURPLE, adaptive=True),
    "combined softmax": Mechanism(GREEN, "softmax", DEFAULT_GAMMAS),
    "combined force": Mechanism("#66C2A5", "force", DEFAULT_GAMMAS),
}


@dataclass(frozen=True)
class SpeedSettings:
    """Benchmark"""

    lengths: tuple[int, ...] = setting((512, 1024, 2048, 4096, 8192), "sequence lengths N", minimum=1)
    batch_heads: int = setting(4, "batch x heads", minimum=1)
    head_dim: int = setting(32, "width of a head", minimum=1)
    repeats: int = setting(5, "measurements of each case, of which the median is taken", minimum=1)
    dtype: str = setting("float32", "of q, k and v", choices=("float32", "float64", "float16", "bfloat16"))
    device: str = setting("auto", "cpu, cuda or auto")
    threads: int | None = setting(None, "CPU threads of PyTorch", minimum=1)
    backends: tuple[str, ...] | None = setting(
        None, f"of {' '.join((*BACKENDS[1:], DIFFERENCES))}; not set: all that the device can run"
    )
    memory: bool = setting(True, "measure peak memory too")
    memory_limit: float = setting(4.0, "GB that a dense case may take to be measured", above=0)
    seed: int = setting(0, "of the random inputs", minimum=0)
    output_dir: str = setting("benchmarks/results", "folder of the results")

    def __post_init__(self) -> None:
        check_settings(self)
        for backend in self.backends or ():
            choose(backend, (*BACKENDS[1:], DIFFERENCES), "backend")
            if backend == "triton" and not self.on_cuda:
                raise InputError("--backends triton needs --device cuda")

    @property
    def on_cuda(self) -> bool:
        return find_device(self.device).type == "cuda"

    @property
    def measured_backends(self) -> tuple[str, ...]:
        names = (*BACKENDS[1:], DIFFERENCES)
        elsewhere = "native" if self.on_cuda else "triton"
        return self.backends or tuple(name for name in names if name != elsewhere)


class Case(NamedTuple):
    """One line of the table."""

    mechanism: str
    backend: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.mechanism}, {self.backend}"


def cases_of(length: int, settings: SpeedSettings) -> list[Case]:
    """What is measured at a length: every backend that has the mechanism and whose tensors fit."""
    found = []
    for mechanism in MECHANISMS:
        for backend in settings.measured_backends:
            if backend == DIFFERENCES and mechanism != "gravitational softmax":
                continue
            if backend == "native" and unavailable(settings.head_dim, 2):
                continue
            if backend == "triton" and MECHANISMS[mechanism].adaptive:  # it has no clocks
                continue
            case = Case(mechanism, backend, length)
            if backend != ANCHOR and bytes_needed(case, settings) <= settings.memory_limit * 1e9:
                found.append(case)
    return found


def bytes_needed(case: Case, settings: SpeedSettings) -> int:
    """About what a dense case holds at once in forward and backward; 0 for the others."""
    pairs = case.length**2 * settings.batch_heads * 4  # bytes of a float32 number for each
    if case.backend == DIFFERENCES:
        return 4 * settings.head_dim * pairs
    return 8 * MECHANISMS[case.mechanism].timescales * pairs if case.backend == "dense" else 0


def squared_differences(q: Tensor, k: Tensor) -> Tensor:
    """`|q_i - k_j|^2` (..., L, S) as the formula is written, from an (..., L, S, D) tensor."""
    return (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)


def make_attention(
    case: Case, settings: SpeedSettings, device: torch.device
) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The random inputs, all with gradients, and the function that attends: (1, T, batch x heads, N, D)."""
    generator = torch.Generator().manual_seed(settings.seed)
    heads, width, dtype = settings.batch_heads, settings.head_dim, getattr(torch, settings.dtype)

    def leaf(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return tensor.to(device, dtype).requires_grad_()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    if case.backend == ANCHOR:
        q, k, v = (leaf(drawn(heads, case.length, width), dtype) for _ in range(3))
        return [q, k, v], lambda: F.scaled_dot_product_attention(q, k, v)
    mechanism = MECHANISMS[case.mechanism]
    own = 1 if mechanism.normalization else mechanism.timescales  # gravity's timescales share q, k and v
    q, k, v = (leaf(drawn(own, heads, case.length, width), dtype) for _ in range(3))
    inputs, log_decay = [q, k, v], None
    if mechanism.gammas:
        log_decay = leaf(torch.tensor(mechanism.gammas).log()[:, None].expand(-1, heads).contiguous())
        inputs.append(log_decay)
    score: Score
    if mechanism.adaptive:
        time = leaf(F.softplus(drawn(1, heads, case.length) - 3).cumsum(-1))
        inputs.append(time)
        score = DotProduct(width**-0.5, clock=Clock(time, time))
    elif mechanism.normalization is None:
        score = DotProduct(width**-0.5, log_decay)
    else:
        shape = (mechanism.timescales, heads, case.length)
        key_mass, query_mass = (leaf(F.softplus(drawn(*shape))) for _ in range(2))
        gravity = leaf(torch.zeros(mechanism.timescales, heads))
        if mechanism.normalization == "force":
            score = Gravity(key_mass, None, None, SOFTENING, 2.0, "force", log_decay)
            inputs.append(key_mass)
        else:
            score = Gravity(key_mass, query_mass, gravity, SOFTENING, 2.0, "softmax", log_decay)
            inputs += [key_mass, query_mass, gravity]
            if case.backend == DIFFERENCES:
                return inputs, lambda: plain_gravity(q, k, v, key_mass, query_mass, gravity)
    skip, backend = mechanism.skip_far_keys, case.backend
    return inputs, lambda: attend(q, k, v, score, Mask(), backend=backend, skip_far_keys=skip)[0]


def plain_gravity(
    q: Tensor, k: Tensor, v: Tensor, key_mass: Tensor, query_mass: Tensor, log_gravity: Tensor
) -> Tensor:
    """Softmax gravity as its formula is written: masses (..., S) and (..., L), log_gravity (T, H)."""
    strength = (log_gravity.exp().unsqueeze(-1) * query_mass).unsqueeze(-1) * key_mass.unsqueeze(-2)
    force = strength / (squared_differences(q, k) / q.shape[-1] + SOFTENING)
    return force.softmax(-1).to(v.dtype) @ v


def make_step(case: Case, settings: SpeedSettings, device: torch.device) -> Callable[[], Seconds]:
    inputs, attention = make_attention(case, settings, device)

    def step() -> Seconds:
        for tensor in inputs:
            tensor.grad = None
        started = clock(device)
        output = attention()
        between = clock(device)
        output.backward(output.detach())
        ended = clock(device)
        return {"forward": between - started, "both": ended - started}

    return step


def peak_bytes(case: Case, settings: SpeedSettings, device_name: str) -> int | None:
    """The most that a forward and a backward hold above inputs, outputs and gradients."""
    device = chosen_device(device_name, settings.threads)
    make_step(case._replace(length=16), settings, device)()  # what libraries take once is not the case's
    inputs, attention = make_attention(case, settings, device)
    peak = PeakMemory(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak.read()
    output = attention()
    upstream = output.detach()
    output.backward(upstream)
    highest = peak.read()
    if highest is None or held is None:
        return None
    return highest - held - sum(x.nbytes for x in (*inputs, output))  # a gradient is as large as its input


def peak_operations(settings: SpeedSettings, device: torch.device) -> float | None:
    """Floating-point operations a second of multiply-adds alone, on all threads, the best of five tries; None
    on a GPU and where the compiled kernel, which does them, is not to be had."""
    if device.type != "cpu" or unavailable(settings.head_dim, 2):
        return None
    tries = []
    for _ in range(5):
        started = time.perf_counter()
        done = library(settings.head_dim, 2).multiply_adds(10_000_000, torch.get_num_threads())
        tries.append(done / (time.perf_counter() - started))
    return max(tries)


def measure(
    settings: SpeedSettings, device: torch.device, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """A row for each length and case, the anchor first. What is measured by then is kept after each."""
    rows, peaks = [], []
    for length in settings.lengths:
        anchor = Case("dot product", ANCHOR, length)
        cases = cases_of(length, settings)
        steps = {ANCHOR: make_step(anchor, settings, device)}
        steps |= {case.name: make_step(case, settings, device) for case in cases}
        peaks.append(peak_operations(settings, device))  # for each, since others may disturb one
        timed = take_turns(steps[ANCHOR], steps, settings.repeats)
        for case, times in zip((anchor, *cases), timed.values(), strict=True):
            row: dict[str, Any] = {**case._asdict(), **times, "score_matrices": 1}
            if case.backend != ANCHOR:
                row["score_matrices"] = MECHANISMS[case.mechanism].timescales
            pairs = settings.batch_heads * length**2
            mechanism = MECHANISMS[case.mechanism]
            operations = 2 * settings.head_dim * mechanism.products * pairs / times["both"]["seconds"]
            row["ns_a_pair"] = times["both"]["seconds"] / pairs * 1e9
            complete = not mechanism.gammas or not mechanism.skip_far_keys
            row["gflops"] = operations / 1e9 if complete else None
            if settings.memory:
                row["peak_bytes"] = peak_process(device)(peak_bytes, case, settings, str(device))
            row["share_of_peak"] = None
            rows.append(row)
            keep(rows)
            print(f"N = {length:,}: {case.name}: {times['both']['ratio']:.2f}", file=sys.stderr, flush=True)
    peak = max((peak for peak in peaks if peak), default=None)
    for row in rows:
        row["share_of_peak"] = 1e9 * row["gflops"] / peak if row["gflops"] and peak else None
    return rows


def table_of(rows: Sequence[dict[str, Any]], settings: SpeedSettings, device: torch.device) -> TextTable:
    header = ["case", "N", "ms", "forward", "forward + backward", "per score matrix"]
    header += ["ns a pair", "GFLOP/s", "of peak", "MB"]
    lines = []
    for row in rows:
        both, peak = row["both"], row.get("peak_bytes")
        ratios = [row["forward"]["ratio"], both["ratio"], both["ratio"] / row["score_matrices"]]
        gflops, share = row["gflops"], row["share_of_peak"]
        lines.append(
            [f"{row['mechanism']}, {row['backend']}", f"{row['length']:,}", short(1e3 * both["seconds"])]
            + [f"{ratio:.2f}" for ratio in ratios]
            + [f"{row['ns_a_pair']:.2f}", NONE if gflops is None else f"{gflops:.0f}"]
            + [NONE if share is None else f"{share:.0%}", NONE if peak is None else f"{peak / 1e6:.1f}"]
        )
    shape = f"batch x heads = {settings.batch_heads}, head dim = {settings.head_dim}, {settings.dtype}"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    note = f"{shape}, {device.type}{threads}, {settings.repeats} measurements; ratios are to sdpa"
    return TextTable("Attention, forward and backward", header, lines, note)


def slope(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of N that values grow with: least squares in logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def draw(
    ax: Axes, rows: Sequence[dict[str, Any]], quantity: Callable[[dict[str, Any]], float | None], label: str
) -> Axes:
    """A line for each case over N, both axes logarithmic, with its slope in the legend."""
    for mechanism, backend in dict.fromkeys((row["mechanism"], row["backend"]) for row in rows):
        own = [row for row in rows if (row["mechanism"], row["backend"]) == (mechanism, backend)]
        points = [(row["length"], quantity(row)) for row in own]
        known = [(length, value) for length, value in points if value is not None and value > 0]
        if not known:
            continue
        lengths, values = zip(*known, strict=True)
        color = MECHANISMS[mechanism].color if mechanism in MECHANISMS else BLACK
        name, style = f"{mechanism}, {backend}", LINES.get(backend, "-")
        if len(set(lengths)) > 1:
            name += f": N^{slope(lengths, values):.2f}"
        ax.plot(lengths, values, linestyle=style, color=color, marker="o", markersize=3, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sorted({row["length"] for row in rows}))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("sequence length N")
    ax.set_ylabel(label)
    ax.grid(True)
    return ax


def save_speed_figure(rows: Sequence[dict[str, Any]], stem: Path, settings: SpeedSettings) -> None:
    with figure_style():
        shares = any(row["share_of_peak"] for row in rows)
        columns = 1 + shares + settings.memory
        figure, axes = new_figure(1, columns, width=5.5 * columns, height=6)
        draw(axes[0, 0], rows, lambda row: row["both"]["seconds"], "forward + backward, seconds")
        if shares:
            fused = [row for row in rows if row["backend"] in ("native", ANCHOR)]
            ax = draw(axes[0, 1], fused, lambda row: row["share_of_peak"], "share of the processor's peak")
            ax.set_yscale("linear")
            ax.set_ylim(0, 1)
            ax.yaxis.set_major_formatter("{x:.0%}")
        if settings.memory:
            megabytes = "peak above inputs and outputs, MB"
            draw(axes[0, -1], rows, lambda row: (row["peak_bytes"] or 0) / 1e6, megabytes)
        for ax in axes.flat:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))
        save_figure(figure, stem.parent, stem.name, pdf=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(**described(__doc__))
    add_settings(parser, SpeedSettings)
    arguments = parser.parse_args(argv)

    def run() -> int:
        settings = replace(SpeedSettings(), **given_settings(arguments, SpeedSettings))
        device = chosen_device(settings.device, settings.threads)
        stem = results_stem(settings.output_dir, "attention_speed", device)
        keep = functools.partial(write_results, stem, device, asdict(settings))
        rows = measure(settings, device, keep)
        keep(rows)
        save_speed_figure(rows, stem, settings)
        print(markdown_table(table_of(rows, settings, device)))
        return EXIT_DONE

    return exit_code("attention_speed.py", run)


if __name__ == "__main__":
    sys.exit(main())
