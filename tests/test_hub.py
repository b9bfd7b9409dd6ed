"""Addresses on the hub: what is fetched, what is read from the cache, and why something is refused."""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_kit import READER, TOKEN, apart, environment, forget, point_at
from videoalign import VideoAlignError
from videoalign.models.hub import address_of, at_commit, commit_of, commits_of, folders_of, resolved

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 50_000,
    "sub/a.txt": b"a",
    "sub/deep/b.txt": b"b",
    "x.bin": b"x",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(*args, **kwargs) -> str:
    with pytest.raises(VideoAlignError) as error:
        resolved(*args, **kwargs)
    return str(error.value)


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, want",
    [
        ("ORG/NAME", ("model", "ORG/NAME", None, "")),
        ("ORG/NAME@v1.0", ("model", "ORG/NAME", "v1.0", "")),
        ("ORG/NAME@refs/pr/3", ("model", "ORG/NAME", "refs/pr/3", "")),
        ("hf://ORG/NAME", ("model", "ORG/NAME", None, "")),
        ("hf://ORG/NAME@v1/sub/deep/", ("model", "ORG/NAME", "v1", "sub/deep")),
        ("hf://datasets/ORG/NAME@main/a b.csv", ("dataset", "ORG/NAME", "main", "a b.csv")),
        (Path("hf://datasets/ORG/NAME/sub"), ("dataset", "ORG/NAME", None, "sub")),
    ],
)
def test_addresses_are_understood(place, want, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = address_of(place)
    assert (found.kind, found.id, found.revision, found.path) == want


@pytest.mark.parametrize(
    "place", ["none", "./ORG/NAME", "/ORG/NAME", "~/NAME", "../NAME", "runs/a/b", "a b/c", "-/..", "s3://bucket/x"]
)
def test_what_looks_local_is_never_asked_of_the_hub(place, reached):
    assert address_of(place) is None
    assert refused(place, "folder of a reward model") == f"{place}: there is no such folder of a reward model"
    assert reached.log == []


@pytest.mark.parametrize(
    "place, why",
    [
        ("hf://NAME", "namespace/name"),
        ("hf://", "Empty"),
        ("hf://dataset/ORG/NAME", "plural"),
        ("hf://ORG/NAME@", "revision"),
        ("hf://spaces/ORG/NAME", "space"),
        ("hf://buckets/ORG/NAME", "bucket"),
    ],
)
def test_what_is_no_address_is_refused(place, why):
    assert why in refused(place)


def test_a_folder_of_that_name_wins(reached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ORG/NAME").mkdir(parents=True)
    reached.add("ORG/NAME", FILES)
    assert resolved("ORG/NAME") == Path("ORG/NAME") and reached.log == [] and commit_of("ORG/NAME") is None
    (tmp_path / "ORG/file").write_text("x")
    assert resolved("ORG/file", file=True) == Path("ORG/file")
    assert "no such folder" in refused("ORG/file")


# --- fetching -------------------------------------------------------------------------------------------------------


def test_the_whole_is_fetched_once(reached, capfd):
    commit = reached.add("ORG/NAME", FILES)
    folder = resolved("ORG/NAME")
    assert contents(folder) == FILES and commit_of("ORG/NAME") == commit
    assert "fetching ORG/NAME: 5 files" in capfd.readouterr().err
    asked = len(reached.log)
    assert resolved("hf://models/ORG/NAME") == folder and len(reached.log) == asked  # the same process, the same commit
    forget()
    assert resolved("ORG/NAME") == folder and len(reached.log) == asked + 1  # a new one looks whether it moved
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "parts, want",
    [
        (["*.json"], {"config.json"}),
        (["*.txt"], set()),
        (["sub/*.txt"], {"sub/a.txt"}),
        (["sub/"], {"sub/a.txt", "sub/deep/b.txt"}),
        (["config.json", "*.safetensors"], {"config.json", "model.safetensors"}),
        ([], set()),
        (None, set(FILES)),
    ],
)
def test_only_what_is_needed_is_fetched(parts, want, reached):
    reached.add("ORG/NAME", FILES)
    assert set(contents(resolved("ORG/NAME", parts=parts))) == want
    looked_at = {line.split("/resolve/")[1].partition("/")[2] for line in reached.asked("HEAD")}
    assert looked_at == want  # one request for each file, no other
    assert folders_of("ORG/NAME") == ["sub"]


def test_an_index_is_fetched_before_what_it_lists(reached):
    reached.add("ORG/NAME", FILES)
    folder = resolved("ORG/NAME", parts=["*.json", "*.safetensors"], now=["config.json"])
    assert set(contents(folder)) == {"config.json"}
    assert set(contents(resolved("ORG/NAME", parts=["*.json", "*.safetensors"]))) == {
        "config.json",
        "model.safetensors",
    }


def test_a_folder_or_file_inside(reached):
    reached.add("ORG/NAME", FILES | {"odd [1]*.txt": b"odd"}, "dataset")
    assert contents(resolved("hf://datasets/ORG/NAME/sub")) == {"a.txt": b"a", "deep/b.txt": b"b"}
    assert contents(resolved("hf://datasets/ORG/NAME/sub", parts=["*.txt"])).keys() >= {"a.txt"}
    assert resolved("hf://datasets/ORG/NAME/odd [1]*.txt", parts=["*.json"]).read_bytes() == b"odd"
    for absent in ("none", "su", "sub/a.txt/x"):
        assert f"has no {absent} at revision main" in refused(f"hf://datasets/ORG/NAME/{absent}")


def test_revisions_are_pinned(reached):
    first = reached.add("ORG/NAME", {"config.json": b"1"})
    reached.repos["model", "ORG/NAME"].branches["v1"] = first
    second = reached.add("ORG/NAME", {"config.json": b"2"})

    def read(place):
        return (resolved(place) / "config.json").read_bytes()

    assert [read(p) for p in ("ORG/NAME", "ORG/NAME@v1", f"ORG/NAME@{first}")] == [b"2", b"1", b"1"]
    assert commits_of(model="ORG/NAME", lora="ORG/NAME@v1", other=None, here="runs") == {
        "model_revision": second,
        "lora_revision": first,
    }
    reached.add("ORG/NAME", {"config.json": b"3"})
    assert read("ORG/NAME") == b"2"  # all of a process reads one commit
    forget()
    assert read("ORG/NAME") == b"3" and read(at_commit("ORG/NAME", first)) == b"1"
    assert at_commit("runs", first) == "runs" and at_commit("ORG/NAME", None) == "ORG/NAME"
    reached.log.clear()
    forget()
    assert read(f"ORG/NAME@{first}") == b"1" and reached.log == []  # a commit never changes: nobody is asked
    assert "has no revision v9" in refused("ORG/NAME@v9")


def test_downloads_are_resumed(reached):
    piece = 10 * 2**20  # what the client writes at once
    reached.add("ORG/NAME", {"model.safetensors": os.urandom(2 * piece + 5)})
    with reached.faults(cut=piece + 70_000, cuts=1):
        folder = resolved("ORG/NAME")
    assert contents(folder) == reached.files("ORG/NAME")
    assert reached.ranges == [f"bytes={piece}-"]


def test_a_download_that_breaks_off_goes_on_with_the_next_call(reached, monkeypatch):
    reached.add("ORG/NAME", {"a.json": b"{}", "model.safetensors": os.urandom(200_000)})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with reached.faults(cut=1000, cuts=10**6):
        said = refused("ORG/NAME", parts=["*.json", "*.safetensors"])
    assert "the download broke off" in said and "goes on" in said
    forget()
    reached.log.clear()
    assert contents(resolved("ORG/NAME")) == reached.files("ORG/NAME")
    assert not [line for line in reached.asked("a.json") if line.startswith("GET")]  # it had arrived whole


def test_a_full_disk_is_said(reached, monkeypatch):
    reached.add("ORG/NAME", {"model.safetensors": os.urandom(3_000_000)})
    from huggingface_hub import file_download

    def full(*args, **kwargs):
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 1_000_000)

    monkeypatch.setattr(file_download, "http_get", full)
    said = refused("ORG/NAME")
    assert "No space left on device" in said and "make room, or let HF_HOME" in said


