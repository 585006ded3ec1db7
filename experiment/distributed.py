"""The processes that train one cell together, as `torchrun --nproc-per-node K` starts them: its ranks.

    sys.exit(as_one(lambda: run(argv)))      # rank 0 alone speaks; all end with its exit code
    join(torch.device("cpu"))                # from here on the ranks can talk to each other
    folder = from_first(make_folder)         # what rank 0 made, or raised, on all of them
    agree(check)                             # each rank checks; what one raises, all raise
    losses = summed(losses)                  # of all ranks

Without torchrun there is one rank, and each function is what its name says of one: `summed` of a tensor is
the tensor. Small decisions travel over gloo, between CPUs, so that they do not wait for a GPU; sums and
gradients over NCCL where they lie on one. All ranks must call these functions equally often, in one order.

torchrun starts all ranks anew when one has died. What must outlive them is kept in torchrun's own store: the
folder they work in, and the exit code they ended with, if they ended in order.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from command_line import InputError
from data_pipeline import Batch

P = ParamSpec("P")
T = TypeVar("T")
FOLDER, EXIT_CODE = "attention comparison/folder", "attention comparison/exit code"
AS_LONG_AS_IT_TAKES = timedelta(days=7)  # torchrun ends who waits for a rank that died
IGNORED = -100  # the label that F.cross_entropy leaves out


def launched() -> bool:
    """Whether this process is one of torchrun's."""
    return dist.is_torchelastic_launched()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# Beginning and end


@functools.cache
def _store() -> Any:
    """torchrun's own store, which lives as long as torchrun does, through all restarts."""
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] != str(True):
        raise InputError("torchrun must share its store: unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*address, is_master=False)  # type: ignore[attr-defined]


def as_one(body: Callable[[], int]) -> int:
    """Run a script's body on every rank. Rank 0 alone speaks, all end with its exit code, and after it, since
    torchrun ends the others once one has ended badly. Ranks that are started anew after an end in order,
    whatever its exit code, do nothing: only one that died is a reason to go on."""
    if not launched():
        return body()
    first = os.environ["RANK"] == "0"
    if not _store().check([EXIT_CODE]):
        with contextlib.nullcontext() if first else _silence():
            try:
                code = body()
            except SystemExit as end:  # of the command line's parser
                if dist.is_initialized() or not isinstance(end.code, int):
                    raise
                code = end.code
        if first:
            _store().set(EXIT_CODE, str(code))
    _store().wait([EXIT_CODE], AS_LONG_AS_IT_TAKES)  # rank 0 may still be drawing figures
    code = int(_store().get(EXIT_CODE))
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        yield


def join(device: torch.device) -> None:
    """Meet the other ranks; on GPUs each takes the one with its number. InputError where that cannot be."""
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        return
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise InputError(f"with torchrun --device must be cpu, cuda or auto, got {device}")
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise InputError(f"torchrun started {here} processes here, where {gpus} GPUs are; one each")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A part of the store of its own: in the whole of it are the addresses of ranks that died.
    attempt = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", _store())
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=attempt, **ranks)


def earlier_folder() -> Path | None:
    """The folder that an earlier start of these ranks worked in."""
    return Path(_store().get(FOLDER).decode()) if launched() and _store().check([FOLDER]) else None


def remember_folder(folder: Path) -> None:
    if launched():
        _store().set(FOLDER, str(folder.absolute()))


# What is common to the ranks


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank."""
    if world_size() == 1:
        return flag
    found = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def agree(act: Callable[[], T]) -> T:
    """Do it on every rank; what one raises, all raise."""
    if world_size() == 1:
        return act()
    made: list[T] = []
    error: Exception | None = None
    try:
        made.append(act())
    except Exception as raised:
        error = raised
    if any_rank(error is not None):
        raise next(raised for raised in gathered([error]) if raised is not None)
    return made[0]


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, or raises, on every rank."""
    box: list[Any] = [agree(lambda: make() if rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def by_first(act: Callable[P, None]) -> Callable[P, None]:
    """A function that rank 0 alone carries out."""

    @functools.wraps(act)
    def instead(*args: P.args, **options: P.kwargs) -> None:
        if rank() == 0:
            act(*args, **options)

    return instead


def summed(tensor: Tensor) -> Tensor:
    """The sum over the ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(own: list[T]) -> list[T]:
    """The entries of all ranks, in the ranks' order."""
    if world_size() == 1:
        return own
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return list(itertools.chain(*found))


def joined(parts: list[Tensor]) -> Tensor:
    """The parts of all ranks, end to end, on the CPU."""
    return torch.cat(gathered([torch.cat(parts).cpu()] if parts else []))


# How the work is divided


def parallel(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The model, called so that gradients become the mean over the ranks; the model itself where there is one
    rank. Parameters that take no part in the loss are allowed."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=True)


def shard(batch: Batch) -> Batch:
    """This rank's share of a batch, every K-th example. Where it is empty, since each rank must take part in
    each step, an example that does not count: its label is the one that F.cross_entropy leaves out."""
    size = world_size()
    if size == 1:
        return batch
    if rank() < len(batch.labels):
        own = slice(rank(), None, size)
        return Batch(batch.tokens[own], batch.key_padding_mask[own], batch.labels[own], batch.index[own])
    unlabelled = torch.full_like(batch.labels[:1], IGNORED)
    return Batch(batch.tokens[:1], batch.key_padding_mask[:1], unlabelled, batch.index[:1])


def dealt(entries: Iterable[T]) -> Iterator[T | None]:
    """Every K-th entry, from the rank-th on; None where the last round has none left for this rank, so that
    all ranks see as many rounds."""
    rounds = iter(entries)
    while hand := list(itertools.islice(rounds, world_size())):
        yield hand[rank()] if rank() < len(hand) else None
