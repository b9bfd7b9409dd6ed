"""The command line's message for an error: one text that says whether the user, the environment or a bug is the cause.

There are four classes. An error is the *user's* if it is a :class:`~videoalign.VideoAlignError`, or if a library
raises it while a configuration is read, its objects are built, or a checkpoint is loaded. It is the *environment's* if
a disk, memory, a device or a network failed. It is one of *added code* if a class or function that a configuration
names, and that is neither ours nor a library's, raised it. Every other error is a *bug*. The last two show a traceback.
Errors are classified by kind, not listed: any OSError in the chain of causes is the environment's, and so is an error
of a library whose text contains the words of an errno.

No library is imported here: a library that is not loaded yet has raised nothing, and imports take seconds.
"""

import errno
import os
import re
import site
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import VideoAlignError

USER, ENVIRONMENT, ADDED, BUG = "user", "environment", "added code", "bug"
REPORT = "This is a fault of videoalign: please report it with the text above"

READING = ("parse_args", "parse_object", "_parse_common", "instantiate_classes", "instantiate_trainer", "_set_seed")
"""Functions inside which any error is due to the configuration."""
OPTIMIZING = ("configure_optimizers", "_init_optimizers_and_lr_schedulers")
TRAINER = ("_verify_loop_configurations", "_verify_dataloader_idx_requirement", "setup_data")
RESUMING = ("resume_start", "restore_training_state", "restore_model", "restore_datamodule", "restore_callbacks",
            "restore_loops", "restore_optimizers_and_schedulers", "_restore_modules_and_callbacks")  # fmt: skip
GENERIC = {errno.EINVAL, errno.EDOM, errno.ERANGE, errno.ENOENT, errno.EEXIST, errno.EPERM}
"""Numbers whose words also occur in messages that have nothing to do with the operating system."""
_WORDS = re.compile(
    "|".join(re.escape(os.strerror(number)) for number in sorted({*errno.errorcode} - GENERIC)) + r"|os error \d+", re.I
)
_WRITING = re.compile(
    r"PytorchStreamWriter|inline_container\.cc.*unexpected pos|file write failed|database or disk is full", re.S
)
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc|Unable to allocate", re.I)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?[\d, ]+\)")
_NETWORK = re.compile(r"timed? ?out|connection|connect(ing)? to|resolve|unreachable|offline", re.I)
_PEER = re.compile(
    r"Connection (closed|reset) by (peer|remote peer)|Broken pipe|Connection (refused|reset)|remote process exited|"
    r"NCCL (error|operation)|ncclRemoteError|Socket Timeout|Read timeout|Timed out waiting|store.*(timeout|failed)|"
    r"recvValue|gloo/transport",
    re.I,
)
_WRAPPED = re.compile(r"Caught (?P<name>\w+) in .*? process \d+\.\nOriginal Traceback", re.S)
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (\S+)$', re.M)
_FAULTY = (NameError, AttributeError, LookupError, AssertionError, ZeroDivisionError)
"""Errors that a faulty line raises by itself."""
_HINTS = {
    errno.ENOSPC: "make room, and call it again",
    errno.EDQUOT: "make room, and call it again",
    errno.EROFS: "name a place that can be written",
    errno.EMFILE: "raise the limit (ulimit -n), or use fewer workers",
    errno.ENFILE: "close other programs, or use fewer workers",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EADDRINUSE: "another program listens there: name another port, or end that program",
    errno.ENOMEM: "use smaller batches or fewer workers",
    errno.EIO: "the disk or its connection may be failing",
    errno.ESTALE: "the network file system has lost it: call it again",
}


@dataclass(frozen=True)
class Found:
    """The class of an error and the message for it.

    Attributes:
        kind: One of :data:`USER`, :data:`ENVIRONMENT`, :data:`ADDED` and :data:`BUG`.
        message: Text that the command line prints.
        status: Exit status of the command.
    """

    kind: str
    message: str
    status: int = 2


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that led to it, the latest first.

    What was being handled when a faulty line raised led to nothing: a file that may be missing, say, in whose `except`
    a name is misspelt. Nor did what `raise ... from None` leaves out.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        handled = None if current.__suppress_context__ or isinstance(current, _FAULTY) else current.__context__
        current = current.__cause__ or handled


def named(error: BaseException, *names: str) -> bool:
    """Whether the class of an error, or a class that it derives from, has one of these names."""
    return any(base.__name__ in names for base in type(error).__mro__)


