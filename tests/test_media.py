"""Media in every kind of logger: what was shown is read back from what the logger wrote."""

import csv
import glob
import io
import json
import struct
import time

import av
import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import call
from videoalign.callbacks import run_media as media_file
from videoalign.callbacks.plots import panels
from videoalign.callbacks.run_folder import folder_of, own_folders
from videoalign.callbacks.run_media import media_of
from videoalign.callbacks.side_clips import Clip, drawn, mp4
from videoalign.models.yaml_text import read_config

SIZE = (4, 9, 13)
"""Frames, height and width of clips: odd sides, which H.264 with halved colour cannot hold."""
TABLE = [["", "label"], ["VQ", "A|B"]]
EVIL = "<script>a</script> | ![x](http://x) é"


def film(seed: int = 0) -> np.ndarray:
    colours = np.random.default_rng(seed).integers(0, 255, (SIZE[0], 1, 1, 3), dtype=np.uint8)
    return np.broadcast_to(colours, (*SIZE, 3)).copy()


CLIP = Clip({"A one": film(1), "B two": film(2)}, 4.0, EVIL, TABLE, height=32)


def trainer_of(*loggers, **options) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=list(loggers), barebones=False, **options)


def show_all(trainer: L.Trainer) -> None:
    figure, (axis,) = panels(size=(2, 2))
    axis.plot([0, 1])
    media = media_of(trainer)
    media.text("val/text", EVIL)
    media.document("config.yaml", "seed: 1\n")
    media.table("val/table", TABLE[0], TABLE[1:])
    media.figure("val/figure", figure)
    media.image("val/image", np.full((6, 7, 3), 200, np.uint8))
    media.histogram("val/histogram", np.arange(10.0))
    media.clip("val/clip", CLIP)


