"""`videoalign push`: what is published can be loaded from an empty cache, is one commit, and says what it is."""

import json
import shutil
import time

import pytest
from diffusers import WanPipeline
from huggingface_hub import DatasetCard, ModelCard, snapshot_download
from safetensors import safe_open

from bench_kit import samples
from generator_kit import ALIGNMENT, CALLBACKS, PROMPTS, flow_config, node
from helpers import call, files, json_lines
from hub_kit import READER, TOKEN, forget
from loading_kit import flip
from test_hub import closed_port, point_at
from videoalign.commands.cards import sealed, untouched
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.models import load_reward
from videoalign.models.adapter_files import METADATA
from videoalign.models.hub import resolved


@pytest.fixture
def allowed(reached, monkeypatch, backbone):
    """A hub that knows this machine's token, and holds the backbone."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    reached.add("ORG/backbone", backbone)
    return reached


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Forgets everything, as another machine would; gives the stand-in an empty cache."""

    def move(hub, name="other"):
        forget()
        point_at(hub.url, tmp_path / name, monkeypatch)

    return move


def push(folder, to, *options):
    return call("push", folder, "--to", to, *options)


def scores(model, kit, tmp_path, capsys):
    (tmp_path / "v.mp4").write_bytes(samples((9,))[0].content)
    capsys.readouterr()
    given = ("--video", tmp_path / "v.mp4", "--prompt", "a red circle", "--device", "cpu", "--workers", 0)
    assert call("score", "--model", model, *given) == 0
    (line,) = json_lines(capsys)
    return {name: line[name] for name in ("VQ", "MQ", "TA", "Overall")}


# --- reward models --------------------------------------------------------------------------------------------------


def test_a_published_reward_model_gives_the_same_rewards(allowed, kit, tmp_path, capsys, elsewhere):
    want = scores(kit / "model", kit, tmp_path, capsys)
    assert push(kit / "model", "ORG/reward", "--base", "ORG/backbone", "--license", "apache-2.0") == 0
    assert "published: " in capsys.readouterr().out
    published = allowed.files("ORG/reward")
    assert published.keys() == files(kit / "model").keys() | {"README.md", ".gitattributes"}
    elsewhere(allowed)
    assert scores("ORG/reward", kit, tmp_path, capsys) == want
    model = load_reward("hf://ORG/reward@main")
    model.save_pretrained(tmp_path / "again")
    record = json.loads((tmp_path / "again" / "reward.json").read_text())
    assert record["backbone"] == "ORG/backbone"
    commit = allowed.repos["model", "ORG/backbone"].branches["main"]
    assert record["backbone_revision"] == commit
    allowed.add("ORG/backbone", {"config.json": b"broken since"})
    forget()
    assert load_reward(tmp_path / "again").backbone_revision == commit  # what it was trained on, not what came later


def test_what_is_published_again_makes_no_commit(allowed, kit, capsys):
    given = (kit / "model", "ORG/reward", "--base", "ORG/backbone")
    assert push(*given) == 0 and push(*given) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert len(allowed.repos["model", "ORG/reward"].commits) == 2  # the hub's own first one, and ours
    assert push(*given, "--license", "mit") == 0
    assert len(allowed.repos["model", "ORG/reward"].commits) == 3


def test_a_backbone_that_nobody_else_has_is_refused(allowed, kit, capfd):
    assert push(kit / "model", "ORG/reward") == 2
    said = capfd.readouterr().err
    assert "a folder of this machine that nobody else has" in said and "--base ORG/NAME" in said
    assert ("model", "ORG/reward") not in allowed.repos


def test_a_backbone_inside_travels_along(allowed, kit, tmp_path, capsys, elsewhere):
    load_reward(kit / "model").save_pretrained(tmp_path / "whole", backbone=True)
    assert push(tmp_path / "whole", "ORG/whole") == 0
    assert "brings its backbone along" in allowed.files("ORG/whole")["README.md"].decode()
    elsewhere(allowed)
    assert scores("ORG/whole", kit, tmp_path, capsys) == scores(kit / "model", kit, tmp_path, capsys)


