"""A generator family, a judge and a benchmark from outside: docs/examples/extras, by import path and installed."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, T5EncoderModel

import bench_kit
from generator_kit import encode_config, flow_config, node
from helpers import call, flags, randn, strict_json
from videoalign import VideoAlignError
from videoalign.commands.judge import named
from videoalign.commands.lightning_cli import run as experiment
from videoalign.datamodules.shards import ShardSet
from videoalign.models.benchmark_protocols import PROTOCOLS, BenchmarkProtocol
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.generator_folder import GENERATORS, load_generator
from videoalign.models.registry import Registry

EXTRAS = Path(__file__).parents[1] / "docs" / "examples" / "extras"
FAMILY, JUDGE = "videoalign_extras.mochi:Mochi", "videoalign_extras.clip_judge:ClipJudge"
TEAM = "videoalign_extras.team_benchmark:TEAM"
SIZE = {"num_frames": 7, "height": 32, "width": 32, "fps": 8, "steps": 4}
CLIP = {"num_frames": 7, "height": 32, "width": 32, "fps": 8.0}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing of another test is imported."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "videoalign_extras"]:
        del sys.modules[name]


@pytest.fixture(params=["by import path", "installed"])
def extras(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The package on the Python path, with or without the entry points that pip writes; whether they are there."""
    monkeypatch.syspath_prepend(EXTRAS)
    if request.param == "installed":
        install(tmp_path / "site", monkeypatch, tomllib.loads((EXTRAS / "pyproject.toml").read_text())["project"])
    return request.param == "installed"


def install(site: Path, monkeypatch: pytest.MonkeyPatch, project: dict) -> None:
    """Write what an installation leaves beside a package: its name, version and entry points."""
    folder = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(site)


