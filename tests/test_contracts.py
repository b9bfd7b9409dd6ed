"""Contracts between modules, DataModules and callbacks: who fulfils them, and what a wrong partner is told."""

import inspect
import re
from types import SimpleNamespace

import lightning as L
import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader

from helpers import FEW_TOKENS
from videoalign import VideoAlignError
from videoalign.alignment import (
    CacheReference,
    DiffusionNFT,
    EncodeLatents,
    FlowDPO,
    FlowIPO,
    FlowRWR,
    FlowSFT,
    Generate,
    NoisyRewardModel,
    RewardBackprop,
    RewardModel,
)
from videoalign.callbacks import (
    ExamplePairs,
    ExportGenerator,
    ExportReward,
    GroupExtremes,
    HeldOutPrompts,
    ReliabilityDiagram,
    RewardBench,
    SideBySide,
    WinRate,
    WriteParts,
)
from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.datamodules import contracts
from videoalign.datamodules.contracts import OFFERED_BY, missing, offers, require
from videoalign.datamodules.encode_list import ClipSize, EncodeList
from videoalign.datamodules.latent_files import NULL
from videoalign.datamodules.latents import LatentPairs
from videoalign.datamodules.pairs import VideoPairs
from videoalign.datamodules.prompt_groups import PromptGroups
from videoalign.datamodules.prompts import Prompts
from videoalign.datamodules.reference_errors import ReferenceDraws
from videoalign.datamodules.shards import ShardWriter, sha256
from videoalign.datamodules.video_list import VideoList
from videoalign.miniature.networks.autoencoding import Autoencoding
from videoalign.miniature.networks.captioning import Captioning
from videoalign.miniature.networks.captions import Captions
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.world.rendered_sets import WorldSize, write_world
from videoalign.models import VideoReward
from videoalign.models.function_scores import FunctionScores
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.reward_statistics import Statistics

QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "num_sanity_val_steps": 0, "enable_checkpointing": False, "max_steps": 1, "limit_val_batches": 1,
}  # fmt: skip
SAMPLING = Sampling(num_frames=5, height=32, width=32, steps=1)
SMALL = LoRA(rank=4, alpha=8, targets=["to_q"])
PROTOCOLS = {
    name: kind for name, kind in vars(contracts).items() if inspect.isclass(kind) and kind in contracts.OFFERED_BY
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, backbone):
    """Folders of a set of pairs, of videos, of latents, of a generator, and a list of prompts."""
    root = tmp_path_factory.mktemp("contracts")
    size = WorldSize(train=4, val=4, benchmark_videos=6, benchmark_pairs=4, captions=4, clips=4)
    for _ in write_world(root / "world", size, seed=3):
        pass
    make_generator(root / "wan", "wan", hidden=48, heads=4, max_tokens=FEW_TOKENS)
    generator = load_generator(str(root / "wan"))
    with ShardWriter(root / "latents", "latents", media="safetensors") as writer:
        writer.index.latents = {**generator.identity(), "of": "pairs"}
        for i in range(4):
            tensors = {side: torch.randn(16, 2, 4, 4) for side in "ab"} | {"prompt": torch.randn(3, 32)}
            rewards = {
                "A": dict.fromkeys(("VQ", "MQ", "TA"), float(i + 1)),
                "B": dict.fromkeys(("VQ", "MQ", "TA"), 0.0),
            }
            record = {"prompt": "a circle", "rewards": rewards, "labels": dict.fromkeys(("VQ", "MQ", "TA"), "A")}
            writer.write(f"k{i}", {"": safetensors.torch.save(tensors)}, record)
        (writer.path / NULL).write_bytes(safetensors.torch.save({"prompt": torch.randn(1, 32)}))
        writer.index.tables[NULL] = sha256(writer.path / NULL)
    (root / "prompts.txt").write_text("a red circle moves\n")
    noisy = NoisyReward(load_generator(str(root / "wan")), NoisyRewardShape(blocks=1, hidden=8))
    noisy.statistics = Statistics([0.5] * 3, [1.5] * 3)
    noisy.save_pretrained(root / "noisy_reward")
    return SimpleNamespace(
        root=root,
        backbone=str(backbone),
        world=root / "world",
        wan=str(root / "wan"),
        latents=str(root / "latents"),
        prompts=str(root / "prompts.txt"),
    )


