"""Users' mistakes: one message that says what is wrong, an exit status, and nothing half-written."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from helpers import plain_clip, tree
from videoalign.cli import main
from videoalign.datamodules.shards import ShardWriter
from videoalign.models import VideoReward
from videoalign.models.frame_sampling import FrameSampling

HEADER = "path_A,path_B,prompt,VQ,MQ,TA,MOS_A_VQ"
ROWS = ["a.mp4,b.mp4,a red circle,A,B,same,3", "b.mp4,c.mp4,a blue square,B,,invalid,"]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, backbone: Path, sampling: FrameSampling) -> Path:
    """Sound inputs of every kind: clips, sets, a reward model and its backbone."""
    folder = tmp_path_factory.mktemp("kit")
    (folder / "videos").mkdir()
    for i, name in enumerate("abc"):
        (folder / "videos" / f"{name}.mp4").write_bytes(plain_clip(40 * i + 40))
    labels = {"VQ": "A", "MQ": "B", "TA": "same"}
    with ShardWriter(folder / "pairs", "pairs") as writer:
        for i in range(6):
            writer.write(
                f"{i}",
                {"a": plain_clip(40 + i), "b": plain_clip(90 + i)},
                {"prompt": f"a red circle {i}", "labels": labels},
            )
    with ShardWriter(folder / "bench", "videos") as writer:
        for i in range(3):
            writer.write(f"{i}", {"": plain_clip(40 + i)}, {"prompt": "a red circle"})
        writer.write_table(
            "pairs.csv", [{"key_A": "0", "key_B": "1", **labels}, {"key_A": "1", "key_B": "2", **labels}]
        )
    with ShardWriter(folder / "clips", "videos") as writer:
        writer.write("0", {"": plain_clip(40)}, {"prompt": "a red circle"})
    torch.manual_seed(0)
    VideoReward(backbone, template="plain", sampling=sampling, language="full").save_pretrained(folder / "model")
    shutil.copytree(backbone, folder / "backbone")
    return folder


@dataclass
class Place:
    """Where a case happens.

    Attributes:
        tmp: Current folder. Everything that is in it after the preparation must stay as it is.
        kit: Folder with sound inputs.
    """

    tmp: Path
    kit: Path

    def copy(self, name: str) -> Path:
        """A copy of a part of the kit, to be damaged."""
        if not (self.tmp / name).exists():
            shutil.copytree(self.kit / name, self.tmp / name)
        return self.tmp / name

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def tree(self) -> dict[str, bytes | None]:
        """Everything below, with its content."""
        return tree(self.tmp)


Prepare = Callable[[Place], list]


@dataclass
class Case:
    """A mistake and what is said about it.

    Attributes:
        args: Prepares the place and returns the command line.
        words: Pattern that occurs in the message.
        code: Exit status.
    """

    args: Prepare
    words: str
    code: int = 2


def command(line: str) -> Prepare:
    """A command line as it is typed; {kit} stands for the kit's folder."""
    return lambda place: [word.replace("{kit}", str(place.kit)) for word in line.split()]


# --- import-csv -----------------------------------------------------------------------------------


def table(*rows: str, header: str = HEADER) -> str:
    return "\n".join([header, *rows]) + "\n"


def imported(content: str | bytes, *options: str, change: Callable[[Place], object] = lambda place: None) -> Prepare:
    """The import of a CSV; ``change`` damages the place before."""

    def args(place: Place) -> list:
        place.copy("videos")
        change(place)
        csv = place.file("ratings.csv", content)
        return ["shards", "import-csv", csv, "--videos", "videos", "--out", "out", "--workers", "1", *options]

    return args


def rows(*lines: str, change: Callable[[Place], object] = lambda place: None, options: tuple[str, ...] = ()) -> Prepare:
    """The import of a CSV with these rows below the usual header."""
    return imported(table(*lines), *options, change=change)


def video(name: str, content: Callable[[bytes], bytes]) -> Callable[[Place], object]:
    return lambda place: place.file(f"videos/{name}", content((place.tmp / "videos" / "a.mp4").read_bytes()))


def linked_out(place: Place) -> None:
    place.file("outside.mp4", plain_clip(10))
    (place.tmp / "videos" / "link.mp4").symlink_to(place.tmp / "outside.mp4")