@pytest.fixture(scope="module")
def mochi(tmp_path_factory: pytest.TempPathFactory, generators: Path) -> Path:
    """A miniature Mochi: the text encoder of a miniature LTX-Video, and parts of its own."""
    ltx, folder = generators / "ltx", tmp_path_factory.mktemp("mochi") / "pipeline"
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        add_attention_block=(False,) * 5,
    )
    transformer = MochiTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=32,
        text_embed_dim=32,
        time_embed_dim=16,
    )
    encoder = T5EncoderModel.from_pretrained(ltx / "text_encoder")
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    tokenizer = AutoTokenizer.from_pretrained(ltx / "tokenizer")
    MochiPipeline(scheduler, vae, encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


# --- a generator family -----------------------------------------------------------------------------------------------


def test_the_family_follows_our_conventions(extras: bool, mochi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator(mochi, family=None if extras else FAMILY)
    truth = randn(2, *generator.latent_shape(7, 32, 32))
    noise = randn(*truth.shape, seed=1)

    def ideal(
        hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor, *args, **kwargs
    ) -> tuple:
        t = 1 - (timestep / 1000).view(-1, 1, 1, 1, 1)
        return ((truth - hidden_states) / t,)  # data - noise, on the path between them

    assert type(generator).__module__ == "videoalign_extras.mochi"
    condition = generator.condition(generator.encode_prompts(["a red circle", "a blue square"]))
    real = generator.sample(condition, noise, 2)
    assert real.shape == truth.shape and real.isfinite().all()
    monkeypatch.setattr(generator.transformer, "forward", ideal)
    torch.testing.assert_close(generator.sample(condition, noise, 4), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        generator.velocity(0.3 * truth + 0.7 * noise, torch.full((2,), 0.7), condition), noise - truth
    )
    assert generator.identity()["family"] == "videoalign_extras.mochi.Mochi"


def test_the_family_is_encoded_trained_and_sampled(extras: bool, mochi: Path, clips: Path, tmp_path: Path) -> None:
    family = {} if extras else {"family": FAMILY}
    encoding = {"model": family, "clip": CLIP}
    config = encode_config(tmp_path / "e.yaml", mochi, clips / "pairs", tmp_path / "latents", **encoding)
    experiment(["predict", "--config", str(config)])
    assert ShardSet(tmp_path / "latents").index.latents["family"] == "videoalign_extras.mochi.Mochi"
    exported = node("videoalign.callbacks.ExportGenerator", out=tmp_path / "lora")
    experiment(
        ["fit", "--config", str(flow_config(tmp_path / "f.yaml", mochi, tmp_path / "latents", [exported], **family))]
    )
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = {"generator": mochi, "prompts": tmp_path / "prompts.txt", **SIZE, "device": "cpu", **family}
    assert call("generate", *flags(**given, out=tmp_path / "base")) == 0
    assert call("generate", *flags(**given, out=tmp_path / "tuned", lora=tmp_path / "lora")) == 0
    (base,), (tuned,) = (list(ShardSet(tmp_path / name)) for name in ("base", "tuned"))
    assert base.members["mp4"] != tuned.members["mp4"]
    assert base.record()["prompt"] == "a red circle"


def test_a_pipeline_without_a_family_is_refused(
    mochi: Path,
    generators: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = {"generator": mochi, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "out", **SIZE}
    assert call("generate", *flags(**given)) == 2
    error = capsys.readouterr().err
    assert "generator family 'MochiPipeline' is not one of WanPipeline, " in error
    assert "entry point of the group videoalign.generators; or name its class under family" in error
    assert call("generate", *flags(**given, family="videoalign_extras.mochi:Mochi")) == 2
    assert "cannot be imported (ModuleNotFoundError" in (error := capsys.readouterr().err) and "PYTHONPATH" in error
    monkeypatch.syspath_prepend(EXTRAS)
    with pytest.raises(VideoAlignError, match="is a WanPipeline, but family Mochi is for pipelines of MochiPip"):
        load_generator(generators / "wan", family=FAMILY)
    config = flow_config(tmp_path / "f.yaml", mochi, latents / "wan", family=FAMILY)
    assert call("fit", "--config", config) == 2
    assert "holds latents of another generator (family: Wan, here videoalign_extras" in capsys.readouterr().err


def test_a_folder_imports_nothing_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "evil:Family", "_diffusers_version": "0.1"}')
    with pytest.raises(VideoAlignError, match="generator family 'evil:Family' is not one of"):
        load_generator(tmp_path)
    assert "evil" not in sys.modules


# --- a judge and a benchmark ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, generators: Path) -> Path:
    """A miniature CLIP with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(generators / "wan" / "tokenizer")
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    videos = bench_kit.samples((9, 9, 12, 9, 8, 9, 9, 9, 9, 9))
    return bench_kit.write(tmp_path_factory.mktemp("rated") / "ours", videos, bench_kit.rated(10))


def test_bench_measures_a_judge_under_a_benchmark(
    extras: bool, clip: Path, rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    judge, protocol = ("clip", "team-benchmark") if extras else (JUDGE, TEAM)
    given = ("bench", "--data", rated, "--out", tmp_path / "out", "--judge", judge)
    assert call(*given, "--judge-args", f"model={clip}", "frames=4", "--benchmark", protocol) == 0
    text = capsys.readouterr().out
    assert f"Our team's benchmark: 45 pairs of 10 videos, rated by CLIP {clip}; overall is TA" in text
    assert "last year's model" in text and "61.50" in text and "the team's report of March" in text
    found = strict_json(tmp_path / "out" / "ours.json")
    ratings = strict_json(tmp_path / "out" / "ours" / "ratings.json")
    rows = [row for row in ShardSet(rated).table("pairs.csv") if row["Overall"] in "AB" and row["Overall"]]
    right = sum(
        ((ratings[row["key_A"]]["TA"] > ratings[row["key_B"]]["TA"]) == (row["Overall"] == "A")) for row in rows
    )
    assert found["accuracies"]["Overall"]["without_ties"] == pytest.approx(right / len(rows))
    assert found["protocol"] == protocol and found["overall"] == "TA" and found["sampling"] is None
    assert call(*given, "--judge-args", f"model={clip}", "frames=4") == 0
    assert "ours: 45 pairs of 10 videos" in capsys.readouterr().out


def test_a_benchmark_of_ones_own_sets_the_frames_of_a_reward_model(
    extras: bool, rated: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    protocol = "team-benchmark" if extras else TEAM
    given = ("bench", "--data", rated, "--out", tmp_path / "out", "--model", judge, "--device", "cpu", "--workers", 0)
    assert call(*given, "--benchmark", protocol) == 0
    assert "4 fps, at most 102400 pixels (320 x 320); overall is TA" in capsys.readouterr().out


def test_compare_takes_a_judge_and_a_family_by_name(extras: bool, clip: Path, mochi: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    init = {"name": "clip" if extras else JUDGE, "args": {"model": str(clip), "frames": 2}}
    config = {
        "generator": str(mochi),
        "prompts": str(tmp_path / "prompts.txt"),
        "out": str(tmp_path / "out"),
        "sampling": {**SIZE, "batch_size": 2},
        "samples": 2,
        "device": "cpu",
        "judges": {"clip": {"class_path": "videoalign.commands.judge.named", "init_args": init}},
        **({} if extras else {"family": FAMILY}),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert call("compare", "--config", tmp_path / "c.yaml") == 0
    found = strict_json(tmp_path / "out" / "comparison.json")
    assert found["judge"] == "clip" and set(found["arms"]["base"]["means"]["clip"]) == {"VQ", "MQ", "TA", "Overall"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--judge", "x.y:Z", "--model", "m"), "bench measures one judge"),
        ((), "name a reward model by --model, or another judge by --judge"),
        (("--model", "m", "--judge-args", "a=1"), "--judge-args are of a judge"),
        (("--judge", "x.y:Z", "--dtype", "float32"), "--dtype is of reward models"),
        (("--judge", "x.y:Z"), "judge 'x.y:Z': x.y:Z cannot be imported"),
        (("--judge", "nobody"), "judge 'nobody' is not offered by any installed package"),
        (("--judge", "math:pi"), "math:pi is a float, but must be a class"),
        (("--judge", "fractions:Fraction"), "judge 'fractions:Fraction' is a Fraction, which has no name, check()"),
        (("--judge", JUDGE, "--judge-args", "size=1"), "cannot be constructed with {'size': 1}"),
        (("--judge", JUDGE, "--judge-args", "model"), "takes KEY=VALUE"),
    ],
)
def test_judges_that_are_none_are_refused(
    options: tuple[str, ...],
    why: str,
    rated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(EXTRAS)
    assert call("bench", "--data", rated, "--out", tmp_path / "out", *options) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_judge_that_forgets_a_dimension_is_refused(
    rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "halves.py").write_text(
        "import torch\n"
        "class Half:\n"
        "    name = 'half a judge'\n"
        "    def __init__(self, value=0.0): self.value = value\n"
        "    def check(self, prompts, sampling): pass\n"
        "    def rate_set(self, videos, keys, folder):\n"
        "        names = ('VQ', 'MQ', 'TA')[: 3 if self.value else 2]\n"
        "        return {d: torch.full((len(keys),), self.value) for d in names}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ("bench", "--data", rated, "--out", tmp_path / "out", "--judge", "halves.Half")
    assert call(*given) == 2
    assert "(half a judge) does not give one number per video" in capsys.readouterr().err
    assert call(*given, "--judge-args", "value=.nan") == 2
    assert "are not finite: 10 tensors" in capsys.readouterr().err
    assert call(*given, "--judge-args", "value=1.0", "--min-pixels", "0") == 2
    assert "--min-pixels is of reward models" in capsys.readouterr().err


def test_the_page_shows_the_files_whole() -> None:
    page = (EXTRAS.parents[1] / "howto" / "extend.md").read_text()
    files = [EXTRAS / "pyproject.toml", *sorted((EXTRAS / "videoalign_extras").glob("[!_]*.py"))]
    assert len(files) == 4
    for file in files:
        kind = {".py": "python", ".toml": "toml"}[file.suffix]
        assert f"```{kind}\n{file.read_text().rstrip()}\n```" in page, f"docs/howto/extend.md shows another {file.name}"


# --- the registry -----------------------------------------------------------------------------------------------------


def test_names_that_two_packages_claim_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXTRAS)
    points = {"videoalign.generators": {"MochiPipeline": FAMILY, "WanPipeline": FAMILY}}
    install(tmp_path / "one", monkeypatch, {"name": "one", "version": "1.0", "entry-points": points})
    with pytest.raises(VideoAlignError, match=r"'WanPipeline' is offered by videoalign itself and one 1\.0 \(videoa"):
        GENERATORS["WanPipeline"]
    assert GENERATORS["MochiPipeline"].__name__ == "Mochi"
    assert GENERATORS["videoalign.models.wan.Wan"].__name__ == "Wan"
    install(tmp_path / "two", monkeypatch, {"name": "two", "version": "2.0", "entry-points": points})
    with pytest.raises(
        VideoAlignError, match=r"offered by (one 1\.0|two 2\.0) .* and (one 1\.0|two 2\.0) .*import path"
    ):
        GENERATORS["MochiPipeline"]


def test_what_a_package_offers_wrongly_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_offer.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = {"broken": "broken_offer:X", "odd": "math:pi", "absent": "math:nothing"}
    project = {"name": "offers", "version": "3.1", "entry-points": {"videoalign.benchmarks": points}}
    install(tmp_path / "site", monkeypatch, project)
    assert list(PROTOCOLS) == ["videogen-rewardbench", "genai-bench", "broken", "odd", "absent"]
    with pytest.raises(VideoAlignError, match=r"'broken', an entry point of offers 3\.1 .*No module named 'nothing_of"):
        PROTOCOLS["broken"]
    with pytest.raises(VideoAlignError, match=r"'odd', an entry point of offers 3\.1 .* must be a BenchmarkProtocol"):
        PROTOCOLS["odd"]
    with pytest.raises(VideoAlignError, match=r"'absent', .*AttributeError"):
        PROTOCOLS["absent"]
    with pytest.raises(VideoAlignError, match=r"'genaibench' is not one of .* \(did you mean genai-bench\?\)"):
        PROTOCOLS["genaibench"]
    assert PROTOCOLS["genai-bench"].overall == "TA"


def test_a_registry_of_nothing_says_so() -> None:
    empty = Registry("videoalign.nothing", "thing", {}, callable, "callable")
    assert len(empty) == 0 and "x" not in empty
    with pytest.raises(VideoAlignError, match="thing 'x' is not offered by any installed package"):
        empty["x"]


@pytest.mark.parametrize(
    "change",
    [{"overall": "best"}, {"columns": ()}, {"columns": ("VQ", "beauty")}, {"published": {"MQ": {"x": (1.0, 2.0)}}}],
)
def test_a_protocol_that_cannot_be_scored_is_refused(change: dict) -> None:
    sound = {"title": "Ours", "sampling": FrameSampling(), "overall": "sum", "columns": ("VQ",)}
    assert BenchmarkProtocol(**sound).published == {}
    with pytest.raises(VideoAlignError, match="benchmark Ours: "):
        BenchmarkProtocol(**{**sound, **change})


def test_a_judge_is_given_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXTRAS)
    judge = named(JUDGE, {"model": "somewhere", "frames": 4})
    assert judge.name == "CLIP somewhere" and judge.sampling.num_frames == 4