def sentence(error: BaseException) -> str:
    """The first line of an error's text; for an error that a worker process passed on, the worker's own words."""
    text = str(error).strip()
    if wrapped := _WRAPPED.match(text):
        text = re.split(rf"\n(?:[\w.]+\.)?{wrapped['name']}: ", text)[-1]
        ours = ("VideoAlignError", "ShardError", "StoreError")
        return text.strip() if wrapped["name"].endswith(ours) else _first(text)
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    return _first(text) or type(error).__name__


def _first(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 400 else line[:400] + " ..."


def describe(error: BaseException) -> Found:
    """Classify an error and write the message for it."""
    every = list(chain(error))
    for one in every:
        if isinstance(one, VideoAlignError):
            return Found(USER, sentence(one) if _WRAPPED.match(str(one)) else str(one))
    if message := _environment(every):
        return Found(ENVIRONMENT, message)
    if message := _users(error, every):
        return Found(USER, message)
    return _of_code(error)


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process of a distributed run has ended."""
    return any(
        named(one, "DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
        or (type(one) is RuntimeError and _PEER.search(str(one)))
        for one in chain(error)
    )


# --- code -------------------------------------------------------------------------------------------------------------


def _of_code(error: BaseException) -> Found:
    """Whose code raised an error: the innermost that is no library's."""
    text = f"{type(error).__name__}: {sentence(error)}"
    found = [(one.filename, one.lineno, one.name) for one in traceback.extract_tb(error.__traceback__)]
    found += _FRAME.findall(str(error)) if _WRAPPED.match(str(error)) else []
    owners = _owners()
    for file, line, name in reversed(found):
        path = Path(file).resolve()
        roots = [root for root in owners if path.is_relative_to(root)]
        owner = owners[max(roots, key=lambda root: len(root.parts))] if roots else ADDED
        if owner == ADDED and not file.startswith("<"):
            return Found(ADDED, f"{text} (raised in {name}, {file}, line {line}, which is no code of videoalign)", 1)
        if owner == BUG:
            break
    return Found(BUG, f"{text}. {REPORT}.", 1)


def _owners() -> dict[Path, str]:
    """Whose fault the code of a folder is; of a library, by itself, nobody's."""
    from importlib.metadata import entry_points  # 20 ms, which no command without a fault has to spend

    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [Path(one).resolve() for one in (*paths, *site.getsitepackages(), site.getusersitepackages())]
    groups = [group for group in entry_points().groups if group.startswith("videoalign.")]
    plugins = {point.module.partition(".")[0] for group in groups for point in entry_points(group=group)}
    added = {folder / name: ADDED for folder in folders for name in plugins}
    return {**dict.fromkeys(folders, ""), **added, Path(__file__).resolve().parent: BUG}


# --- environment ------------------------------------------------------------------------------------------------------


def _environment(every: list[BaseException]) -> str | None:
    for one in every:
        text = str(one)
        if (
            isinstance(one, MemoryError)
            or named(one, "OutOfMemoryError")
            or (isinstance(one, RuntimeError) and _MEMORY.search(text))
        ):
            where = "the GPU" if "CUDA" in text or "HIP" in text else "this machine"
            return (
                f"the memory of {where} does not suffice ({sentence(one)}); lower batch_size (and accumulate more "
                "batches), the number of workers, the frames or the pixels of a video, or train adapters and "
                "checkpoint activations"
            )
        if named(one, "BrokenProcessPool") or _WORKER.search(text):
            return (
                f"a worker process was ended from outside ({sentence(one)}): mostly memory ran out. Use fewer workers "
                "or smaller batches; in a container also raise its shared memory (--shm-size)"
            )
        if isinstance(one, OSError):
            return _of_system(one)
        if named(one, "HTTPError", "TransportError", "RequestException", "HfHubHTTPError", "OfflineModeIsEnabled"):
            return f"{sentence(one)}; look whether the network and the server can be reached, or name a local folder"
        if named(one, "OperationalError") and ("sqlite" in repr(type(one)).lower() or "sqlite3" in text):
            return f"the database cannot be used: {sentence(one)}"
        if named(one, "AcceleratorError") or (isinstance(one, RuntimeError) and text.startswith("CUDA error")):
            return f"the GPU failed: {sentence(one)}"
        foreign = isinstance(one, RuntimeError) or named(one, "SafetensorError", "FFmpegError", "ArrowException")
        if foreign and _WRITING.search(text):
            why = f"a file could not be written whole ({sentence(one)}): the disk is full or failing"
            return f"{why}; make room, and call it again"
        if foreign and _WORDS.search(text) and not _PEER.search(text):
            return _with_hint(sentence(one), next((n for n in _HINTS if os.strerror(n).lower() in text.lower()), None))
    if lost_peer(every[0]):
        return (
            f"the connection to another process of this run was lost ({sentence(every[0])}): it was ended from outside "
            "(memory?), or its machine or the network failed; training goes on from the newest checkpoint with "
            "--ckpt_path"
        )
    return None


def _of_system(error: OSError) -> str:
    """The words of an OSError and a remedy."""
    text = sentence(error)
    if isinstance(error, ConnectionError | TimeoutError) or _NETWORK.search(type(error).__name__):
        text += "; look whether the network and the server can be reached, or name a local folder"
    return _with_hint(text, error.errno)


def _with_hint(text: str, number: int | None) -> str:
    hint = _HINTS.get(number or 0)
    return f"{text}; {hint}" if hint else text


# --- the user's -------------------------------------------------------------------------------------------------------


def _users(error: BaseException, every: list[BaseException]) -> str | None:
    for one in every:
        if named(one, "MisconfigurationException"):
            hint = (
                " Compute on the CPU: --trainer.accelerator cpu (fit and the like), --device cpu (score, bench)."
                if "backend" in str(one)
                else ""
            )
            return " ".join(str(one).split()) + hint
    frames = [frame for one in every for frame, _ in traceback.walk_tb(one.__traceback__)]
    names = [frame.f_code.co_name for frame in frames]
    if "_parse_ckpt_path" in names:
        return f"ckpt_path: {sentence(error)}"
    if any(name in RESUMING for name in names):
        places = (
            f.f_locals.get("checkpoint_path") or getattr(f.f_locals.get("self"), "_ckpt_path", "") for f in frames
        )
        return unusable_checkpoint(next(filter(None, map(str, places)), ""), _unfit(every))
    if any(name in OPTIMIZING for name in names):
        return f"model.init_args.optimizer (or a schedule) has a value that does not work: {sentence(error)}"
    if "_set_seed" in names:
        return f"seed_everything: {sentence(error)}"
    if any(name in TRAINER for name in names) or "instantiate_trainer" in names:
        return f"trainer: {sentence(error)}"
    if any(name in READING for name in names):
        key = next(
            (
                f.f_locals[n]
                for f in reversed(frames)
                for n in ("key", "dest")
                if f.f_code.co_name == "instantiate_classes" and isinstance(f.f_locals.get(n), str)
            ),
            "",
        )
        return f"{key}: {sentence(error)}" if key else sentence(error)
    return None


# --- checkpoints ------------------------------------------------------------------------------------------------------


def unusable_checkpoint(path: object, why: str) -> str:
    """The message for a checkpoint that cannot be used, wherever that is noticed.

    Args:
        path: File or folder of the checkpoint, as the user named it.
        why: Clause that begins with the subject "it", such as :func:`damaged` gives.
    """
    return f"checkpoint {path} cannot be used: {why}. Name another checkpoint of the run, or train anew without one"


def damaged(reason: str) -> str:
    """The clause for a checkpoint that cannot be read.

    Args:
        reason: What the reader found, without a full stop.
    """
    return f"it is damaged, or no checkpoint of `videoalign fit` ({reason})"


def _unfit(every: list[BaseException]) -> str:
    """Why a checkpoint does not fit the run. Torch's advice stays out: weights_only=False would run foreign code."""
    text = " ".join(str(one) for one in every)
    foreign = ("Unsupported global", "Unsupported class", "Unsupported operand", "WeightsUnpickler")
    if any(words in text for words in foreign):
        return damaged("it holds more than tensors and plain values, and nothing of it was run")
    if any(words in text for words in ("state_dict", "size mismatch", "parameter group", "param_groups")):
        return "it is of another model or other settings: what it holds does not fit this configuration"
    if isinstance(every[0], KeyError) or "missing" in text:
        return "it holds no training state, so it is no checkpoint of `videoalign fit`"
    return damaged(_first(str(every[0])).partition(". ")[0] or type(every[0]).__name__)