FINE = table(*ROWS)
IMPORT = {
    "one column missing": Case(
        imported(table(ROWS[0], header=HEADER.replace("prompt", "text"))), "lacks the columns prompt"
    ),
    "all columns missing": Case(imported("x,y\n1,2\n"), "lacks the columns path_A, path_B, prompt, VQ, MQ, TA"),
    "unknown label": Case(rows(ROWS[0], "b.mp4,c.mp4,p,A,B,tie,"), r"line 3: unknown labels \{'TA': 'tie'\}"),
    "label of another case": Case(rows("a.mp4,b.mp4,p,a,B,same,"), "line 2: unknown labels"),
    "another encoding": Case(
        imported(table("a.mp4,b.mp4,p,A,B,same,").replace("p", "né").encode("latin-1")), "not UTF-8"
    ),
    "UTF-16": Case(imported(FINE.encode("utf-16")), "not UTF-8"),
    "the same row twice": Case(rows(ROWS[0], ROWS[1], ROWS[0].replace("A,B", "B,B")), "line 4: repeats line 2"),
    "the same pair turned round": Case(rows(ROWS[0], "b.mp4,a.mp4,a red circle,B,A,same,3"), "line 3: repeats line 2"),
    "absolute path": Case(rows("/etc/hostname,b.mp4,p,A,B,same,"), "line 2: path '/etc/hostname' is not a path inside"),
    "path that leads out": Case(
        rows("../outside.mp4,b.mp4,p,A,B,same,", change=linked_out), "line 2: path .* not a path inside"
    ),
    "path with a drive": Case(rows("C:\\a.mp4,b.mp4,p,A,B,same,"), "line 2: path .* not a path inside"),
    "link out of the folder": Case(
        rows("link.mp4,b.mp4,p,A,B,same,", change=linked_out), "line 2: path 'link.mp4' is a link out"
    ),
    "empty path": Case(rows(",b.mp4,p,A,B,same,"), "line 2: path '' is not a path"),
    "video missing": Case(
        rows(ROWS[0], "a.mp4,z.mp4,p,A,B,same,"),
        r"1 videos are not there, which 1 rows name\n +there is no file .*z\.mp4 \(line 3\)",
    ),
    "video a folder": Case(
        rows("sub,b.mp4,p,A,B,same,", change=lambda p: (p.tmp / "videos/sub").mkdir()),
        r"there is no file .* \(line 2\)",
    ),
    "the same video twice": Case(rows("a.mp4,a.mp4,p,A,B,same,"), r"line 2: both videos are a\.mp4"),
    "the same video in two spellings": Case(rows("a.mp4,./a.mp4,p,A,B,same,"), r"line 2: both videos are a\.mp4"),
    "score not a number": Case(rows("a.mp4,b.mp4,p,A,B,same,nan"), "line 2: MOS_A_VQ 'nan'"),
    "score too high": Case(rows("a.mp4,b.mp4,p,A,B,same,5.01"), r"line 2: MOS_A_VQ '5\.01'"),
    "score too low": Case(rows("a.mp4,b.mp4,p,A,B,same,0"), "line 2: MOS_A_VQ '0'"),
    "score a word": Case(rows("a.mp4,b.mp4,p,A,B,same,good"), "line 2: MOS_A_VQ 'good'"),
    "no prompt": Case(rows("a.mp4,b.mp4, ,A,B,same,3"), "line 2: there is no prompt"),
    "a field too few": Case(rows("a.mp4,b.mp4,p,A,B,same"), "line 2: has 6 fields, the header 7"),
    "a field too many": Case(rows("a.mp4,b.mp4,one, two,A,B,same,3"), "line 2: has 8 fields, the header 7"),
    "quote never closed": Case(rows('a.mp4,b.mp4,"p,A,B,same,3'), "cannot be read as CSV"),
    "empty csv": Case(imported(""), "has no rows"),
    "csv with a header only": Case(imported(HEADER + "\n"), "has no rows"),
    "no such csv": Case(
        command("shards import-csv none.csv --videos {kit}/videos --out out"), r"none\.csv: there is no such file"
    ),
    "csv a folder": Case(
        command("shards import-csv {kit}/videos --videos {kit}/videos --out out"), "cannot be read as CSV"
    ),
    "no such folder of videos": Case(
        lambda p: ["shards", "import-csv", p.file("r.csv", FINE), "--videos", "none", "--out", "out"], "no such folder"
    ),
    "videos a file": Case(
        lambda p: ["shards", "import-csv", p.file("r.csv", FINE), "--videos", "r.csv", "--out", "out"], "no such folder"
    ),
    "output exists": Case(imported(FINE, change=lambda p: p.file("out/mine.txt", "mine")), "output out exists already"),
    "output a file": Case(imported(FINE, change=lambda p: p.file("out", "mine")), "output out exists already"),
    "truncated video": Case(
        imported(FINE, change=video("b.mp4", lambda c: c[: c.index(b"moov") - 4])), r"line 2: b\.mp4.*cut short"
    ),
    "video without its end": Case(
        imported(FINE, change=video("b.mp4", lambda c: c[: len(c) // 2])),
        r"line 2: b\.mp4 (is no readable|holds no) video",
    ),
    "video of one frame": Case(
        imported(FINE, change=video("b.mp4", lambda c: plain_clip(9, 1))), r"line 2: b\.mp4: it has 1 frame"
    ),
    "text as video": Case(
        imported(FINE, change=video("b.mp4", lambda c: b"not a video\n" * 9)), r"line 2: b\.mp4 is no readable video"
    ),
    "empty video": Case(imported(FINE, change=video("b.mp4", lambda c: b"")), r"line 2: b\.mp4 is empty"),
    "nothing left after skipping": Case(
        rows("a.mp4,z.mp4,p,A,B,same,3", options=("--skip-bad-rows",)), "No row is sound"
    ),
    "bad rows in a benchmark": Case(
        rows("a.mp4,z.mp4,p,A,B,same,3", options=("--kind", "videos")), r"there is no file .* \(line 2\)"
    ),
    "unknown kind": Case(imported(FINE, "--kind", "triples"), "'triples' is unknown; choose one of pairs"),
    "no workers": Case(imported(FINE, "--workers", "0"), "workers"),
}


# --- sets -----------------------------------------------------------------------------------------


def damaged(name: str, command: str, do: Callable[[Path], object], *options: str) -> Prepare:
    """A command of `shards` on a damaged copy of a set."""

    def args(place: Place) -> list:
        do(place.copy(name))
        return ["shards", command, name, *options]

    return args


def halve(folder: Path) -> None:
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])


def change_index(**changes: object) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, **changes}))

    return do