# --- without a network ----------------------------------------------------------------------------------------------


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def command_in(said: str) -> list[str]:
    return shlex.split(said.partition("type: ")[2].partition(" (and copy")[0])


def test_a_hub_that_does_not_answer_is_not_asked_again(reached, tmp_path, monkeypatch, capfd):
    reached.add("ORG/NAME", FILES)
    folder = resolved("ORG/NAME", parts=["config.json"])
    forget()
    point_at(closed_port(), tmp_path / "home", monkeypatch)
    capfd.readouterr()
    begun = time.monotonic()
    assert resolved("ORG/NAME", parts=["config.json"]) == folder
    assert resolved("ORG/NAME", parts=["config.json"]) == folder
    said = refused("ORG/NAME", parts=["*.json", "*.safetensors"])
    other = refused("ORG/OTHER", "folder of a reward model")
    assert time.monotonic() - begun < 3
    note = capfd.readouterr().err
    assert note.count("is read from the cache as it is") == 1 and "cannot be reached" in note
    assert command_in(said) == shlex.split(
        "hf download ORG/NAME --revision main --include '*.json' --include '*.safetensors'"
    )
    assert other.startswith("ORG/OTHER: there is no such folder of a reward model on this machine, and the cache")
    assert command_in(other) == shlex.split("hf download ORG/OTHER --revision main")


