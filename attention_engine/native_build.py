"""Builds native_attention.cpp with the user's own C++ compiler at its first use, and loads it.

    reason = unavailable(head_dim=32, distance_power=2)        # "" where it can be had; builds it, once
    library(head_dim=32, distance_power=2).attention(call, is_backward=False)

A library is for heads of up to a multiple of 16 numbers and for one distance power. It is kept in the cache
folder ($XDG_CACHE_HOME or ~/.cache, attention-comparison/native) under a hash of all that it is made from:
source, compiler, its version, flags, and the processor, since homes are shared by machines. Of processes that
start together one builds it. Where the folder cannot be used the library is built for the process alone.

In the environment: CXX, the compiler; ATTENTION_NATIVE=0, to do without.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock  # PyTorch needs it, too

SOURCE = Path(__file__).with_name("native_attention.cpp")
# Never -ffast-math, which breaks the rounding that exponentials rest on, nor what CXXFLAGS may hold.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
COMPILERS = ("c++", "g++", "clang++")
MACHINES = ("x86_64", "aarch64")
TIME_LIMIT = 120.0  # seconds that a compiler may take; a library takes 5 to 10


class UnavailableError(Exception):
    """The kernel cannot be had; the text says why."""


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "nthl")]


class Call(ctypes.Structure):
    """The struct of the same name in native_attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "shared", "causal", "offset", "batch", "timescales")),
        *((name, ctypes.c_int32) for name in ("heads", "queries", "keys", "head_dim", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softening")),
        *((name, View) for name in ("q", "k", "v")),
        *(
            (name, ctypes.c_void_p)
            for name in ("strength", "key_mass", "log_decay", "query_clock", "key_clock")
        ),
        *((name, ctypes.c_void_p) for name in ("padding", "pairs")),
        ("pair_strides", ctypes.c_int64 * 4),
        ("reach", ctypes.c_void_p),
        ("output", View),
        ("log_sum", ctypes.c_void_p),
        *((name, View) for name in ("upstream", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dstrength", "dmass", "drate", "dquery_clock", "dkey_clock")),
        ("workspace", ctypes.c_void_p),
    ]


class Extent(ctypes.Structure):
    """Of the distances of a call: see the struct of the same name."""

    _fields_ = [("largest", ctypes.c_float), ("closest", ctypes.c_float)]


class Library:
    """The functions of a library that is loaded."""

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()  # a fork of it has none of the threads that OpenMP knows
        self._parallel = ctypes.cast(_openmp().GOMP_parallel, ctypes.c_void_p)
        functions = ctypes.CDLL(str(path))
        self._bytes, self._attention = functions.workspace_bytes, functions.attention
        self._multiply_adds = functions.multiply_adds
        self._bytes.restype = self._multiply_adds.restype = ctypes.c_int64
        self._attention.restype = None

    def workspace_bytes(self, call: Call, is_backward: bool) -> int:
        return int(self._bytes(ctypes.byref(call), int(is_backward)))

    def attention(self, call: Call, is_backward: bool) -> Extent:
        extent = Extent()
        self._attention(ctypes.byref(call), int(is_backward), self._parallel, ctypes.byref(extent))
        return extent

    def multiply_adds(self, rounds: int, threads: int) -> int:
        """Does as many multiply-adds as the processor can. Returns how many floating-point operations."""
        return int(self._multiply_adds(ctypes.c_int64(rounds), threads, self._parallel))


def unavailable(head_dim: int, distance_power: int) -> str:
    """Why a library cannot be had, said on stderr the first time, or nothing."""
    found = _load(-(-head_dim // 16) * 16, distance_power)
    return found if isinstance(found, str) else ""


def library(head_dim: int, distance_power: int) -> Library:
    """RuntimeError where it cannot be had."""
    found = _load(-(-head_dim // 16) * 16, distance_power)
    if isinstance(found, str):
        raise RuntimeError(f"backend 'native' {found}")
    return found


_libraries: dict[tuple[int, int], Library | str] = {}
_loading = threading.Lock()


def _load(width: int, distance_power: int) -> Library | str:
    """A library, or why there is none."""
    wanted = width, distance_power
    found = _libraries.get(wanted)
    if found is None:
        with _loading:
            if wanted not in _libraries:
                _libraries[wanted] = _loaded(*wanted)
            found = _libraries[wanted]
    return found


def _loaded(width: int, distance_power: int) -> Library | str:
    try:
        if os.environ.get("ATTENTION_NATIVE") == "0":
            raise UnavailableError("is switched off by ATTENTION_NATIVE=0")
        if platform.system() != "Linux" or platform.machine() not in MACHINES:
            raise UnavailableError(
                f"is for Linux on {' and '.join(MACHINES)}, not {platform.platform(terse=True)}"
            )
        return _built(width, distance_power)
    except (UnavailableError, OSError) as error:
        reason = str(error) if isinstance(error, UnavailableError) else f"cannot be loaded ({error})"
        if reason not in _libraries.values():
            _say(f"backend 'native' {reason}: attention goes on without, slower")
        return reason


def _command(width: int, distance_power: int) -> list[str]:
    return [*_compiler(), *FLAGS, f"-DHEAD_DIM={width}", f"-DDISTANCE_POWER={distance_power}"]


def _library_name(width: int, distance_power: int) -> str:
    """Of the file in the cache: a hash of all that the library is made from."""
    command = "\0".join(_command(width, distance_power))
    made_from = [SOURCE.read_bytes(), _version().encode(), command.encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(made_from)).hexdigest() + ".so"


def _built(width: int, distance_power: int) -> Library:
    name, command = _library_name(width, distance_power), _command(width, distance_power)
    with _kept_in(name) as kept, contextlib.ExitStack() as stack:
        if kept is not None and kept.exists():
            with contextlib.suppress(OSError):  # a library that is damaged is built anew
                return Library(kept)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attention-")))
        _say(f"building the attention kernel for heads of {width}: some seconds, once")
        _compile([*command, str(SOURCE), "-o", name], folder)
        built = folder / name
        if kept is not None:
            temporary = kept.with_name(f"{name}.{os.getpid()}")
            try:
                shutil.copyfile(built, temporary)
                temporary.replace(kept)
                built = kept
            except OSError as error:
                temporary.unlink(missing_ok=True)
                _say(f"the attention kernel is for this process only: the cache cannot be used ({error})")
        return Library(built)


@contextlib.contextmanager
def _kept_in(name: str) -> Iterator[Path | None]:
    """Where a library is, or is to be, kept, while no other process builds it; None where that is nowhere."""
    with contextlib.ExitStack() as stack:
        kept = None
        try:
            folder = _cache_folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.geteuid() or folder.stat().st_mode & 0o022:
                raise PermissionError(0, "others can write into it")
            if not (folder / name).exists():
                stack.enter_context(filelock.FileLock(folder / f"{name}.lock", timeout=TIME_LIMIT))
            kept = folder / name
        except (OSError, RuntimeError, filelock.Timeout, NotImplementedError) as error:
            _say(f"the attention kernel is for this process only: the cache cannot be used ({error})")
        yield kept


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "attention-comparison" / "native"


@functools.cache
def _compiler() -> list[str]:
    """The command of the compiler."""
    given = shlex.split(os.environ.get("CXX", ""))
    for name in given[:1] or COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return [path, *given[1:]]
    where = f"CXX={given[0]}" if given else ", ".join(COMPILERS)
    raise UnavailableError(f"needs a C++ compiler, and there is none ({where})")


@functools.cache
def _version() -> str:
    return _output_of([*_compiler(), "--version"], Path.cwd(), 10.0)


def _processor() -> str:
    """The processor's name and abilities."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    wanted = re.compile(r"(vendor_id|model|model name|cpu family|stepping|flags|Features|CPU \w+)\s*:")
    return "\n".join(line for line in lines if wanted.match(line))


def _compile(command: list[str], folder: Path) -> None:
    messages = _output_of(command, folder, TIME_LIMIT)
    if not (folder / command[-1]).exists():
        raise UnavailableError(f"cannot be built: {command[0]} made nothing {messages[:200]!r}")


def _output_of(command: list[str], folder: Path, time_limit: float) -> str:
    """What a compiler says; UnavailableError where it fails or hangs."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            code = process.wait(time_limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise UnavailableError(
                f"cannot be built: {command[0]} took more than {time_limit:.0f} s"
            ) from None
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if code:
        told = next(
            (line for line in text.splitlines() if "error" in line.lower()), text[:200] or "no message"
        )
        raise UnavailableError(f"cannot be built: {command[0]} failed ({told.strip()[:200]})")
    return text


@functools.cache
def _openmp() -> Any:
    """The OpenMP runtime that PyTorch has loaded: one with GOMP_parallel."""
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(r"/lib(gomp|omp|iomp5)[^/]*\.so", path):
            runtime = ctypes.CDLL(path)
            if hasattr(runtime, "GOMP_parallel"):
                return runtime
    raise UnavailableError("needs the OpenMP runtime of PyTorch, and there is none")


def _say(text: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # a stream that is closed
            print(text, file=sys.stderr, flush=True)