def without_prompt(place: Place) -> list:
    with ShardWriter(place.tmp / "set", "videos") as writer:
        writer.write("0", {"": plain_clip(40)}, {"caption": "a red circle"})
    return ["shards", "info", "set"]


def undecodable(place: Place) -> list:
    with ShardWriter(place.tmp / "set", "videos") as writer:
        writer.write("0", {"": plain_clip(40)}, {"prompt": "p"})
        writer.write("1", {"": b"no video"}, {"prompt": "p"})
    return ["shards", "encode-frames", "set", "--out", "out", "--workers", "1"]


def encode_frames(*options: str, source: str = "pairs") -> Prepare:
    return lambda p: ["shards", "encode-frames", p.kit / source, "--out", "out", "--workers", "1", *options]


def twice_encoded(place: Place) -> list:
    main(["shards", "encode-frames", str(place.kit / "clips"), "--out", "frames", "--factor", "16", "--workers", "1"])
    return ["shards", "encode-frames", "frames", "--out", "out", "--workers", "1"]


SHARDS = {
    "verify: no folder": Case(command("shards verify none"), "none: there is no such folder"),
    "verify: foreign folder": Case(lambda p: ["shards", "verify", p.copy("videos")], r"it has no index\.json"),
    "verify: damage": Case(damaged("pairs", "verify", halve), r"000000\.tar has \d+ bytes", code=1),
    "verify: shard missing": Case(
        damaged("pairs", "verify", lambda f: (f / "000000.tar").unlink()), r"000000\.tar is missing", code=1
    ),
    "verify: index cut": Case(
        damaged("pairs", "verify", lambda f: (f / "index.json").write_text("{")), r"index\.json.*cannot be read"
    ),
    "verify: another format": Case(damaged("pairs", "verify", change_index(format="other")), "is of format"),
    "verify: another version": Case(damaged("pairs", "verify", change_index(version=99)), "is of format"),
    "info: no folder": Case(command("shards info none"), "none: there is no such folder"),
    "info: a file": Case(lambda p: ["shards", "info", p.file("set", "x")], "there is no such folder"),
    "info: foreign folder": Case(lambda p: ["shards", "info", p.copy("videos")], r"it has no index\.json"),
    "info: damage": Case(damaged("pairs", "info", halve), "shards verify"),
    "info: record without prompt": Case(without_prompt, "there is no prompt"),
    "info: table damaged": Case(
        damaged("bench", "info", lambda f: (f / "pairs.csv").write_bytes(b"\xff\xfe")), r"pairs\.csv"
    ),
    "encode-frames: no folder": Case(command("shards encode-frames none --out out"), "no such folder"),
    "encode-frames: damage": Case(damaged("pairs", "encode-frames", halve, "--out", "out"), "shards verify"),
    "encode-frames: bad clip": Case(undecodable, r"key '1', mp4 is no readable video"),
    "encode-frames: twice": Case(twice_encoded, "holds decoded frames already"),
    "encode-frames: output exists": Case(
        lambda p: ["shards", "encode-frames", p.kit / "pairs", "--out", p.copy("videos")], "exists already"
    ),
    "encode-frames: rate 0": Case(encode_frames("--fps", "0"), "fps must be positive"),
    "encode-frames: rate NaN": Case(encode_frames("--fps", "nan"), "fps must be positive"),
    "encode-frames: odd count": Case(encode_frames("--num-frames", "3"), "num_frames must be an even number"),
    "encode-frames: no pixels": Case(encode_frames("--max-pixels", "0"), "max_pixels must be positive"),
    "encode-frames: factor 0": Case(encode_frames("--factor", "0"), "factor"),
    "encode-frames: no model": Case(
        encode_frames("--model", "none"), "none: there is no such folder of a reward model"
    ),
    "encode-frames: no workers": Case(encode_frames("--workers", "0"), "workers"),
    "sprites: no pairs": Case(command("sprites --out out --train 0 --workers 1"), "from 1 on"),
    "sprites: no rated pairs": Case(
        command(
            "sprites --out out --train 1 --val 1 --captions 1 --benchmark-videos 8 --benchmark-pairs 0 --workers 1"
        ),
        "pairs",
    ),
    "sprites: a single video": Case(
        command("sprites --out out --train 1 --val 1 --captions 1 --benchmark-videos 1 --workers 1"), "pairs"
    ),
    "sprites: output exists": Case(
        lambda p: ["sprites", "--out", p.copy("videos"), "--workers", "1"], "exists already"
    ),
    "miniature: output exists": Case(lambda p: ["miniature", "--out", p.copy("videos")], "exists already"),
    "miniature: impossible width": Case(command("miniature --out out --hidden 7"), "hidden|width"),
}