@pytest.fixture(scope="module")
def built(files, sampling):
    """Makes each module and DataModule once, by its class."""
    clip = ClipSize(num_frames=5, height=32, width=32)
    makers = {
        RewardModel: lambda: RewardModel(VideoReward(files.backbone, "plain", sampling, language="full")),
        Captioning: lambda: Captioning(files.backbone, str(files.root / "captioned"), sampling),
        **{
            kind: lambda kind=kind: kind(generator=files.wan, lora=SMALL)
            for kind in (FlowSFT, FlowDPO, FlowIPO, FlowRWR)
        },
        DiffusionNFT: lambda: DiffusionNFT(
            generator=files.wan, lora=SMALL, rewards={"r": FunctionScores("builtins:len")}, sampling=SAMPLING
        ),
        RewardBackprop: lambda: RewardBackprop(str(files.root / "noisy_reward"), generator=files.wan, lora=SMALL),
        PromptGroups: lambda: PromptGroups(files.prompts, groups=1, samples=2),
        CacheReference: lambda: CacheReference(files.wan),
        NoisyRewardModel: lambda: NoisyRewardModel(files.wan, NoisyRewardShape(blocks=1, hidden=8)),
        EncodeLatents: lambda: EncodeLatents(files.wan),
        Generate: lambda: Generate(files.wan, 5, 32, 32),
        Autoencoding: lambda: Autoencoding(files.wan, str(files.root / "autoencoded")),
        VideoPairs: lambda: pairs(files),
        LatentPairs: lambda: latents(files),
        EncodeList: lambda: EncodeList(str(files.world / "clips"), str(files.root / "encoded"), clip),
        Prompts: lambda: Prompts(files.prompts, str(files.root / "sampled")),
        ReferenceDraws: lambda: ReferenceDraws(files.latents, str(files.root / "reference")),
        VideoList: lambda: VideoList([], [], 0),
        Captions: lambda: Captions(str(files.world / "captions"), batch_size=2, workers=0),
    }
    made = {}

    def build(kind):
        if kind not in made:
            made[kind] = makers[kind]()
        return made[kind]

    return build


def pairs(files, **options):
    options = {"batch_size": 2, "workers": 0, "benchmarks": {"recent": str(files.world / "recent")}, **options}
    return VideoPairs(str(files.world / "train"), str(files.world / "val"), **options)


def latents(files, **options):
    return LatentPairs(files.latents, files.latents, **{"batch_size": 2, "workers": 0, **options})


def trainer(*callbacks, **options):
    return L.Trainer(**{**QUIET, **options, "callbacks": list(callbacks)})


# --- the Protocols ----------------------------------------------------------------------------------------------------

ALIGNING = (FlowSFT, FlowDPO, FlowIPO, FlowRWR, DiffusionNFT, RewardBackprop, CacheReference)
MEANT = {
    "HasProcessor": (RewardModel, Captioning),
    "ScoresPairs": (RewardModel,),
    "LearnsFromRatings": (RewardModel, NoisyRewardModel),
    "MeasuresStatistics": (RewardModel,),
    "HasCalibration": (RewardModel, NoisyRewardModel),
    "HasRewardNetwork": (RewardModel, NoisyRewardModel),
    "HasGenerator": (*ALIGNING, NoisyRewardModel, EncodeLatents, Generate, Autoencoding),
    "AlignsGenerator": ALIGNING,
    "TrainsTransformer": ALIGNING,
    "HasReferenceErrors": ALIGNING,
    "RollsOut": (DiffusionNFT,),
    "ShowsRollout": (DiffusionNFT,),
    "HasRewards": (DiffusionNFT,),
    "DescribesSamples": (EncodeLatents, Generate),
    "HasExtraFiles": (EncodeLatents, Generate),
}
OFFERED_BY_DATA = {
    "HasExamples": (RewardModel, VideoPairs),
    "HasBenchmarks": (RewardModel, VideoPairs),
    "HasNullPrompt": (FlowSFT, LatentPairs),
    "HasPromptScores": (FlowSFT, LatentPairs),
    "DrawsGroups": (DiffusionNFT, PromptGroups),
    "EncodesVideos": (EncodeLatents, EncodeList),
    "HasPrompts": (EncodeLatents, EncodeList),
    "SavesReference": (CacheReference, ReferenceDraws),
    "HasParts": (EncodeLatents, EncodeList),
}
OF_NETWORKS = {"RewardNetwork", "HasBackbone"}
OF_LOADERS = {"NamesBenchmark"}
OF_REWARDS = {"ScoresVideos"}