def test_the_card_of_a_reward_model(allowed, kit, finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(kit / "model", run / "export")
    with ShardWriter(tmp_path / "my pairs", "pairs") as writer:
        for clip in samples((5, 9)):
            writer.write(clip.key, {"a": clip.content, "b": clip.content}, {"prompt": "p", "labels": {"VQ": "A"}})
    config = {
        "model": node(f"{ALIGNMENT}.RewardModel", loss="btt", theta=5.0, optimizer=node("torch.optim.AdamW", lr=2e-6)),
        "data": {"init_args": {"train": str(tmp_path / "my pairs"), "batch_size": 4}},
        "trainer": {"max_epochs": 2, "max_steps": -1},
    }
    (run / "config.yaml").write_text(json.dumps(config))
    metrics = finished().out / "world.json"
    given = ("--base", "ORG/backbone@main", "--base-license", "other", "--license", "cc-by-4.0", "--metrics", metrics)
    assert push(run / "export", "ORG/reward", *given, "--card-only", tmp_path / "card.md") == 0
    assert allowed.log == []
    text = (tmp_path / "card.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.base_model == "ORG/backbone"
    assert {r.metric_name for r in card.data.eval_results} >= {"accuracy without ties, VQ", "accuracy with ties, TA"}
    found = json.loads(metrics.read_text())["accuracies"]["VQ"]
    low, high = found["interval"]
    for said in (
        f"{found['without_ties']:.3f} ({low:.3f} to {high:.3f})"
        if low is not None
        else f"| {found['without_ties']:.3f} |",
        "my pairs: 2 pairs",
        "| learning rate | 2e-06 |",
        "| theta | 5.0 |",
        "has the licence other",
        "| mean | 1.0 | 2.0 | 3.0 |",
    ):
        assert said in text, said
    assert str(tmp_path) not in text and str(kit) not in text
    with_data = ("--data", "hf://datasets/ORG/pairs", "--data", tmp_path / "my pairs", "--card-only", "-")
    capsys.readouterr()
    assert push(run / "export", "ORG/reward", "--base", "ORG/backbone", *with_data) == 0
    card = ModelCard(capsys.readouterr().out)
    assert card.data.datasets == ["ORG/pairs"]
    assert (card.data.license, card.data["license_name"]) == ("other", "not-stated")
    assert "No licence is stated" in card.text

    # the lines on the card are a program
    allowed.add("ORG/reward", kit / "model")
    (tmp_path / "V.mp4").write_bytes(samples((9,))[0].content)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert names["rewards"].shape == (1, 3)


# --- adapters -------------------------------------------------------------------------------------------------------


def test_a_card_replaces_no_file(kit, tmp_path, capsys):
    (tmp_path / "mine.md").write_text("precious")
    assert push(kit / "model", "ORG/x", "--card-only", tmp_path / "mine.md") == 2
    assert "mine.md exists already; name a new file" in capsys.readouterr().err
    assert (tmp_path / "mine.md").read_text() == "precious"


def test_adapters_name_the_generator_on_the_hub(allowed, generators, latents, tmp_path, elsewhere):
    commit = allowed.add("ORG/wan", generators / "wan")
    export = node(f"{CALLBACKS}.ExportGenerator", out=tmp_path / "lora")
    none = {"limit_val_batches": 0}
    assert (
        call("fit", "--config", flow_config(tmp_path / "f.yaml", "ORG/wan", latents / "wan", [export], trainer=none))
        == 0
    )
    assert not [line for line in allowed.asked("text_encoder/") if "resolve" in line]  # training needs none
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        stated = json.loads(file.metadata()[METADATA])
    assert stated["transformer.base_model_name_or_path"] == "ORG/wan" and stated["transformer.revision"] == commit
    assert push(tmp_path / "lora", "ORG/lora", "--revision", "v1") == 0
    card = ModelCard(allowed.files("ORG/lora", branch="v1")["README.md"].decode())
    assert card.data.base_model == "ORG/wan" and card.data["base_model_relation"] == "adapter"
    assert f'from_pretrained("ORG/wan", revision="{commit}")' in card.text
    assert 'load_lora_weights("ORG/lora", revision="v1")' in card.text
    assert "README.md" not in allowed.files("ORG/lora")
    elsewhere(allowed)
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    sizes = "--num-frames 5 --height 32 --width 32 --steps 1 --device cpu --prompts".split()
    for name, lora in (("a", tmp_path / "lora"), ("b", "ORG/lora@v1")):
        given = ("--generator", "ORG/wan", "--lora", lora, "--out", tmp_path / name, "--source", "x")
        assert call("generate", *given, *sizes, tmp_path / "prompts.txt") == 0
    one, other = ({raw.key: raw.members["mp4"] for raw in ShardSet(tmp_path / name)} for name in "ab")
    assert one == other
    pipe = WanPipeline.from_pretrained(resolved("ORG/wan"))
    pipe.load_lora_weights(resolved("ORG/lora@v1"))
    assert pipe.get_active_adapters()


def test_adapters_of_an_unknown_generator_say_so(allowed, generators, latents, tmp_path, capfd):
    export = node(f"{CALLBACKS}.ExportGenerator", out=tmp_path / "lora")
    config = flow_config(
        tmp_path / "f.yaml", generators / "ltx", latents / "ltx", [export], trainer={"limit_val_batches": 0}
    )
    assert call("fit", "--config", config) == 0
    capfd.readouterr()
    assert push(tmp_path / "lora", "ORG/lora") == 0
    said = capfd.readouterr().err
    assert "name it with --base" in said and "states no licence" in said
    text = allowed.files("ORG/lora")["README.md"].decode()
    assert "is not named in the files" in text and str(generators) not in text
    assert str(generators).encode() not in allowed.files("ORG/lora")["pytorch_lora_weights.safetensors"]


# --- data sets ------------------------------------------------------------------------------------------------------


def test_a_published_set_is_sound_where_it_is_fetched(allowed, kit, elsewhere, capsys, tmp_path):
    assert push(kit / "world", "ORG/world", "--license", "cc-by-4.0") == 0
    repo = allowed.files("ORG/world", "dataset")
    assert repo.keys() == files(kit / "world").keys() | {"README.md", ".gitattributes"}
    card = DatasetCard(repo["README.md"].decode())
    assert card.data.size_categories == "n<1K" and card.data.license == "cc-by-4.0"
    assert "8 videos and 21 rated pairs of them" in card.text and "| maker-0 |" not in card.text
    elsewhere(allowed)
    folder = snapshot_download("ORG/world", repo_type="dataset", local_dir=tmp_path / "here")
    assert call("shards", "verify", folder) == 0
    capsys.readouterr()
    exec(card.text.partition("```python\n")[2].partition("```")[0], {})
    assert len(capsys.readouterr().out.splitlines()) == 4  # of the first shard


def votes(*choices):
    rows = [
        {"annotator": f"person-{i:03d}", "choices": {"VQ": c}, "flags": [], "review": False}
        for i, c in enumerate(choices)
    ]
    return rows


def pairs(folder, count=3):
    with ShardWriter(folder, "pairs", per_shard=1) as writer:
        for number, clip in enumerate(samples((5,) * count)):
            record = {"prompt": f"p{number}", "labels": {"VQ": "A"}, "sources": {"A": "ours", "B": "theirs|x"}}
            record["votes"] = votes("A", "A", "B")
            writer.write(f"{number}", {"a": clip.content, "b": clip.content}, record)
    return folder


def test_agreement_and_masks_are_on_the_card(allowed, tmp_path):
    for split in ("train", "validation"):
        pairs(tmp_path / "round" / split)
    alone = pairs(tmp_path / "alone")
    card = {
        "exported": {"train": 3, "validation": 3},
        "agreement": {
            "VQ": {"alpha": 0.61234, "raw": 0.75, "ties": 0.1, "votes": 18},
            "TA": {"alpha": None, "raw": None},
        },
        "votes": 18,
        "people": [{"name": "person-001", "votes": 9}, {"name": "person-002", "votes": 9}, {"name": "x", "votes": 0}],
        "masks": [{"source": "theirs", "box": [0, 0, 10, 10]}],
    }
    (tmp_path / "round" / "card.json").write_text(json.dumps(card))
    (tmp_path / "round" / "notes.txt").write_text("nobody's business")
    assert push(tmp_path / "round", "ORG/round") == 0
    repo = allowed.files("ORG/round", "dataset")
    assert {"card.json", "train/index.json", "validation/000002.tar"} <= repo.keys() and "notes.txt" not in repo
    text = repo["README.md"].decode()
    for said in ("18 votes of 2 people", "| VQ | 0.612 | 0.750 | 0.100 | 18 |", "watermarks of theirs", r"theirs\|x"):
        assert said in text, said
    assert {s["split"] for s in DatasetCard(text).data["configs"][0]["data_files"]} == {"train", "validation"}
    assert push(tmp_path / "round" / "train", "ORG/train") == 0
    assert "| VQ | 0.612" in allowed.files("ORG/train", "dataset")["README.md"].decode()
    assert push(alone, "ORG/alone") == 0
    assert "| VQ | 0.333 | 9 |" in allowed.files("ORG/alone", "dataset")["README.md"].decode()


def test_what_an_earlier_publication_left_is_removed(allowed, tmp_path, elsewhere):
    assert push(pairs(tmp_path / "three"), "ORG/pairs") == 0
    allowed.add("ORG/pairs", allowed.files("ORG/pairs", "dataset") | {"docs/picture.png": b"png"}, "dataset")
    assert push(pairs(tmp_path / "two", 2), "ORG/pairs") == 0
    repo = allowed.files("ORG/pairs", "dataset")
    assert "000002.tar" not in repo and "000002.parquet" not in repo and "docs/picture.png" in repo


# --- cards that people wrote ----------------------------------------------------------------------------------------


def test_a_card_that_somebody_wrote_stays(allowed, tmp_path, capfd):
    data = pairs(tmp_path / "pairs")
    assert push(data, "ORG/pairs") == 0
    made = allowed.files("ORG/pairs", "dataset")["README.md"].decode()
    assert untouched(made) and not untouched(made.replace("WebDataset", "Nice")) and untouched(sealed("x\n"))
    edited = allowed.files("ORG/pairs", "dataset") | {"README.md": b"my own words"}
    allowed.add("ORG/pairs", edited, "dataset")
    assert push(data, "ORG/pairs", "--license", "mit") == 0
    assert allowed.files("ORG/pairs", "dataset")["README.md"] == b"my own words"
    assert "stays; --new-card replaces it" in capfd.readouterr().err
    assert push(data, "ORG/pairs", "--license", "mit", "--new-card") == 0
    assert "license: mit" in allowed.files("ORG/pairs", "dataset")["README.md"].decode()
    (data / "README.md").write_text("# Mine\n")
    assert push(data, "ORG/pairs") == 0
    assert allowed.files("ORG/pairs", "dataset")["README.md"] == b"# Mine\n"


# --- refusals -------------------------------------------------------------------------------------------------------


def damaged_model(kit, tmp_path):
    flip(shutil.copytree(kit / "model", tmp_path / "bad") / "trained.safetensors")
    return tmp_path / "bad"


def damaged_set(kit, tmp_path):
    path = shutil.copytree(kit / "world", tmp_path / "bad") / "000001.tar"
    flip(path)
    return tmp_path / "bad"


def lacking(name, source):
    def make(kit, tmp_path):
        (shutil.copytree(kit / source, tmp_path / "bad") / name).unlink()
        return tmp_path / "bad"

    return make


@pytest.mark.parametrize(
    "make, why",
    [
        (damaged_model, "is not the file that was exported"),
        (damaged_set, "its SHA-256 differs"),
        (lacking("template.txt", "model"), "template.txt is missing"),
        (lacking("000000.tar", "world"), "000000.tar"),
        (lambda kit, tmp_path: tmp_path / "none", "there is no such folder to publish"),
        (lambda kit, tmp_path: tmp_path, "is nothing that can be published"),
    ],
    ids=["model damaged", "set damaged", "model not whole", "set not whole", "no folder", "something else"],
)
def test_what_is_not_whole_is_refused(make, why, allowed, kit, tmp_path, capfd):
    assert push(make(kit, tmp_path), "ORG/bad", "--base", "ORG/backbone") == 2
    said = capfd.readouterr().err
    assert why in said and "Traceback" not in said and allowed.asked("repos/create") == []


@pytest.mark.parametrize(
    "token, to, why",
    [
        ("", "ORG/x", "has no token that may write there"),
        ("hf_Unknown", "ORG/x", "does not know this machine's token"),
        (READER, "ORG/x", "may not write there"),
        (TOKEN, "closed/x", "may not write there"),
        (TOKEN, "x", "as ORG/NAME"),
        (TOKEN, "ORG/x/y", "as ORG/NAME"),
        (TOKEN, "ORG/x@v1", "--revision v1"),
    ],
)
def test_who_may_not_write_is_told(token, to, why, reached, kit, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    assert push(kit / "world", to) == 2
    said = capfd.readouterr().err
    assert why in said and "Traceback" not in said and (not token or token not in said)
    assert reached.repos == {}


def test_a_public_repository_does_not_get_what_is_private(allowed, kit, capfd):
    assert push(kit / "world", "ORG/world") == 0
    assert push(kit / "world", "ORG/world", "--private") == 2
    assert "is public already, so nothing was sent" in capfd.readouterr().err
    assert push(kit / "world", "ORG/secret", "--private") == 0
    assert allowed.repos["dataset", "ORG/secret"].private


def test_nothing_is_published_half(allowed, kit, monkeypatch, capfd):
    assert push(kit / "world", "ORG/other") == 0
    allowed.uploaded.clear()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for fault in ("/uploads/", "/commit/"):
        allowed.refused = fault
        assert push(kit / "world", "ORG/world") == 2
        assert "nothing was published" in capfd.readouterr().err
        assert allowed.files("ORG/world", "dataset").keys() == {".gitattributes"}
    allowed.refused = ""
    sent = len(allowed.asked("PUT"))
    assert push(kit / "world", "ORG/world") == 0
    assert len(allowed.asked("PUT")) == sent  # what had arrived is not sent again


def test_a_hub_that_does_not_answer(allowed, kit, tmp_path, monkeypatch, capfd):
    point_at(closed_port(), tmp_path / "home", monkeypatch)
    begun = time.monotonic()
    assert push(kit / "world", "ORG/world") == 2
    assert "cannot be reached" in capfd.readouterr().err and time.monotonic() - begun < 3


@pytest.mark.parametrize(
    "content, why", [("{}", "is no result"), ('{"arms": {}}', "lacks something"), ("[", "cannot be read")]
)
def test_metrics_of_another_kind_are_refused(content, why, kit, tmp_path, capfd):
    (tmp_path / "m.json").write_text(content)
    given = ("--metrics", tmp_path / "m.json", "--card-only", "-")
    assert push(kit / "world", "ORG/x", *given) == 2
    assert why in capfd.readouterr().err


def test_win_rates_are_on_the_card(allowed, kit, tmp_path, capsys):
    row = {"win_rate": 0.7, "win_rate_interval": [0.6, 0.8], "superiority": 0.65, "superiority_interval": [None, None]}
    columns = dict.fromkeys(("VQ", "MQ", "TA", "Overall"), row)
    tested = {"columns": columns, "drift": 0.1, "samples": 2, "reward_model": "/home/me/r", "prompts": ["a", "b"]}
    arms = {"base": {}, "tuned": {"against_base": {"reward model": columns}}}
    compared = {"arms": arms, "judge": "reward model", "prompts": 12, "samples": 4}
    for name, found in (("win_rate", tested), ("comparison", compared)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    given = [word for name in ("win_rate", "comparison") for word in ("--metrics", tmp_path / f"{name}.json")]
    assert push(kit / "model", "ORG/x", "--base", "ORG/backbone", *given, "--card-only", "-") == 0
    card = ModelCard(capsys.readouterr().out)
    assert "| same noise | 0.700 (0.600 to 0.800)" in card.text and "| other noise | 0.650 |" in card.text
    assert "| tuned | reward model | 0.700 (0.600 to 0.800)" in card.text and "/home/me" not in card.text
    assert ("win rate of tuned over its base, reward model", 0.7) in {
        (r.metric_name, r.metric_value) for r in card.data.eval_results
    }
