"""The commands of `videoalign annotate`: beginning a round, serving it, importing ratings, exporting pairs."""

import io
import itertools
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from fastapi.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent))
from annotation_helpers import GOOD, annotate, in_pair, person, rate, write_sprites
from videoalign import VideoAlignError
from videoalign.annotation.beginning import begin
from videoalign.annotation.export import export
from videoalign.annotation.label_studio import import_label_studio
from videoalign.annotation.store import Store
from videoalign.callbacks.reward_rows import read_rewards
from videoalign.cli import main
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.verify import verify
from videoalign.models import VideoReward
from videoalign.models.video_reward import Statistics


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("set") / "videos")


@pytest.fixture
def store(videos, tmp_path):
    """A round without hidden repetitions."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("repeats: 0.0\n")
    return begin(str(videos), str(tmp_path / "votes.db"), 1, 0.2, 0.2, protocol=str(rules))


# --- exports ----------------------------------------------------------------------------------------------------------


def rate_all(store):
    """Three people rate all pairs alike."""
    for name in "abc":
        who = person(store, name)
        while task := store.task(who):
            store.vote(who, task.ticket, in_pair(store, task, GOOD))


def test_benchmark_prompts_become_a_benchmark(store, videos, tmp_path):
    rate_all(store)
    card = export(store, ShardSet(videos), tmp_path / "out")
    assert card["exported"] == {"train": 6, "validation": 2, "benchmark": 2}
    assert card["agreement"]["VQ"]["raw"] == 1.0
    benchmark = Benchmark(tmp_path / "out/benchmark")
    assert benchmark.labels[:, :3].tolist() == [[1, 0, -1]] * 2
    sets = [ShardSet(tmp_path / "out" / split) for split in ("train", "validation", "benchmark")]
    prompts = [{content.record["prompt"] for content in shards.contents()} for shards in sets]
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))


def test_nothing_decided_is_nothing_to_export(store, videos, tmp_path):
    with pytest.raises(VideoAlignError, match=r"no pair .* is decided"):
        export(store, ShardSet(videos), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Label Studio -----------------------------------------------------------------------------------------------------


def studio(videos, change=None):
    """An export: three people on every pair, of whom one is overruled."""
    keys = sorted(content.key for content in ShardSet(videos).contents())
    records = {content.key: content.record for content in ShardSet(videos).contents()}
    tasks = []
    for number, (a, b) in enumerate(zip(keys[::2], keys[1::2])):
        annotations = []
        for who, vq in (("x@lab", "A"), ("y@lab", "A"), ("z@lab", "B" if number == 0 else "A"), ("chief@lab", "same")):
            chosen = {column: [vq if column == "VQ" else "same"] for column in GOOD}
            result = [{"from_name": column, "value": {"choices": choice}} for column, choice in chosen.items()]
            if who != "chief@lab" or number == 0:
                annotations.append({"completed_by": {"email": who}, "lead_time": 9.5, "result": result})
        named = f"/data/local-files/?d={a}.mp4", f"s3://bucket/{b}.mp4"
        if number % 2:
            named = f"https://host/files/{a}.mp4?token=1", f"/data/upload/1/1a2b3c4d-{b}.mp4"
        data = {"prompt": records[a]["prompt"], "video_a": named[0], "video_b": named[1]}
        tasks.append({"id": number, "data": data, "annotations": annotations})
    if change:
        change(tasks)
    return tasks


def test_label_studios_ratings_become_the_same_pairs(videos, tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(studio(videos)))
    found = import_label_studio(path, ShardSet(videos), tmp_path / "votes.db", (0.0, 0.0), reviewers=("chief@lab",))
    assert found == {"pairs": 10, "votes": 31, "people": 4}
    card = export(Store(tmp_path / "votes.db"), ShardSet(videos), tmp_path / "out")
    assert card["labels"]["VQ"] == {"same": 1, "A": 9}
    assert card["exported"] == {"train": 10}
    assert not [*verify(ShardSet(tmp_path / "out/train"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[0]["data"].pop("video_a"), "task 0: data.video_a is missing"),
        (lambda t: t[3]["data"].update(video_b="nowhere.mp4"), "task 3: there is no video 'nowhere'"),
        (lambda t: t[1]["data"].update(video_b=t[2]["data"]["video_b"]), "task 1: videos"),
        (lambda t: t[2]["annotations"][0]["result"].pop(), "task 2: an annotation lacks a choice in TA"),
        (lambda t: t[2]["annotations"][0]["result"][0]["value"].update(choices=["C"]), "task 2: VQ is"),
        (lambda t: t[2]["annotations"][0].pop("completed_by"), "task 2: an annotation does not say who"),
        (lambda t: t[1].update(annotations=[5]), "task 1 is not as Label Studio writes"),
        (lambda t: t[1].update(data="x"), "task 1 is not as Label Studio writes"),
        (lambda t: t[1]["annotations"][0].update(lead_time="x"), "task 1 is not as Label Studio writes"),
        (lambda t: t.clear(), "no list of tasks"),
    ],
)
def test_exports_that_are_something_else_are_refused(videos, tmp_path, change, message):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(studio(videos, change)))
    with pytest.raises(VideoAlignError, match=message):
        import_label_studio(path, ShardSet(videos), tmp_path / "votes.db")
    assert not (tmp_path / "votes.db").exists()


def test_unknown_reviewers_are_refused_before_anything_is_written(videos, tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(studio(videos)))
    with pytest.raises(VideoAlignError, match="reviewers"):
        import_label_studio(path, ShardSet(videos), tmp_path / "votes.db", reviewers=("nobody",))
    assert not (tmp_path / "votes.db").exists()


# --- beginning --------------------------------------------------------------------------------------------------------


def test_a_training_round_comes_from_a_table(videos, tmp_path):
    keys = sorted(content.key for content in ShardSet(videos).contents())
    table = tmp_path / "references.csv"
    table.write_text(f"key_A,key_B,VQ,MQ,TA\n{keys[0]},{keys[1]},A,A,same\n")
    store = begin(str(videos), str(tmp_path / "votes.db"), references=str(table))
    task = store.task(person(store, "a"))
    assert task.kind == "training"
    assert {task.left, task.right} == {keys[0], keys[1]}
    assert all(keys[0] not in (row.key_a, row.key_b) for row in store.pairs() if row.reference is None)


def test_references_without_a_pair_are_refused(videos, tmp_path):
    (tmp_path / "references.csv").write_text("key_A,key_B,VQ,MQ,TA\n")
    with pytest.raises(VideoAlignError, match="holds no pair"):
        begin(str(videos), str(tmp_path / "votes.db"), references=str(tmp_path / "references.csv"))
    assert not (tmp_path / "votes.db").exists()


def test_videos_that_browsers_do_not_play_are_refused(tmp_path):
    """MPEG-4 part 2, as some tools write it, and H.264 with full colours."""
    for name, codec, pixels in (("old", "mpeg4", "yuv420p"), ("full", "libx264", "yuv444p")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", "mp4") as container:
            stream = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for _ in range(4):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            container.mux(stream.encode())
        with ShardWriter(tmp_path / name, "videos") as writer:
            for source in "ab":
                record = {"prompt": "a dot", "source": source, "fps": 8, "num_frames": 4}
                writer.write(source, {"": buffer.getvalue()}, record)
        told = f"browsers do not play 2 of the 2 videos .* first a: (mpeg4|h264) {pixels}; make H.264"
        with pytest.raises(VideoAlignError, match=told):
            begin(str(tmp_path / name), str(tmp_path / "votes.db"), validation=0, benchmark=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nothing,{1},A,A,A", "no video 'nothing'"),
        ("{0},{1},C,A,A", "must be A, same or B"),
        ("{0},{2},A,A,A", "different prompts"),
    ],
)
def test_wrong_references_are_refused_with_their_line(videos, tmp_path, row, message):
    keys = sorted(content.key for content in ShardSet(videos).contents())
    table = tmp_path / "references.csv"
    table.write_text(f"key_A,key_B,VQ,MQ,TA\n{row.format(*keys)}\n")
    with pytest.raises(VideoAlignError, match=f"line 2: .*{message}"):
        begin(str(videos), str(tmp_path / "votes.db"), references=str(table))
    assert not (tmp_path / "votes.db").exists()


@pytest.fixture(scope="module")
def judges(backbone, sampling, tmp_path_factory):
    """Two small reward models with random weights."""
    folder = tmp_path_factory.mktemp("judges")
    for seed in range(2):
        network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
        for parameter in network.head.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        network.statistics = Statistics([0.0] * 3, [0.5, 2.0, 0.25])
        network.save_pretrained(folder / str(seed))
    return [str(folder / "0"), str(folder / "1")]


def by_uncertainty(rows, folder, count):
    """Rows in the order that the rewards of one or two models ask for, the least certain one first."""
    rewards = [read_rewards(place) for place in folder.iterdir()]  # in any order
    assert len({str(raw) for raw in rewards}) == len(rewards) == count
    margins = [{r.id: torch.tensor(raw[r.key_a]) - torch.tensor(raw[r.key_b]) for r in rows} for raw in rewards]
    scale = torch.tensor([0.5, 2.0, 0.25])

    def uncertainty(row):
        if count == 2:
            return ((margins[0][row.id] - margins[1][row.id]) / scale).abs().mean().item()
        d, theta = margins[0][row.id].double(), 5.0  # Rao-Kupper: the paper's equation of a tie
        tie = (theta**2 - 1) * d.exp() / ((d.exp() + theta) * (1 + theta * d.exp()))
        return tie.mean().item()

    return sorted(rows, key=uncertainty, reverse=True)


@pytest.mark.parametrize("count", [1, 2])
def test_what_models_know_least_of_is_rated_first(videos, judges, tmp_path, monkeypatch, capsys, count):
    db = tmp_path / "votes.db"
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda app, host, port: None)

    def serve(models, **more):
        options = {"videos": videos, "db": db, "select": "uncertain", "model": models, "device": "cpu"}
        annotate("serve", **options, **more)

    serve(judges[:count], per_prompt=1)
    rows = Store(db).pairs()
    assert len(rows) == 10
    assert [row.id for row in rows] == [row.id for row in by_uncertainty(rows, tmp_path / "votes.db.rewards", count)]
    # what is left of a round can be put in order at any time
    store = Store(db)
    store.prioritise([row.id for row in reversed(rows)])
    rate(store, person(store, "a"), {}, flags=["unsafe"])
    capsys.readouterr()
    serve(judges[:count], seed=3)
    assert "goes on as it was begun, whatever --seed says" in capsys.readouterr().err
    left = [row.id for row in sorted(store.pairs(), key=lambda row: row.priority) if row.state == "open"]
    assert left == [row.id for row in rows[:-1]]
    serve(judges[::-1])  # by other models than at first
    assert sorted(row.id for row in store.pairs() if row.state == "open") == sorted(left)
    with sqlite3.connect(store.path) as file:
        file.execute("update pairs set state = 'review'")  # nothing is left to put in order
    serve(judges[:count])


@pytest.mark.parametrize("given", [{"select": "uncertain"}, {"model": "m"}])
def test_an_order_needs_a_model_and_a_model_an_order(videos, tmp_path, given, capsys):
    for command in ("begin", "serve"):
        with pytest.raises(SystemExit):
            annotate(command, videos=videos, db=tmp_path / "votes.db", **given)
        assert "--select uncertain needs --model" in capsys.readouterr().err
        assert not [*tmp_path.iterdir()]


def test_a_guideline_of_ones_own_is_shown(videos, tmp_path, monkeypatch, capsys):
    path, apps = tmp_path / "guideline.yaml", []
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda app, host, port: apps.append(app))
    options = {"videos": videos, "db": tmp_path / "votes.db", "guideline": path}
    part = {"title": "Looks", "question": "Which?", "points": ["fur", "<b>eyes</b>"], "good": "a cat", "bad": "a blur"}
    path.write_text(yaml.safe_dump([part]))
    annotate("serve", **options)
    with TestClient(apps[0], "http://localhost") as client:
        page = client.get(f"/a/{Store(tmp_path / 'votes.db').invite('a')}").text
    assert "<h2>Looks</h2>" in page
    assert "&lt;b&gt;eyes" in page
    assert "Visual quality</h2>" not in page
    for wrong, message in (
        ([], "no list"),
        ([{**part, "points": "fur"}], "part 1"),
        ([part, {"title": "x"}], "part 2"),
        ([{**part, "title": ["a"]}], "part 1"),
        (None, "no list"),
    ):
        path.write_text(yaml.safe_dump(wrong))
        with pytest.raises(SystemExit):
            annotate("serve", **options)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [({"port": "99999"}, "from 1 to 65535"), ({"protocol": "rules.yaml"}, "rules.yaml cannot be read")],
)
def test_mistakes_are_told_before_anything_is_begun(videos, tmp_path, monkeypatch, capsys, more, message):
    (tmp_path / "rules.yaml").write_text("since: 2024-13-45")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        annotate("serve", videos=videos, db="votes.db", **more)
    assert message in capsys.readouterr().err
    assert not Path("votes.db").exists()


def test_without_the_extra_it_is_named(tmp_path):
    script = """