def test_every_contract_is_tested_and_documented():
    assert PROTOCOLS.keys() == MEANT.keys() | OFFERED_BY_DATA.keys() | OF_NETWORKS | OF_LOADERS | OF_REWARDS
    for name, contract in PROTOCOLS.items():
        assert inspect.getdoc(contract) and OFFERED_BY[contract].startswith("a "), name
        assert missing(object(), contract), f"{name} asks for nothing"


@pytest.mark.parametrize("name", MEANT)
def test_modules_fulfil_their_contracts_and_others_do_not(name, built):
    every = {kind for kinds in MEANT.values() for kind in kinds}
    if name == "HasRewardNetwork":  # Captioning has a network too; that it is no reward's, the next contract tells
        every.remove(Captioning)
    for kind in every:
        assert offers(built(kind), PROTOCOLS[name]) == (kind in MEANT[name]), kind


@pytest.mark.parametrize("name", OFFERED_BY_DATA)
def test_datamodules_fulfil_their_contracts_once_they_are_set_up(name, built):
    module, data = (built(kind) for kind in OFFERED_BY_DATA[name])
    stage = "fit" if data.__class__ in (VideoPairs, LatentPairs) else "predict"
    data.trainer = trainer()
    data.trainer.strategy._lightning_module = module
    data.setup(stage)
    assert not missing(data, PROTOCOLS[name])
    assert not offers(VideoList([], [], 0), PROTOCOLS[name])


def test_networks_and_loaders_fulfil_theirs(files, built):
    reward, noisy = built(RewardModel).network, built(NoisyRewardModel).network
    assert offers(reward, contracts.RewardNetwork) and offers(noisy, contracts.RewardNetwork)
    assert offers(reward, contracts.HasBackbone) and not offers(noisy, contracts.HasBackbone)
    data = pairs(files)
    data.trainer = trainer()
    data.trainer.strategy._lightning_module = built(RewardModel)
    data.setup("fit")
    assert [require(one, contracts.NamesBenchmark, "x").benchmark for one in data.val_dataloader()] == [None, "recent"]
    assert not offers(DataLoader([1]), contracts.NamesBenchmark)


def test_prompts_and_generate_belong_together(files, built):
    data = built(Prompts)
    data.trainer = trainer()
    data.trainer.strategy._lightning_module = built(Generate)
    data.setup("predict")
    assert offers(data, contracts.HasParts)


# --- what is missing --------------------------------------------------------------------------------------------------


class Some:
    """Has two parts of AlignsGenerator, one of them of the wrong kind."""

    name = "here"
    as_reference = None


def test_the_message_names_the_asker_the_class_the_parts_and_the_choice():
    assert missing(Some(), contracts.AlignsGenerator) == ["generator", "as_reference()"]
    with pytest.raises(VideoAlignError) as error:
        require(Some(), contracts.AlignsGenerator, "callbacks.WinRate")
    assert str(error.value) == (
        "callbacks.WinRate needs a module that aligns a generator (FlowSFT or a subclass); "
        "Some has no generator, as_reference()"
    )
    with pytest.raises(VideoAlignError, match=r"x needs a DataModule of latents .*, but the Trainer was given none"):
        require(None, contracts.HasNullPrompt, "x")
    assert not offers(None, contracts.HasNullPrompt)


def test_submodules_and_properties_count():
    """Torch gives submodules through ``__getattr__``, past which ``isinstance`` looks on newer Pythons."""
    module = torch.nn.Module()
    module.generator = torch.nn.Linear(1, 1)
    assert "generator" not in vars(module) and offers(module, contracts.HasGenerator)
    assert require(module, contracts.HasGenerator, "x") is module


# --- wrong partners, through a real Trainer ---------------------------------------------------------------------------


def refused(run, *words):
    with pytest.raises(VideoAlignError) as error:
        run()
    assert all(word in str(error.value) for word in words), str(error.value)


def win_rate(files):
    return WinRate("nowhere", files.prompts, SAMPLING)