# --- models ---------------------------------------------------------------------------------------


def model(change: Callable[[Path], object]) -> Prepare:
    """Scoring with a damaged copy of the model."""

    def args(place: Place) -> list:
        change(place.copy("model"))
        return ["score", "--model", "model", "--video", place.kit / "videos" / "a.mp4", "--prompt", "p", *CPU]

    return args


def change_record(**changes: object) -> Callable[[Path], object]:
    """The model's JSON with other values; None removes one."""

    def do(folder: Path) -> None:
        record = {**json.loads((folder / "reward.json").read_text()), **changes}
        (folder / "reward.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))

    return do


def shorten(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


CPU = ["--device", "cpu", "--workers", "0"]


def score(*options: str | Callable[[Place], object], device: str = "cpu") -> Prepare:
    """Scoring with the sound model; {kit} stands for the kit's folder."""

    def args(place: Place) -> list:
        given = [o(place) if callable(o) else o.replace("{kit}", str(place.kit)) for o in options]
        return ["score", "--model", place.kit / "model", *given, "--device", device]

    return args


def bench(*options: str | Callable[[Place], object]) -> Prepare:
    def args(place: Place) -> list:
        given = [o(place) if callable(o) else o.replace("{kit}", str(place.kit)) for o in options]
        return ["bench", "--model", place.kit / "model", *given, *CPU]

    return args


def bench_without_table(place: Place) -> list:
    (place.copy("bench") / "pairs.csv").unlink()
    return bench("--data", "bench")(place)


def other_backbone(place: Place) -> list:
    main(["miniature", "--out", "wide", "--hidden", "48", "--layers", "1"])
    return score("--video", "{kit}/videos/a.mp4", "--prompt", "p", "--backbone", "wide")(place)


def export_beside_a_foreign_config(place: Place) -> list:
    place.file("config.yaml", "a: 1\n")
    place.file("x.ckpt", "x")
    return ["export", "--checkpoint", "x.ckpt", "--out", "out"]


A, B = ("--video", "{kit}/videos/a.mp4"), ("--video", "{kit}/videos/b.mp4")
P = ("--prompt", "a red circle")
MODELS = {
    "score: no model": Case(
        command("score --model none --video {kit}/videos/a.mp4 --prompt p --device cpu --workers 0"),
        "none: there is no such folder of a reward model",
    ),
    "score: another folder": Case(
        command("score --model {kit}/videos --video {kit}/videos/a.mp4 --prompt p --device cpu --workers 0"),
        r"is no reward model: it holds neither reward\.json .* nor model_config\.json",
    ),
    "score: no reward.json": Case(model(lambda f: (f / "reward.json").unlink()), r"neither reward\.json"),
    "score: no tensors": Case(
        model(lambda f: (f / "trained.safetensors").unlink()), r"trained\.safetensors is missing"
    ),
    "score: no template": Case(model(lambda f: (f / "template.txt").unlink()), r"template\.txt is missing"),
    "score: no processor": Case(model(lambda f: shutil.rmtree(f / "processor")), "processor is missing"),
    "score: empty processor": Case(
        model(lambda f: (shutil.rmtree(f / "processor"), (f / "processor").mkdir())), "processor"
    ),
    "score: reward.json cut": Case(model(shorten("reward.json")), r"reward\.json.*cannot be read"),
    "score: reward.json a list": Case(model(lambda f: (f / "reward.json").write_text("[]")), r"reward\.json"),
    "score: another format": Case(model(change_record(format="other")), "format 'other'"),
    "score: a later version": Case(model(change_record(version=2)), "version 2"),
    "score: no settings": Case(model(change_record(settings=None)), r"reward\.json"),
    "score: no statistics": Case(model(change_record(statistics=None)), r"reward\.json"),
    "score: statistics null": Case(
        model(change_record(statistics={"mean": [0, 0, 0], "std": None})), r"reward\.json|std"
    ),
    "score: statistics of words": Case(
        model(change_record(statistics={"mean": [0, 0, 0], "std": ["a", "b", "c"]})), r"reward\.json|std"
    ),
    "score: statistics too few": Case(
        model(change_record(statistics={"mean": [0, 0], "std": [1, 1]})), r"reward\.json|std"
    ),
    "score: statistics 0": Case(
        model(change_record(statistics={"mean": [0, 0, 0], "std": [0, 1, 1]})), r"reward\.json|std"
    ),
    "score: unknown setting": Case(model(change_record(settings={"colour": "red"})), r"reward\.json"),
    "score: unknown sampling": Case(model(change_record(sampling={"fps": 2.0, "colour": "red"})), r"reward\.json"),
    "score: tensors cut": Case(model(shorten("trained.safetensors")), r"trained\.safetensors|not whole"),
    "score: template without tokens": Case(
        model(lambda f: (f / "template.txt").write_text("<video> <prompt>")), "reward marks"
    ),
    "score: backbone gone": Case(model(change_record(backbone="none/at/all")), "none/at/all"),
    "score: another backbone": Case(other_backbone, "tensors do not fit backbone"),
    "score: video missing": Case(score("--video", "none.mp4", *P), r"1 videos are not there: none\.mp4"),
    "score: a prompt too few": Case(score(*A, *B, *P), "2 --video and 1 --prompt"),
    "score: a prompt too many": Case(score(*A, *P, *P), "1 --video and 2 --prompt"),
    "score: empty prompt": Case(score(*A, "--prompt", " "), "1 videos have no prompt"),
    "score: nothing": Case(score(), "nothing to score"),
    "score: csv without columns": Case(
        score("--csv", lambda p: p.file("l.csv", "file,text\na.mp4,p\n")), "needs the columns path and prompt"
    ),
    "score: empty csv": Case(score("--csv", lambda p: p.file("l.csv", "")), "needs the columns path and prompt"),
    "score: no such csv": Case(score("--csv", "none.csv"), r"--csv none\.csv cannot be read"),
    "score: csv in another encoding": Case(
        score("--csv", lambda p: p.file("l.csv", "path,prompt\na.mp4,né\n".encode("latin-1"))), "cannot be read"
    ),
    "score: short row": Case(score("--csv", lambda p: p.file("l.csv", "prompt,path\np\n")), r"l\.csv|not there"),
    "score: one bad video": Case(
        score("--video", lambda p: p.file("t.mp4", "text"), *P, "--workers", "0"),
        r"t\.mp4 is no readable video",
        code=1,
    ),
    "score: batch size 0": Case(score(*A, *P, "--batch-size", "0"), "batch.size"),
    "score: negative workers": Case(score(*A, *P, "--workers", "-1"), "workers"),
    "score: no GPU": Case(score(*A, *P, device="gpu"), "--device cpu"),
    "bench: no data": Case(bench("--data", "none"), "none: there is no such folder"),
    "bench: pairs instead of videos": Case(bench("--data", "{kit}/pairs"), "holds pairs, but videos are needed"),
    "bench: no table": Case(bench("--data", "{kit}/clips"), r"has no pairs\.csv"),
    "bench: table lost": Case(bench_without_table, r"pairs\.csv"),
    "bench: foreign folder": Case(bench("--data", "{kit}/videos"), r"no index\.json"),
    "bench: two of one name": Case(
        bench("--data", "{kit}/bench", "--data", lambda p: p.copy("bench")), "the same name"
    ),
    "bench: batch size 0": Case(bench("--data", "{kit}/bench", "--batch-size", "0"), "batch.size"),
    "bench: no data at all": Case(bench(), "are needed: --data"),
    "export: no checkpoint": Case(
        command("export --checkpoint none.ckpt --out out"), r"none\.ckpt: there is no such file"
    ),
    "export: no config above": Case(
        lambda p: ["export", "--checkpoint", p.file("x.ckpt", "x"), "--out", "out"], r"config\.yaml"
    ),
    "export: foreign config": Case(export_beside_a_foreign_config, r"config\.yaml"),
    "no command of a group": Case(command("shards"), "name a command; choose one of copy"),
    "unknown command": Case(command("train"), "there is no command train"),
    "unknown option": Case(command("shards info {kit}/pairs --colour"), "there is no option --colour"),
}


# --- experiments ----------------------------------------------------------------------------------


def fit(*options: str | Callable[[Place], str], experiment: str = "reward_btt") -> Prepare:
    """Training as in experiments/sprites on the kit's data, with further options."""

    def args(place: Place) -> list:
        kit = place.kit
        common = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.enable_model_summary=false"]
        if experiment == "reward_btt":
            common += [
                f"--model.init_args.network.init_args.backbone={kit / 'backbone'}",
                f"--data.init_args.train={kit / 'pairs'}",
                f"--data.init_args.val={kit / 'pairs'}",
                f"--data.init_args.benchmarks={{b: {kit / 'bench'}}}",
                "--data.init_args.batch_size=2",
                "--data.init_args.workers=0",
            ]
        else:
            common += [
                f"--model.init_args.backbone={kit / 'backbone'}",
                "--model.init_args.out=out",
                f"--data.init_args.data={kit / 'clips'}",
                "--data.init_args.workers=0",
            ]
        given = [o(place) if callable(o) else o.replace("{kit}", str(kit)) for o in options]
        return ["fit", "--config", f"experiments/sprites/{experiment}.yaml", *common, *given]

    return args


def frames_of_another_model(place: Place) -> list:
    main(command("shards encode-frames {kit}/pairs --out frames --factor 16 --fps 4 --workers 1")(place))
    return fit("--data.init_args.train=frames")(place)


class Code:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def checkpoint(place: Place, content: object, size: int | None = None) -> Path:
    """A file that torch wrote, whole or cut."""
    torch.save(content, place.tmp / "x.ckpt")
    (place.tmp / "x.ckpt").write_bytes((place.tmp / "x.ckpt").read_bytes()[:size])
    return place.tmp / "x.ckpt"


def configured(content: str | bytes) -> Prepare:
    """Training by a configuration with this content."""
    return lambda place: ["fit", "--config", place.file("x.yaml", content)]


def templated(content: str) -> Prepare:
    """Training with this template."""
    return fit(lambda place: f"{NETWORK}.template={place.file('t.txt', content)}")


def resumed(content: object, size: int | None = None) -> Prepare:
    """Training that goes on from a checkpoint with this content, whole or cut."""
    return fit(lambda place: f"--ckpt_path={checkpoint(place, content, size)}")


DAMAGED = r"checkpoint .*x\.ckpt cannot be used: it is damaged"
NETWORK, MODEL, DATA = "--model.init_args.network.init_args", "--model.init_args", "--data.init_args"
FIT = {
    "unknown key of the model": Case(fit(f"{MODEL}.colour=red"), "colour"),
    "unknown key of the data": Case(fit(f"{DATA}.colour=red"), "colour"),
    "unknown key of the trainer": Case(fit("--trainer.colour=red"), "colour"),
    "unknown key at the top": Case(fit("--colour=red"), "colour"),
    "unknown class of model": Case(fit("--model=videoalign.alignment.Nothing"), "Nothing"),
    "unknown class of data": Case(fit("--data.class_path=videoalign.datamodules.Nothing"), "Nothing"),
    "unknown optimizer": Case(fit(f"{MODEL}.optimizer=torch.optim.Nothing"), "Nothing"),
    "unknown loss": Case(fit(f"{MODEL}.loss=hinge"), "hinge"),
    "unknown decay": Case(fit(f"{MODEL}.decay=fast"), "fast"),
    "theta 1": Case(fit(f"{MODEL}.theta=1"), "theta is 1"),
    "theta below 1": Case(fit(f"{MODEL}.theta=0.5"), "theta > 1"),
    "theta NaN": Case(fit(f"{MODEL}.theta=nan"), "theta"),
    "theta a word": Case(fit(f"{MODEL}.theta=five"), "theta"),
    "ties under regression": Case(fit(f"{MODEL}.loss=reg", f"{MODEL}.ties=true"), r"model\.ties"),
    "warm-up above 1": Case(fit(f"{MODEL}.warmup=1.5"), r"model\.warmup"),
    "no backbone": Case(fit(f"{NETWORK}.backbone=none/at/all"), "none/at/all"),
    "backbone without weights": Case(
        fit(lambda p: ((p.copy("backbone") / "model.safetensors").unlink(), f"{NETWORK}.backbone=backbone")[1]),
        "backbone",
    ),
    "backbone of another family": Case(
        fit(
            lambda p: (
                (p.copy("backbone") / "config.json").write_text('{"model_type": "bert"}'),
                f"{NETWORK}.backbone=backbone",
            )[1]
        ),
        "bert",
    ),
    "backbone is a reward model": Case(fit(f"{NETWORK}.backbone={{kit}}/model"), "backbone|processor"),
    "no template": Case(fit(f"{NETWORK}.template=none.txt"), r"template 'none\.txt' cannot be read"),
    "template without tokens": Case(templated("<video> <prompt>"), "reward marks"),
    "template with two prompts": Case(
        templated("<video> <prompt> <prompt><reward:VQ,MQ,TA>"), "<prompt> occurs 2 times"
    ),
    "template with tokens first": Case(templated("<reward:VQ,MQ,TA> <video> <prompt>"), "<video> stands behind"),
    "rate 0": Case(fit(f"{NETWORK}.sampling.fps=0"), "fps must be positive"),
    "rate and count": Case(fit(f"{NETWORK}.sampling.num_frames=4"), "set exactly one"),
    "adapters of rank 0": Case(fit(f"{NETWORK}.language=lora", f"{NETWORK}.lora.rank=0"), r"lora\.rank"),
    "adapters nowhere": Case(
        fit(f"{NETWORK}.language=lora", f"{NETWORK}.lora.targets=[nothing]"), "match no linear layer"
    ),
    "unknown part": Case(fit(f"{NETWORK}.language=half"), "half"),
    "batch size 0": Case(fit(f"{DATA}.batch_size=0"), r"data\.batch_size must be at least 1"),
    "batch larger than the data": Case(fit(f"{DATA}.batch_size=7"), "6 samples, fewer than one step"),
    "negative workers": Case(fit(f"{DATA}.workers=-1"), r"data\.workers"),
    "no training data": Case(fit(f"{DATA}.train=none"), "none: there is no such folder"),
    "training data null": Case(fit(f"{DATA}.train=null"), r"data\.train is not set"),
    "videos in place of pairs": Case(fit(f"{DATA}.train={{kit}}/bench"), "holds videos, but pairs are needed"),
    "pairs in place of a benchmark": Case(
        fit(f"{DATA}.benchmarks={{b: {{kit}}/pairs}}"), "holds pairs, but videos are needed"
    ),
    "folder of files in place of a set": Case(fit(f"{DATA}.train={{kit}}/videos"), r"no index\.json"),
    "damaged set": Case(fit(lambda p: (halve(p.copy("pairs")), f"{DATA}.train=pairs")[1]), "shards verify"),
    "frames of another model": Case(frames_of_another_model, "fps: 4.0 stored, 8.0 wanted"),
    "no config": Case(command("fit --config none.yaml"), r"none\.yaml"),
    "config no YAML": Case(configured("a: [1, 2\nb: }"), r"x\.yaml|YAML|yaml|[Pp]ars"),
    "config a list": Case(configured("- 1\n- 2\n"), "config|x.yaml"),
    "no checkpoint": Case(fit("--ckpt_path=none.ckpt"), r"none\.ckpt"),
    "learning rate below 0": Case(fit(f"{MODEL}.optimizer.init_args.lr=-1"), "optimizer.*Invalid learning rate: -1"),
    "learning rate NaN": Case(fit(f"{MODEL}.optimizer.init_args.lr=.nan"), "optimizer.*Invalid learning rate: nan"),
    "rate of the rest NaN": Case(fit(f"{MODEL}.optimizer.init_args.rest_lr=.nan"), "optimizer.*Invalid rest_lr: nan"),
    "momentum of 1": Case(fit(f"{MODEL}.optimizer.init_args.momentum=1"), "optimizer.*Invalid momentum: 1"),
    "learning rate a word": Case(fit(f"{MODEL}.optimizer.init_args.lr=fast"), "lr.*fast"),
    "betas above 1": Case(fit(f"{MODEL}.optimizer.init_args.betas=[2,2]"), "optimizer.*Invalid beta"),
    "betas a number": Case(fit(f"{MODEL}.optimizer.init_args.betas=2"), "betas"),
    "devices below 0": Case(fit("--trainer.devices=-3"), "trainer.*devices"),
    "unknown strategy": Case(fit("--trainer.strategy=warp"), "trainer.*warp"),
    "unknown accelerator": Case(fit("--trainer.accelerator=quantum"), "trainer.*quantum"),
    "unknown precision": Case(fit("--trainer.precision=bf17"), r"trainer\.precision.*bf17"),
    "unknown logger": Case(fit("--trainer.logger=nonsense"), r"trainer\.logger.*nonsense"),
    "logger no logger": Case(fit("--trainer.logger.class_path=torch.nn.Linear"), r"trainer\.logger.*Linear"),
    "callback no callback": Case(fit("--trainer.callbacks.class_path=torch.nn.Linear"), r"trainer\.callbacks.*Linear"),
    "model no model": Case(fit("--model.class_path=torch.nn.Linear"), "Linear"),
    "unknown profiler": Case(fit("--trainer.profiler=nonsense"), "profiler"),
    "unknown clipping": Case(fit("--trainer.gradient_clip_algorithm=nonsense"), "gradient_clip_algorithm"),
    "clipping below 0": Case(fit("--trainer.gradient_clip_val=-1"), r"trainer\.gradient_clip_val must be at least 0"),
    "accumulation 0": Case(
        fit("--trainer.accumulate_grad_batches=0"), r"trainer\.accumulate_grad_batches must be at least 1"
    ),
    "validation every 0 steps": Case(
        fit("--trainer.val_check_interval=0"), r"trainer\.val_check_interval must be above 0"
    ),
    "validation every 0 epochs": Case(
        fit("--trainer.check_val_every_n_epoch=0"), r"trainer\.check_val_every_n_epoch must be at least 1"
    ),
    "no steps": Case(fit("--trainer.max_steps=0"), r"trainer\.max_steps is 0, so nothing would be trained"),
    "no epochs": Case(fit("--trainer.max_epochs=0"), r"trainer\.max_epochs is 0, so nothing would be trained"),
    "steps below 0": Case(fit("--trainer.max_steps=-5"), "max_steps"),
    "steps beyond 64 bits": Case(
        fit("--trainer.max_steps=99999999999999999999"), r"trainer\.max_steps: this number does not fit"
    ),
    "nodes 0": Case(fit("--trainer.num_nodes=0"), "num_nodes"),
    "share of batches": Case(fit("--trainer.limit_train_batches=7.5"), "limit_train_batches"),
    "time of no format": Case(fit("--trainer.max_time=99:99"), "99:99"),
    "seed below 0": Case(fit("--seed_everything=-1"), "seed_everything: -1"),
    "seed beyond 64 bits": Case(
        fit("--seed_everything=99999999999999999999"), "seed_everything: this number does not fit"
    ),
    "interpolation of nothing": Case(fit("--trainer.default_root_dir=${nothing.here}"), "nothing.here"),
    "config UTF-16": Case(configured("a: 1".encode("utf-16")), r"x\.yaml is not UTF-8"),
    "config empty": Case(configured(""), r"x\.yaml is empty"),
    "config refers to itself": Case(configured("trainer: &t [*t]"), "itself a part of"),
    "config with a key twice": Case(configured("trainer: {max_steps: 1, max_steps: 2}"), "occurs twice"),
    "config a folder": Case(lambda p: ["fit", "--config", p.copy("videos")], "videos"),
    "checkpoint text": Case(fit(lambda p: f"--ckpt_path={p.file('x.ckpt', 'hello')}"), DAMAGED),
    "checkpoint empty": Case(fit(lambda p: f"--ckpt_path={p.file('x.ckpt', '')}"), DAMAGED),
    "checkpoint cut": Case(resumed({"state_dict": {}}, 300), DAMAGED),
    "checkpoint of weights alone": Case(
        resumed({"state_dict": {}}), r"x\.ckpt cannot be used: it is damaged|does not fit"
    ),
    "checkpoint a list": Case(resumed([1, 2]), DAMAGED),
    "checkpoint with code": Case(resumed({"state_dict": Code()}), DAMAGED),
    "checkpoint a folder": Case(fit(lambda p: f"--ckpt_path={p.copy('videos')}"), "videos"),
    "best checkpoint of none": Case(fit("--ckpt_path=best"), "ckpt_path"),
    "no GPU": Case(fit("--trainer.accelerator=gpu"), "--trainer.accelerator cpu"),
    "captions: no data": Case(fit(f"{DATA}.data=none", experiment="captions"), "none: there is no such folder"),
    "captions: batch size 0": Case(fit(f"{DATA}.batch_size=0", experiment="captions"), "batch_size"),
    "captions: batch larger than the data": Case(
        fit(f"{DATA}.batch_size=2", f"{DATA}.held_out=0", experiment="captions"), "fewer than one batch|batch_size"
    ),
    "captions: all held out": Case(
        fit(f"{DATA}.held_out=240", experiment="captions"), r"data\.held_out is 240, but .*/clips has 1 clips"
    ),
    "captions: pairs": Case(
        fit(f"{DATA}.data={{kit}}/pairs", experiment="captions"), "holds pairs, but videos are needed"
    ),
    "captions: no backbone": Case(fit(f"{MODEL}.backbone=none/at/all", experiment="captions"), "none/at/all"),
}

LOOPS = {
    f"{line}: a file in the way": Case(
        lambda place, line=line: [*line.split(), "--out", place.file("there", "x")], "there"
    )
    for line in ("demo", "paper", "annotate simulate")
}

CASES = {
    f"{group}: {name}" if group else name: case
    for group, cases in (("import-csv", IMPORT), ("", SHARDS), ("", MODELS), ("fit", FIT), ("", LOOPS))
    for name, case in cases.items()
}


LOG = re.compile(r"runs(/sprites(/\w+(/version_0(/(config\.yaml|hparams\.yaml|events\.out\.tfevents\.[^/]+))?)?)?)?")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, kit: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith("no GPU") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    case, place = CASES[name], Place(tmp_path, kit)
    monkeypatch.chdir(tmp_path)
    args = [str(arg) for arg in case.args(place)]
    before = place.tree()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capfd.readouterr()
    assert stop.value.code == case.code
    assert "Traceback" not in out + err
    assert "weights_only=" not in out + err  # advice of torch for programmers
    assert re.search(case.words, err + (out if case.code == 1 else ""), re.DOTALL), err
    after = place.tree()
    if args[:1] == ["fit"]:  # an experiment that has begun has a log: its configuration and its events
        after = {path: content for path, content in after.items() if path in before or not LOG.fullmatch(path)}
    assert after == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 45