import sys
sys.modules["sqlalchemy"] = None
from videoalign.cli import main
main(["annotate", "status", "--db", "x"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "videoalign[annotate]" in done.stderr
    assert "Traceback" not in done.stderr


def test_others_are_let_in_with_a_warning(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("videoalign.annotation.serving.listen", lambda app, host, port: None)
    for host, warned in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        annotate("serve", videos=videos, db=tmp_path / "votes.db", host=host)
        assert ("unencrypted" in capsys.readouterr().err) is warned


def test_an_export_trains_a_reward_model(store, videos, backbone, tmp_path):
    rate_all(store)
    export(store, ShardSet(videos), tmp_path / "rated")
    config = yaml.safe_load((Path(__file__).parents[1] / "experiments/debug/tiny.yaml").read_text())
    config["trainer"] |= {"max_steps": 3, "logger": False, "enable_checkpointing": False}
    config["trainer"]["default_root_dir"] = str(tmp_path)
    (export_reward,) = (c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("ExportReward"))
    export_reward["init_args"]["out"] = str(tmp_path / "reward")
    config["trainer"]["callbacks"] = [export_reward]
    network = config["model"]["init_args"]["network"]["init_args"]
    network |= {"backbone": str(backbone), "sampling": {"fps": 8.0, "min_pixels": 0}}
    sets = {"train": str(tmp_path / "rated/train"), "val": str(tmp_path / "rated/validation")}
    config["data"]["init_args"] = sets | {"batch_size": 2, "workers": 0}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "fit.yaml")])
    bench = [
        "bench",
        "--model",
        tmp_path / "reward",
        "--data",
        tmp_path / "rated/benchmark",
        "--out",
        tmp_path / "scores",
    ]
    main([*map(str, bench), "--device", "cpu", "--workers", "0"])
    assert len(read_rewards(tmp_path / "scores/benchmark")) == 4


def test_a_round_is_not_begun_over_another(videos, tmp_path):
    begin(str(videos), str(tmp_path / "votes.db"))
    size = os.path.getsize(tmp_path / "votes.db")
    with pytest.raises(VideoAlignError, match="exists already"):
        begin(str(videos), str(tmp_path / "votes.db"))
    assert os.path.getsize(tmp_path / "votes.db") == size