CALLBACKS = {
    "SideBySide": (lambda files: SideBySide(["a"], SAMPLING), "fit", RewardModel, "FlowSFT"),
    "WinRate": (win_rate, "test", RewardModel, "FlowSFT"),
    "ExportGenerator": (lambda files: ExportGenerator(), "fit", RewardModel, "FlowSFT"),
    "HeldOutPrompts": (lambda files: HeldOutPrompts(files.prompts, SAMPLING), "fit", RewardModel, "FlowSFT"),
    "GroupExtremes": (lambda files: GroupExtremes(), "fit", RewardModel, "OnPolicy"),
    "ExportReward": (lambda files: ExportReward(), "fit", FlowSFT, "RewardModel, NoisyRewardModel"),
    "ReliabilityDiagram": (lambda files: ReliabilityDiagram(), "fit", FlowSFT, "RewardModel, NoisyRewardModel"),
    "ExamplePairs": (lambda files: ExamplePairs(), "fit", FlowSFT, "RewardModel"),
    "RewardBench": (lambda files: RewardBench(), "validate", NoisyRewardModel, "RewardModel"),
    "WriteParts": (lambda files: WriteParts(), "predict", CacheReference, "EncodeLatents, Generate"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_refuse_other_modules(name, files, built):
    make, stage, kind, instead = CALLBACKS[name]
    data = pairs(files) if kind is RewardModel else latents(files)
    run = getattr(trainer(make(files)), stage)
    refused(lambda: run(built(kind), data), f"callbacks.{name} needs", instead, f"{kind.__name__} has no")


def test_a_backbone_is_copied_of_networks_that_have_one(files, built):
    run = trainer(ExportReward(str(files.root / "out"), backbone=True))
    words = "callbacks.ExportReward with backbone: true", "VideoReward", "NoisyReward has no backbone"
    refused(lambda: run.fit(built(NoisyRewardModel), latents(files)), *words)
    assert not (files.root / "out").exists()


def test_a_network_that_is_no_rewards_is_not_exported_as_one(files, built):
    data = Captions(str(files.world / "captions"), batch_size=2, workers=0)
    words = "callbacks.ExportReward needs a network", "VideoReward or NoisyReward", "has no record"
    refused(lambda: trainer(ExportReward()).fit(built(Captioning), data), *words)


class Held(L.LightningDataModule):
    """Somebody's own DataModule: loaders, and nothing else that anyone asks for."""

    def train_dataloader(self):
        return DataLoader([1])

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.mark.parametrize(
    "callback, kind, stage, part",
    [
        (RewardBench(), RewardModel, "fit", "benchmarks"),
        (RewardBench(), RewardModel, "test", "benchmarks"),
        (ExamplePairs(), RewardModel, "fit", "examples()"),
        (WriteParts(), EncodeLatents, "predict", "parts, allowed_drops"),
    ],
)
def test_callbacks_refuse_other_datamodules(callback, kind, stage, part, built):
    run = getattr(trainer(callback), stage)
    refused(lambda: run(built(kind), Held()), f"callbacks.{type(callback).__name__} needs", f"Held has no {part}")


def test_callbacks_refuse_loaders_without_a_datamodule(built):
    run = trainer(RewardBench())
    refused(lambda: run.validate(built(RewardModel), DataLoader([1])), "callbacks.RewardBench", "was given none")


@pytest.mark.parametrize(
    "data, kind, stage, instead, part",
    [
        (VideoPairs, FlowDPO, "fit", "RewardModel", "processor"),
        (VideoList, EncodeLatents, "predict", "RewardModel", "processor"),
        (Captions, Autoencoding, "fit", "RewardModel", "processor"),
        (LatentPairs, RewardModel, "fit", "FlowSFT", "generator"),
        (ReferenceDraws, RewardModel, "predict", "FlowSFT", "generator"),
        (EncodeList, RewardModel, "predict", "EncodeLatents", "generator"),
        (EncodeList, CacheReference, "predict", "EncodeLatents", "making()"),
        (Prompts, CacheReference, "predict", "Generate", "making()"),
    ],
)
def test_datamodules_refuse_other_modules(data, kind, stage, instead, part, built):
    run = getattr(trainer(), stage)
    words = f"{data.__name__} needs a module", instead, f"{kind.__name__} has no {part}"
    refused(lambda: run(built(kind), built(data)), *words)


def test_cached_errors_need_a_module_with_a_reference(files, built):
    data = latents(files, reference="nowhere")
    words = "LatentPairs with data.reference", "FlowSFT", "NoisyRewardModel has no reference_made()"
    refused(lambda: trainer().fit(built(NoisyRewardModel), data), *words)


class OfAnother(Held):
    """Stands for another DataModule, which the reward's DataModule would be for a generator."""


@pytest.mark.parametrize(
    "kind, stage, part",
    [
        (FlowRWR, "fit", "prompt_scores(), has_rewards()"),
        (EncodeLatents, "predict", "kind, precision"),
        (CacheReference, "predict", "save()"),
    ],
)
def test_modules_refuse_other_datamodules(kind, stage, part, built):
    run = getattr(trainer(), stage)
    refused(lambda: run(built(kind), OfAnother()), f"{kind.__name__} needs", f"OfAnother has no {part}")


def test_the_empty_prompt_is_asked_for_only_where_it_is_used(files):
    model = FlowSFT(generator=files.wan, lora=SMALL, null_share=0.5)
    refused(lambda: trainer().fit(model, Held()), "FlowSFT with model.null_share", "LatentPairs", "Held has no null")
    refused(lambda: trainer().fit(model, DataLoader([1])), "FlowSFT with model.null_share", "was given none")
    trainer().fit(model, latents(files))


# --- users' own -------------------------------------------------------------------------------------------------------


class OwnReward(L.LightningModule):
    """Inherits nothing of this package; has what VideoPairs and ReliabilityDiagram ask for."""

    def __init__(self, model):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.processor, self.calibration, self.batches = model.processor, model.calibration, 0

    def training_step(self, batch, batch_idx):
        self.batches += len(batch["inputs"]) > 0
        return self.weight.square()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert batch["valid"].any()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_of_a_users_own_trains_on_pairs(files, built):
    model = OwnReward(built(RewardModel))
    trainer(ReliabilityDiagram()).fit(model, pairs(files))
    assert model.batches == 1


class OwnSFT(FlowSFT):
    """A subclass, with a ``setup`` that does not call its parent's."""

    def setup(self, stage):
        self.seen = stage


class OwnLatents(L.LightningDataModule):
    """Hands on another's batches, and knows the empty prompt's embedding from its ``setup`` on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def setup(self, stage):
        self.inner.trainer = self.trainer
        self.inner.setup(stage)
        self.null = self.inner.null

    def train_dataloader(self):
        return self.inner.train_dataloader()


@pytest.mark.parametrize("kind", [FlowSFT, OwnSFT])
def test_subclasses_and_datamodules_of_a_users_own_pass(kind, files, tmp_path):
    model = kind(generator=files.wan, lora=SMALL, null_share=0.5)
    show = SideBySide(["a"], SAMPLING)
    trainer(show, ExportGenerator(str(tmp_path / "out"))).fit(model, OwnLatents(latents(files)))
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


class OwnAligner(L.LightningModule):
    """Has a generator, a name and a reference, by other means than FlowSFT."""

    def __init__(self, folder):
        super().__init__()
        self.generator, self.name = load_generator(folder), folder

    def as_reference(self):
        return self.generator.without_adapters()

    def test_step(self, batch, batch_idx):
        """Nothing to do."""


def test_an_aligning_module_of_a_users_own_passes_the_checks_of_win_rates(files):
    run = trainer(win_rate(files))
    with pytest.raises(Exception, match="nowhere"):  # the reward model, which is read when the test has ended
        run.test(OwnAligner(files.wan), DataLoader([1]))


def test_plain_loaders_are_of_held_out_pairs(files, built):
    """A reward model validates on batches of a user's own loader, which names no benchmark."""
    data, model = pairs(files), built(RewardModel)
    data.trainer = trainer()
    data.trainer.strategy._lightning_module = model
    data.setup("validate")
    held_out, benchmark = data.val_dataloader()
    run = trainer(limit_val_batches=1.0)
    (plain,) = run.validate(model, DataLoader(list(held_out), batch_size=None), verbose=False)
    assert plain["val/num_pairs"] == 4 and model.has_held_out()
    (named,) = run.validate(model, held_out, verbose=False)
    assert named == plain
    run.validate(model, benchmark, verbose=False)
    assert not model.has_held_out()


class Listening(OwnReward):
    """A module that sets in ``setup`` what its DataModule has asked for before."""

    def __init__(self, model):
        super().__init__(model)
        self.kept = self.processor
        del self.processor

    def setup(self, stage):
        self.processor = self.kept


def test_what_a_datamodule_asks_for_must_be_there_before_setup(files, built):
    words = re.escape("VideoPairs needs a module whose network reads videos and prompts")
    with pytest.raises(VideoAlignError, match=f"{words}.*Listening has no processor"):
        trainer().fit(Listening(built(RewardModel)), pairs(files))