def test_the_command_that_is_printed_fetches_what_was_missing(hub, tmp_path):
    hub.add("ORG/NAME", FILES, "dataset", "v1")
    place = "hf://datasets/ORG/NAME@v1/sub"
    code = f"from videoalign.models.hub import resolved; print(resolved({place!r}, parts=['*.txt', 'deep/']))"
    offline = environment(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    begun = time.monotonic()
    said = apart(code, offline).stderr
    assert time.monotonic() - begun < 8 and "HF_HUB_OFFLINE is set" in said and hub.log == []
    words = command_in(said.strip().splitlines()[-1])
    assert words[:7] == ["hf", "download", "ORG/NAME", "--revision", "v1", "--repo-type", "dataset"]
    client = Path(sys.executable).with_name("hf")
    subprocess.run([client, *words[1:]], env=environment(hub, tmp_path / "home"), check=True, capture_output=True)
    found = apart(code, offline)
    assert contents(Path(found.stdout.strip())) == {"a.txt": b"a", "deep/b.txt": b"b"} and found.stderr == ""


def test_a_slow_hub_is_waited_for_only_so_long(reached, monkeypatch):
    from huggingface_hub import constants

    reached.add("ORG/NAME", FILES)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    begun = time.monotonic()
    with reached.faults(delay=5.0):
        said = refused("ORG/NAME")
    assert time.monotonic() - begun < 2 and "gave no answer within 1 seconds" in said
    forget()
    with reached.faults(delay=0.1):
        assert contents(resolved("ORG/NAME")) == FILES


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_leaves_the_cache(status, reached, capfd):
    reached.add("ORG/NAME", FILES)
    with reached.faults(status=status):
        assert f"answers {status}" in refused("ORG/NAME") and len(reached.log) == 1
    forget()
    folder = resolved("ORG/NAME")
    forget()
    capfd.readouterr()
    with reached.faults(status=status):
        assert resolved("ORG/NAME") == folder
    assert f"answers {status}" in capfd.readouterr().err


def test_a_cache_that_another_program_filled_is_read(reached, tmp_path, monkeypatch):
    from huggingface_hub import hf_hub_download

    reached.add("ORG/NAME", FILES)
    hf_hub_download("ORG/NAME", "config.json")
    assert set(contents(resolved("ORG/NAME", parts=["*.json", "sub/*.txt"]))) == {"config.json", "sub/a.txt"}
    forget()
    point_at(reached.url, tmp_path / "again", monkeypatch)
    hf_hub_download("ORG/NAME", "config.json")
    point_at(closed_port(), tmp_path / "again", monkeypatch)
    assert set(contents(resolved("ORG/NAME", parts=["*.json"]))) == {"config.json"}
    assert "--include '*.safetensors'" in refused("ORG/NAME", parts=["*.safetensors"])


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_is_not_there_or_not_for_everyone(reached, monkeypatch):
    reached.add("ORG/PRIVATE", FILES)
    reached.repos["model", "ORG/PRIVATE"].private = True
    reached.add("ORG/GATED", FILES)
    reached.repos["model", "ORG/GATED"].gated = True
    for name in ("ORG/NONE", "ORG/PRIVATE"):
        said = refused(name, "folder of a generator")
        assert "there is no such folder of a generator on this machine, and the hub has no model" in said
        assert "hf auth login" in said
    assert "accept them at" in refused("ORG/GATED") and "/ORG/GATED" in refused("ORG/GATED")
    monkeypatch.setenv("HF_TOKEN", "hf_Wrong")
    said = refused("hf://ORG/PRIVATE")
    assert "hf auth login" in said and "hf_Wrong" not in said
    monkeypatch.setenv("HF_TOKEN", READER)
    assert contents(resolved("ORG/PRIVATE")) == FILES
    with reached.faults(status=403):
        forget()
        assert "may not read" in refused("ORG/PRIVATE@v2")


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    hub.add("ORG/NAME", {"model.safetensors": os.urandom(3_000_000)})

    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "from videoalign.models.hub import resolved; resolved('ORG/NAME')"
    )
    said = apart(code, environment(hub, tmp_path / "home", HF_TOKEN=TOKEN))
    assert f"the cache {tmp_path / 'home' / 'hub'} cannot be written (File too large)" in said.stderr
    assert TOKEN not in said.stderr + said.stdout
