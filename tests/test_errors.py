"""Whose an error is: the user's and the surroundings' are one message, a bug alone shows a traceback."""

import errno
import os
import socket
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from videoalign import EverywhereError, VideoAlignError, cli, errors
from videoalign.cli import main
from videoalign.models.template import Template
from videoalign.models.yaml_text import check_yaml, read_config, too_large


def outcome(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, error: BaseException) -> tuple[int, str]:
    """Exit status and standard error of a command that raises this error."""

    def fail(args: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["shards", "info", "set"])
    return stop.value.code, capfd.readouterr().err


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


SYSTEM = [
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES,
    errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.EXDEV,
    errno.EBUSY, errno.ETXTBSY, errno.EFBIG, errno.ESTALE, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ECONNREFUSED,
    errno.ECONNRESET, errno.ETIMEDOUT,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENOMEM, errno.EAGAIN, errno.EINVAL, errno.ENODEV, errno.EPIPE,
]  # fmt: skip


@pytest.mark.parametrize("number", SYSTEM, ids=lambda n: errno.errorcode[n])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_what_the_operating_system_refuses_is_one_message(number, wrapped, monkeypatch, capfd):
    error: Exception = OSError(number, os.strerror(number), "some/where")
    error = chained(RuntimeError("a library wrapped it"), error) if wrapped else error
    status, err = outcome(monkeypatch, capfd, error)
    assert status == 2
    assert "Traceback" not in err
    assert err.count("videoalign: error:") == 1
    assert err.count("\n") == 1
    assert os.strerror(number) in err
    assert "some/where" in err


ENVIRONMENT = {
    "safetensors, disk full": (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "make room",
    ),
    "safetensors, read-only": (SafetensorError("I/O error: Read-only file system (os error 30)"), "can be written"),
    "torch.save, disk full": (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        "make room",
    ),
    "torch.save, short write": (
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        "make room",
    ),
    "too many files in torch": (
        RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
        "ulimit",
    ),
    "memory": (MemoryError(), "batch_size"),
    "memory of numpy": (MemoryError("Unable to allocate 7.45 GiB for an array"), "batch_size"),
    "memory of the CPU in torch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        "batch_size",
    ),
    "memory of the GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        "memory of the GPU",
    ),
    "GPU broken": (RuntimeError("CUDA error: an illegal memory access was encountered"), "GPU failed"),
    "pool worker killed": (BrokenProcessPool("A process in the process pool was terminated abruptly"), "fewer workers"),
    "loader worker killed": (RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. "), "fewer workers"),
    "loader worker gone": (RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"), "fewer workers"),
    "hub refuses": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "network"),
    "hub slow": (TimeoutError("The read operation timed out"), "network"),
    "no name server": (socket.gaierror(-3, "Temporary failure in name resolution"), "name resolution"),
    "peer lost": (
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4242"),
        "another process",
    ),
    "error of a loader's worker": (
        OSError(
            "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "  File \"x.py\", line 1, in f\nOSError: [Errno 5] Input/output error: 'v.mp4'\n"
        ),
        "v.mp4",
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_libraries_say_of_the_surroundings_is_one_message(name, monkeypatch, capfd):
    error, words = ENVIRONMENT[name]
    status, err = outcome(monkeypatch, capfd, error)
    assert status == 2 and "Traceback" not in err and err.count("videoalign: error:") == 1 and words in err, err


USERS = {
    "own": (VideoAlignError("data.x is 3; make it 2"), "data.x is 3; make it 2"),
    "own, on all ranks": (EverywhereError("data.x is 3"), "data.x is 3"),
    "own, wrapped": (chained(TypeError("parser"), VideoAlignError("data.x is 3")), "error: data.x is 3"),
    "own, of a loader's worker": (
        VideoAlignError(
            "Caught VideoAlignError in DataLoader worker process 0.\nOriginal Traceback (most recent "
            'call last):\n  File "x"\nvideoalign.VideoAlignError: clip 3 is short\n'
        ),
        "error: clip 3 is short",
    ),
    "Lightning's": (MisconfigurationException("No supported gpu backend found!"), "--trainer.accelerator cpu"),
}


@pytest.mark.parametrize("name", USERS)
def test_a_users_mistake_is_one_message(name, monkeypatch, capfd):
    error, words = USERS[name]
    status, err = outcome(monkeypatch, capfd, error)
    assert status == 2 and "Traceback" not in err and err.count("videoalign: error:") == 1 and words in err, err


@pytest.mark.parametrize(
    "error",
    [TypeError("no"), KeyError("x"), RuntimeError("shape [2, 3] is invalid"), ZeroDivisionError("division")],
    ids=repr,
)
def test_a_bug_alone_shows_a_traceback_and_asks_to_be_reported(error, monkeypatch, capfd):
    status, err = outcome(monkeypatch, capfd, error)
    assert status == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].endswith(f"{errors.REPORT}.")


FAULTY = """
import json

def scores(videos, prompts):
    {line}
"""


@pytest.mark.parametrize(
    "line, said",
    [
        ("return videos[7]", "IndexError: list index out of range"),
        ("json.loads('{')", "JSONDecodeError: Expecting property name"),
    ],
    ids=["its own", "a library's, called by it"],
)
def test_a_fault_of_added_code_is_not_called_ours(line, said, tmp_path, monkeypatch, capfd):
    file = tmp_path / "my_scores.py"
    file.write_text(FAULTY.format(line=line))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "_run", lambda args: __import__("my_scores").scores([], []))
    with pytest.raises(SystemExit) as stop:
        main(["compare"])
    err = capfd.readouterr().err
    del sys.modules["my_scores"]
    last = err.splitlines()[-1]
    assert stop.value.code == 1 and err.startswith("Traceback")
    assert said in last and f"(raised in scores, {file}, line 5, which is no code of videoalign)" in last
    assert errors.REPORT not in err