def read_film(content) -> np.ndarray:
    with av.open(content) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_tensorboard_shows_all(tmp_path):
    trainer = trainer_of(TensorBoardLogger(tmp_path, "run"))
    show_all(trainer)
    trainer.logger.experiment.flush()
    found = EventAccumulator(trainer.logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert texts["val/text/text_summary"] == EVIL and texts["config/text_summary"] == "    seed: 1"
    assert texts["val/table/text_summary"].splitlines()[-1] == r"| VQ | A\|B |"
    assert set(found.Tags()["images"]) == {"val/figure", "val/image", "val/clip"}
    assert found.Histograms("val/histogram")[0].histogram_value.num == 10
    (clip,) = found.Images("val/clip")
    assert clip.encoded_image_string[:3] == b"GIF" and (clip.width, clip.height) == drawn(CLIP)[0].size


def test_csv_logger_gets_files(tmp_path):
    trainer = trainer_of(CSVLogger(tmp_path, "run"))
    show_all(trainer)
    folder = tmp_path / "run" / "version_0"
    assert (folder / "media/val/text/000000.md").read_text() == EVIL
    assert list(csv.reader(open(folder / "media/val/table/000000.csv"))) == TABLE
    for name, size in (("figure", (200, 200)), ("image", (7, 6)), ("histogram", (450, 300))):
        assert Image.open(folder / f"media/val/{name}/000000.png").size == size
    assert (folder / "samples.html").exists()  # where its clips are
    media_of(trainer).text("../../out/../x", "stays inside")
    assert not list(tmp_path.parent.glob("out")) and len(list(folder.rglob("media/**/*.md"))) == 2


def test_mlflow_keeps_all_as_artifacts(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("run", save_dir=str(tmp_path / "ml"))
    trainer = trainer_of(logger)
    show_all(trainer)
    client, run = logger.experiment, logger.run_id

    def listed(folder=None):
        for item in client.list_artifacts(run, folder):
            yield from listed(item.path) if item.is_dir else [item.path]

    fetched = {path: open(client.download_artifacts(run, path, str(tmp_path)), "rb").read() for path in listed()}
    assert fetched["config.yaml"] == b"seed: 1\n" and fetched["media/val/text/000000.md"].decode() == EVIL
    assert list(csv.reader(fetched["media/val/table/000000.csv"].decode().splitlines())) == TABLE
    assert {f"media/val/{name}/000000.png" for name in ("figure", "image", "histogram")} <= set(fetched)
    assert len(read_film(io.BytesIO(fetched["media/val/clip/000000.mp4"]))) == SIZE[0]
    assert (tmp_path / "ml" / logger.experiment_id / run / "samples.html").exists()


def test_wandb_gets_all_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("run", save_dir=tmp_path, project="p")
    trainer = trainer_of(logger)
    try:
        show_all(trainer)
        place = folder_of(trainer)
    finally:
        logger.experiment.finish()
    assert place.parent == tmp_path / "p" and (place / "samples.html").exists()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (run / "files/videoalign/config.yaml").read_text() == "seed: 1\n"
    rows, kinds = history(run), {}
    for row in rows:
        kinds |= {key: value for key, value in row.items() if isinstance(value, dict)}
    assert {key: kind["_type"] for key, kind in kinds.items()} == {
        "val/text": "html-file", "config": "html-file", "val/table": "table-file", "val/figure": "image-file",
        "val/image": "image-file", "val/histogram": "histogram", "val/clip": "video-file",
    }  # fmt: skip
    assert "&lt;script&gt;" in (run / "files" / kinds["val/text"]["path"]).read_text()
    assert json.loads((run / "files" / kinds["val/table"]["path"]).read_text())["data"] == TABLE[1:]
    assert len(read_film(str(run / "files" / kinds["val/clip"]["path"]))) == SIZE[0]
    assert EVIL.split()[-1] in kinds["val/clip"]["caption"]
    assert all(row["trainer/global_step"] == 0 for row in rows)


def records(run) -> list:
    """What an offline run has written so far. Its file is a log of LevelDB with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = glob.glob(str(run / "*.wandb"))
    content, place, found, whole = open(path, "rb").read(), 7, [], b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # blocks end in padding
            place += left
            continue
        size, kind = struct.unpack_from("<4xHB", content, place)
        if place + 7 + size > len(content):  # it is being written
            break
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def history(run) -> list[dict]:
    """What an offline run has logged: values by name. W&B's own process ends the file after `finish` has returned."""
    end = time.monotonic() + 60
    while not (found := records(run)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, "the run's file has no end"
        time.sleep(0.05)
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    read: list[dict] = []
    for row in rows:
        read.append({})
        for item in row:
            name, *inside = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            read[-1][name] = {**read[-1].get(name, {}), inside[0]: value} if inside else value
    return read


def test_several_loggers_get_the_same_and_others_are_named_once(tmp_path, monkeypatch):
    monkeypatch.setattr(media_file, "_SAID", set())
    trainer = trainer_of(CSVLogger(tmp_path, "one"), DummyLogger(), TensorBoardLogger(tmp_path, "two"))
    with pytest.warns(UserWarning, match="DummyLogger gets numbers only") as said:
        for _ in range(2):
            media_of(trainer).text("a", "b")
    assert len([one for one in said if "numbers only" in str(one.message)]) == 1
    trainer.loggers[2].experiment.flush()
    found = EventAccumulator(trainer.loggers[2].log_dir, size_guidance={"tensors": 0}).Reload()
    assert len(found.Tensors("a/text_summary")) == 2 and (tmp_path / "one/version_0/media/a/000000.md").exists()
    assert media_of(trainer_of()) is None


def test_tensorboard_hides_what_nobody_asked_for(tmp_path):
    trainer = own_folders(trainer_of(TensorBoardLogger(tmp_path, "run")))
    trainer.logger.log_metrics(metrics={"epoch": 1, "train/loss": 2.0}, step=3)
    trainer.logger.log_hyperparams({"a": 1})
    trainer.logger.experiment.flush()
    assert set(EventAccumulator(trainer.logger.log_dir).Reload().Tags()["scalars"]) == {"vitals/epoch", "train/loss"}


def test_mp4_of_any_size_keeps_its_pictures(tmp_path):
    for height, width in ((9, 13), (8, 8), (1, 2)):
        frames = film()[:, :height, :width]
        (tmp_path / "a.mp4").write_bytes(mp4(frames, 3.5))
        found = read_film(str(tmp_path / "a.mp4"))
        assert found.shape == (4, height + height % 2, width + width % 2, 3)
        assert np.abs(found[:, :height, :width].astype(int) - frames).mean() < 8
    shorter = Clip({"a": film()[:2], "b": film()}, 4.0)
    assert len(drawn(shorter)) == 4  # it stays on its last frame


@pytest.mark.parametrize(
    ("logger", "words"),
    [
        ("class_path: lightning.pytorch.loggers.CometLogger", "pip install 'comet-ml"),
        ("{class_path: lightning.pytorch.loggers.MLFlowLogger, init_args: {save_dir: ml}}", "MLFLOW_ALLOW_FILE_STORE"),
    ],
)
def test_a_logger_that_cannot_begin_is_one_line(logger, words, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    config = tmp_path / "c.yaml"
    config.write_text(f"""
trainer:
  accelerator: cpu
  logger:
    {logger}
model: {{class_path: lightning.pytorch.demos.boring_classes.BoringModel}}
data: {{class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}}
""")
    read_config(str(config))
    assert call("fit", "--config", config) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert words in lines[-1] and len([line for line in lines if "rror" in line]) == 1 and len(lines) < 4