def test_a_fault_of_added_code_is_found_in_what_a_worker_process_says():
    """Its frames are text by then."""
    told = (
        "Caught IndexError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "{torch.__file__}", line 1, in fetch\n    x\n'
        '  File "/home/me/my_data.py", line 12, in read\n    x[3]\n'
        "IndexError: list index out of range"
    )
    found = errors.describe(IndexError(told))
    assert found.kind == errors.ADDED
    assert found.message.startswith("IndexError: list index out of range (raised in read, /home/me/my_data.py, line 12")


def test_an_installed_plug_in_is_added_code_and_what_it_calls_is_not(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    for name, call in (("wan_judge", "import wan_tools; wan_tools.halve(call)"), ("wan_tools", "return call / 2")):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"def halve(call):\n    {call}\n")
    (folder / "wan_judge.dist-info").mkdir()
    (folder / "wan_judge.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: wan-judge\nVersion: 1\n")
    (folder / "wan_judge.dist-info/entry_points.txt").write_text("[videoalign.judges]\nwan = wan_judge:halve\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(errors.site, "getsitepackages", lambda: [str(folder)])
    with pytest.raises(TypeError) as caught:
        __import__("wan_judge").halve("a")
    found = errors.describe(caught.value)
    assert found.kind == errors.ADDED and f"{folder}/wan_judge/__init__.py, line 2" in found.message


def test_our_code_called_by_added_code_is_ours_to_answer_for(tmp_path):
    code = compile("def train(call):\n    call()\n", tmp_path / "mine.py", "exec")
    mine: dict = {}
    exec(code, mine)
    with pytest.raises(TypeError) as caught:
        mine["train"](lambda: too_large())
    assert errors.describe(caught.value).kind == errors.BUG


def raised_while_handling(handled, line):
    """The error of a line within an `except`, as Python chains it."""
    with pytest.raises(Exception) as caught:
        try:
            raise handled
        except type(handled):
            exec(line)
    return caught.value


@pytest.mark.parametrize("handled", [FileNotFoundError(2, "No such file", "optional.json"), VideoAlignError("no clip")])
@pytest.mark.parametrize("line", ["defualt", "''.lower_case", "{}['key']", "[][0]"])
def test_an_error_that_was_handled_hides_no_fault(handled, line):
    found = errors.describe(raised_while_handling(handled, line))
    assert found.kind == errors.BUG and str(handled) not in found.message


def test_what_an_error_leaves_out_is_not_told():
    found = errors.describe(raised_while_handling(OSError(2, "No such file"), "raise ValueError('rate') from None"))
    assert found.kind == errors.BUG and "ValueError: rate" in found.message
    wrapped = raised_while_handling(OSError(28, "No space left"), "raise RuntimeError('not written')")
    assert errors.describe(wrapped).kind == errors.ENVIRONMENT, "what a library made of an error is that error"


def test_a_refusal_of_gloo_is_no_lost_peer():
    assert not errors.lost_peer(RuntimeError("Tensors of backend gloo must be dense"))


def test_debugging_shows_the_traceback_of_anything(monkeypatch, capfd):
    monkeypatch.setenv("VIDEOALIGN_DEBUG", "1")
    status, err = outcome(monkeypatch, capfd, VideoAlignError("data.x is 3"))
    assert status == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == "videoalign: error: data.x is 3"


def test_a_reader_that_left_ends_the_command_quietly(tmp_path):
    """`head -1` leaves like this; the folder's name is long enough to fill a pipe."""
    code = "from videoalign import cli; cli._run = lambda args: print('x' * 200_000); cli.main(['x'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""


def test_output_that_cannot_be_written_is_an_error():
    code = "from videoalign import cli; cli._run = lambda args: print('x'); cli.main(['x'])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


# --- YAML -----------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
BAD_YAML = {
    "billion laughs": (LAUGHS, r"line \d+: written out it holds more than"),
    "laughs by merging": (
        "a: &a {x: 1}\n"
        + "".join(f"b{i}: &b{i} [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 9)}]\n" for i in range(9)),
        "more than",
    ),
    "alias of itself": ("trainer: &t\n  logger: *t\n", r"line 2: \*t refers to a value that it is itself a part of"),
    "list in itself": ("a: &l [1, *l]\n", "itself a part of"),
    "alias of nothing": ("a: *nothing\n", "refers to nothing"),
    "key twice": ("trainer:\n  max_steps: 1\n  max_steps: 2\n", "line 3: the key 'max_steps' occurs twice"),
    "key twice in braces": ("trainer: {a: 1, b: 2, a: 3}\n", "'a' occurs twice"),
    "key twice at the top": ("a: 1\nb: 2\na: {c: 1}\n", "line 3: the key 'a' occurs twice"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested more than"),
    "many keys": ("".join(f"k{i}: {i}\n" for i in range(16_000)), "more than"),
    "nested interpolations": ("a: " + "${b." * 2000 + "}" * 2000, "interpolations"),
    "long interpolation": ("a: ${" + "b" * 100_000 + "}", "interpolations"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "not UTF-8"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "null bytes": (b"a: \x00\n", "is no YAML"),
    "empty": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "list": ("- 1\n- 2\n", "holds list"),
    "word": ("hello\n", "holds str"),
    "number": ("7\n", "holds int"),
    "open bracket": ("a: [1, 2\nb: }", "is no YAML"),
    "tab": ("a:\n\t- 1\n", "is no YAML"),
    "impossible date": ("a: 2024-13-45\n", "is no YAML"),
    "python object": ("a: !!python/object/apply:os.getcwd []\n", "is no YAML"),
    "long number": ("a: " + "1" * 200_000, "is no YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "is no YAML"),
    "larger than a configuration": ("a: " + "x" * 2**21, "larger than"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_configuration_is_looked_at_before_it_is_built(name, tmp_path):
    content, words = BAD_YAML[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(VideoAlignError, match=words) as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1}\nc: *x\nd: *x\n",
        "base: &b {x: 1}\nc: {<<: *b, y: 2}\n",
        "a: {x: 1}\nb: {x: 1}\n",
        "a: ${b.c}\nb: {c: 1}\n",
        "1: a\n'1': b\n",
        "a: &x 1\nb: &x 2\nc: *x\n",
        "not: [yaml",
    ],
)
def test_sound_yaml_passes(text):
    check_yaml(text, "here")


@pytest.mark.parametrize(
    "value, key", [({"a": {"b": [1, 2**63]}}, "a.b.1"), ({"a": -(2**63) - 1}, "a"), ({"a": 2**63 - 1}, None)]
)
def test_numbers_beyond_64_bits_are_found(value, key):
    assert too_large(value) == key


def test_a_template_that_no_step_would_finish_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("<video> <prompt> <reward:VQ,MQ,TA>" + "a" * 200_000)
    with pytest.raises(VideoAlignError, match="more than"):
        Template.load(tmp_path / "t.txt")


def test_a_chain_of_errors_that_bites_its_tail_ends():
    a, b = RuntimeError("a"), RuntimeError("b")
    a.__cause__, b.__cause__ = b, a
    assert errors.describe(a).kind == errors.BUG
