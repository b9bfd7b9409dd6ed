"""A wrong configuration: one message with file and line or option, the key, and what to write instead."""

import re
import shutil
from pathlib import Path

import pytest

import videoalign
from helpers import call
from videoalign import VideoAlignError
from videoalign.commands import lightning_cli
from videoalign.commands.config_faults import explained, faults, read_settings, unknown
from videoalign.commands.lightning_cli import ExperimentCLI
from videoalign.commands.settings import parsed

ROOT = Path(lightning_cli.__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
TINY = ("--config", str(EXPERIMENTS / "debug/tiny.yaml"))
DPO = ("--config", str(EXPERIMENTS / "flow/wan_sft.yaml"), "--config", str(EXPERIMENTS / "flow/wan_dpo.yaml"))


class Keys(Exception):
    """Carries the keys that a command takes out of the CLI's constructor."""


class Parsers(ExperimentCLI):
    """Stops when the parsers are there."""

    def parse_arguments(self, parser, args):
        raise Keys(self.keys_of(args[0]))


@pytest.fixture(scope="module")
def keys():
    """Keys of a command, each command's parser being built once."""
    built = {}

    def of(name):
        if name not in built:
            with pytest.raises(Keys) as found:
                lightning_cli.run([name], Parsers)
            (built[name],) = found.value.args
        return built[name]

    return of


FILES = {
    "unknown key of the trainer": (
        "trainer:\n  max_step: 3\n",
        r"line 2: trainer.max_step is not a key.*mean max_steps\?",
    ),
    "unknown key at the top": ("modle:\n  init_args: {}\n", r"line 1: modle is not a key; did you mean model\?"),
    "unknown key with an empty value": ("trainr: {}\n", r"line 1: trainr is not a key; did you mean trainer\?"),
    "unknown key of the model": (
        "model:\n  init_args:\n    lerning_rate: 3\n",
        r"line 3: model.init_args.lerning_rate is no parameter of RewardModel; choose one of compile, .*loss, network",
    ),
    "unknown key of the data": (
        "data:\n  init_args:\n    batchsize: 3\n",
        r"line 3: .*VideoPairs; did you mean batch_size\?",
    ),
    "unknown key of a part": (
        "model:\n  init_args:\n    network:\n      init_args:\n        bakbone: x\n",
        r"line 5: model.init_args.network.init_args.bakbone is no parameter of VideoReward; did you mean backbone\?",
    ),
    "unknown key of a dataclass": (
        "model:\n  init_args:\n    network:\n      init_args:\n        sampling: {fsp: 3}\n",
        r"line 5: .*sampling.fsp is no parameter of FrameSampling; did you mean fps\?",
    ),
    "unknown key of the optimizer": (
        "model:\n  init_args:\n    optimizer:\n      init_args: {lrr: 0.1}\n",
        r"line 4: .*optimizer.init_args.lrr is no parameter of AdamW; did you mean lr\?",
    ),
    "unknown key of a callback": (
        "trainer:\n  callbacks:\n  - ReliabilityDiagram\n  - class_path: ExportReward\n    init_args: {outt: x}\n",
        r"line 5: trainer.callbacks.1.init_args.outt is no parameter of ExportReward; did you mean out\?",
    ),
    "unknown key of a logger": (
        "trainer:\n  logger:\n    init_args: {savedir: x}\n",
        r"line 3: .*did you mean save_dir\?",
    ),
    "parameter beside class_path": (
        "model:\n  class_path: RewardModel\n  theta: 3.0\n",
        r"line 3: model.theta stands beside class_path; parameters of a class stand under init_args",
    ),
    "short name that is not there": (
        "model:\n  class_path: FlowDPOO\n",
        r"line 2: model.class_path .*did you mean FlowDPO\?",
    ),
    "long name that is not there": (
        "model:\n  class_path: videoalign.alignment.FlowDPOO\n",
        r"line 2: .*videoalign.alignment has no FlowDPOO; did you mean FlowDPO\?",
    ),
    "module that is not there": (
        "model:\n  class_path: videoalign.alignmet.FlowDPO\n",
        r"line 2: .*videoalign has no alignmet; did you mean alignment\?",
    ),
    "package that is not there": (
        "model:\n  class_path: nopackage.FlowDPO\n",
        r"line 2: .*there is no module nopackage; install",
    ),
    "module that needs a package": (
        "model:\n  class_path: needy.Model\n",
        r"line 2: .*needy cannot be imported: No module named 'absent'",
    ),
    "module with an error": (
        "model:\n  class_path: broken.Model\n",
        r"line 2: .*broken cannot be imported: ZeroDivisionError",
    ),
    "class of another kind": (
        "model:\n  class_path: videoalign.datamodules.pairs.VideoPairs\n",
        r"line 2: .*VideoPairs, which is no LightningModule; choose one of .*RewardModel",
    ),
    "no class": (
        "model:\n  class_path: videoalign.models.files\n",
        r"line 2: .*videoalign.models.files, which is no class",
    ),
    "callback that is not there": (
        "trainer:\n  callbacks:\n  - ExportRewrd\n",
        r"line 3: trainer.callbacks.0 .*did you mean ExportReward\?",
    ),
    "optimizer that is not there": (
        "model:\n  init_args:\n    optimizer:\n      class_path: torch.optim.AdamWW\n",
        r"line 4: .*torch.optim has no AdamWW; did you mean AdamW\?",
    ),
    "data that are not there": (
        "data:\n  class_path: VideoPair\n",
        r"line 2: data.class_path .*did you mean VideoPairs\?",
    ),
    "text for a whole number": (
        "data:\n  init_args:\n    batch_size: many\n",
        r"line 3: .*batch_size must be a whole number, got 'many'",
    ),
    "fraction for a whole number": (
        "trainer:\n  max_steps: 1.5\n",
        r"line 2: trainer.max_steps must be a whole number, got 1.5",
    ),
    "text for a number": ("model:\n  init_args:\n    theta: five\n", r"line 3: .*theta must be a number, got 'five'"),
    "list for a number": ("model:\n  init_args:\n    theta: [1, 2]\n", r"line 3: .*theta must be a number, got a list"),
    "mapping for a number": (
        "model:\n  init_args:\n    theta: {a: 1}\n",
        r"line 3: .*theta must be a number, got keys \(a\)",
    ),
    "text for a switch": (
        "data:\n  init_args:\n    swap: perhaps\n",
        r"line 3: .*swap must be true or false, got 'perhaps'",
    ),
    "value that is no choice": (
        "model:\n  init_args:\n    loss: bttt\n",
        r"line 3: .*must be one of btt, bt, reg, got 'bttt'; did you mean btt\?",
    ),
    "precision that is no choice": (
        "trainer:\n  precision: bf17\n",
        r"line 2: trainer.precision must be one of .*; did you mean bf16\?",
    ),
    "strategy that is no choice": (
        "trainer:\n  strategy: dpp\n",
        r"line 2: trainer.strategy is 'dpp', which is unknown; did you mean ddp\?",
    ),
    "accelerator that is no choice": (
        "trainer:\n  accelerator: gpuu\n",
        r"line 2: trainer.accelerator is 'gpuu', which is unknown; did you mean gpu\?",
    ),
    "number for an object": (
        "model:\n  init_args:\n    network: 3\n",
        r"line 3: .*network must be a VideoReward .*, got 3",
    ),
    "number for a list": ("trainer:\n  callbacks: 3\n", r"line 2: trainer.callbacks must be a list"),
    "number for the model": ("model: 3\n", r"line 1: model must be a LightningModule"),
    "number for the trainer": ("trainer: 3\n", r"line 1: trainer holds settings by key, not 3"),
    "nothing for the trainer": ("trainer:\n", r"line 1: trainer holds settings by key, not None"),
    "text for init_args": ("data:\n  init_args: x\n", r"line 2: data.init_args holds parameters by name, not 'x'"),
    "seed that is none": (
        "seed_everything: yes please\n",
        r"line 1: seed_everything must be true or false or a whole number",
    ),
    "unknown key of the command": ("ckpt_pth: last\n", r"line 1: ckpt_pth is not a key; did you mean ckpt_path\?"),
    "unknown key behind a merge": (
        "x: &x\n  max_step: 3\ntrainer:\n  <<: *x\n",
        r"line 1: x is not a key|line 2: trainer.max_step",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file(name, keys, tmp_path, monkeypatch):
    content, words = FILES[name]
    (tmp_path / "wrong.yaml").write_text(content)
    (tmp_path / "needy.py").write_text("import absent\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    message = explained([*TINY, "--config", "wrong.yaml"], keys("fit"))
    said(message, f"^wrong.yaml, {words}")


def said(message, words):
    """One or two sentences of this kind."""
    assert re.search(words, message), message
    # twenty names at most: classes of other tests in this process are among those to choose from
    assert "\n" not in message and len(message) < 500, message
    for jargon in ("NestedArg", "Namespace", "<class", "typing.", "NoneType"):
        assert jargon not in message, message


OPTIONS = {
    "unknown option": (
        "--trainer.max_step 3",
        r"^--trainer.max_step is not an option of fit; did you mean --trainer.max_steps\?",
    ),
    "abbreviated option": (
        "--trainer.max_st 3",
        r"^--trainer.max_st is not an option of fit; did you mean --trainer.max_steps\?",
    ),
    "abbreviated config": ("--conf x.yaml", r"^--conf is not an option of fit; did you mean --config\?"),
    "unknown parameter": (
        "--data.batchsize=3",
        r"^--data.batchsize is no parameter of VideoPairs; did you mean batch_size\?",
    ),
    "unknown parameter under init_args": (
        "--data.init_args.batchsize 3",
        r"^--data.init_args.batchsize is no parameter of VideoPairs",
    ),
    "unknown class": ("--model RewardModl", r"^--model .*did you mean RewardModel\?"),
    "unknown callback": ("--trainer.callbacks+=EarlyStoping", r"^--trainer.callbacks\+ .*did you mean EarlyStopping\?"),
    "wrong type": ("--data.batch_size many", r"^--data.batch_size must be a whole number, got 'many'"),
    "wrong type in braces": ("--data={init_args:{batch_size:many}}", r"--data"),
    "no choice": ("--model.loss bttt", r"^--model.loss must be one of btt, bt, reg, got 'bttt'; did you mean btt\?"),
    "file without --config": ("x.yaml", r"^x.yaml belongs to no option; write --config x.yaml"),
    "word": ("now", r"^now belongs to no option"),
    "config without a file": ("--config", r"^--config needs a file behind it"),
    "parameter of a part": (
        "--model.network.bakbone x",
        r"^--model.network.bakbone is no parameter of VideoReward; did you mean backbone\?",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_option(name, keys):
    options, words = OPTIONS[name]
    said(explained([*TINY, *options.split()], keys("fit")), words)


def test_what_is_missing_is_named_behind_what_is_wrong(keys, tmp_path):
    said(
        explained(["--model", "RewardModel"], keys("fit")),
        r"^--model.network must be set: RewardModel needs a VideoReward",
    )
    said(explained(["--model", "RewardModel", "--model.loss", "x"], keys("fit")), r"^--model.loss must be one of")
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  class_path: FlowDPO\n")
    said(explained(["--config", str(path)], keys("fit")), r"a.yaml, line 1: model.init_args.generator must be set")


def test_the_file_that_holds_the_key_is_named(keys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text("data:\n  init_args:\n    batch_size: many\n")
    Path("second.yaml").write_text("trainer:\n  max_epochs: 2\n")
    args = [*TINY, "--config", "first.yaml", "--config=second.yaml"]
    said(explained(args, keys("fit")), "^first.yaml, line 3: data.init_args.batch_size")
    Path("second.yaml").write_text("data:\n  init_args:\n    batch_size: 4\n")
    said(explained(args, keys("fit")), "^first.yaml, line 3: ")  # the parser refuses it before it reads the second file


def test_parameters_of_a_replaced_class_are_no_fault(keys, tmp_path):
    """The parser leaves out what the new class does not take; what it does take is still looked at."""
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  class_path: FlowIPO\n")
    assert explained([*DPO, "--config", str(path)], keys("fit")) == ""
    said(
        explained([*DPO, "--model.beta.betta", "3"], keys("fit")),
        r"^--model.beta.betta is no parameter of ConstantBeta",
    )
    said(explained([*DPO, "--model.lora.rank", "x"], keys("fit")), r"^--model.lora.rank must be a whole number")
    path.write_text("model: {init_args: {beta: {class_path: ConstantBet}}}\n")
    said(explained([*DPO, "--config", str(path)], keys("fit")), r"beta.class_path .*did you mean ConstantBeta\?")


def test_a_short_name_of_two_classes_asks_for_the_path(keys, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("import lightning as L\nclass TwiceThere(L.LightningModule):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("one"), __import__("two")
    message = explained(["--model", "TwiceThere", "--data", "VideoPairs"], keys("fit"))
    said(message, r"2 classes; give the whole path: one.TwiceThere or two.TwiceThere")


def command_of(path):
    words = path.read_text().splitlines()[0].removeprefix("# videoalign ").split()
    return [str(ROOT / word) if word.startswith("experiments/") else word for word in words]


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_experiments_have_no_fault(path, keys):
    """What is said only after a refusal must not be wrong itself."""
    name, *args = command_of(path)
    if name == "compare":
        pytest.skip("parsed by a function's parser")
    settings = read_settings([str(arg) for arg in args], ())
    found = [str(fault) for fault in faults(settings, keys(name), "") if not fault.missing]
    assert not found
    assert not list(unknown(settings, keys(name)))


def test_keys_are_found_with_their_lines():
    settings = parsed("a: 1\nb:\n  c: [x,\n    {d: 1e-3}]\n", "f.yaml, line ")
    assert settings.value["b"].value["c"].place == "f.yaml, line 3"
    inner = settings.value["b"].value["c"].value[1].value["d"]
    assert (inner.place, inner.value) == ("f.yaml, line 4", 1e-3)


# --- the command line itself ------------------------------------------------------------------------------------------

COMMANDS = {
    "unknown command": ("fti --config x", r"there is no command fti; did you mean fit\?"),
    "unknown command of a group": ("shards inf x", r"there is no command inf; did you mean info\?"),
    "group alone": ("shards", r"name a command; choose one of .*import-csv"),
    "unknown option": ("score --modle x", r"there is no option --modle; did you mean --model\?"),
    "abbreviated option": ("score --mod x --video y --prompt z", r"there is no option --mod; did you mean --model\?"),
    "no choice": ("score --model x --device gpuu", r"--device: 'gpuu' is unknown; did you mean gpu\?"),
    "missing option": ("bench --model x", r"these are needed: --data"),
    "too much": ("shards info x y", r"y belongs to no option"),
    "help of nothing": ("help fti", r"there is no command fti; did you mean fit\?"),
    "fit alone": ("fit", r"fit needs an experiment(.|\n)*experiments/debug/tiny.yaml +Tests the training"),
    "predict alone": ("predict", r"predict needs an experiment(.|\n)*experiments/encode/wan.yaml"),
    "no such file": ("fit --config none.yaml", r"--config none.yaml .*No such file"),
    "a folder": ("fit --config folder", r"--config folder .*Is a directory"),
    "empty": ("fit --config empty.yaml", r"--config empty.yaml is empty"),
    "syntax": ("fit --config syntax.yaml", r"--config syntax.yaml, line 2 is no YAML: "),
    "tab": ("fit --config tab.yaml", r"--config tab.yaml, line 2 is no YAML: a tab stands where only spaces may"),
    "key twice": ("fit --config twice.yaml", r"twice.yaml, line 3: the key 'max_steps' occurs twice"),
    "compare, option": (
        "compare --config experiments/sprites/compare.yaml --promts x",
        r"--promts .*did you mean --prompts\?",
    ),
    "compare, key": (
        "compare --config samplin.yaml",
        r"samplin.yaml, line 1: samplin is not a key; did you mean sampling\?",
    ),
    "compare, judge": (
        "compare --config experiments/sprites/compare.yaml --config judge.yaml",
        r"judge.yaml, line 2: judges.a.class_path .*RewardJudg",
    ),
    "fit, nothing of use": ("fit --trainer.max_steps 3", r"data, model must be set: in a file behind --config"),
    "fit, option": (
        "fit --config experiments/debug/tiny.yaml --trainer.max_step 3",
        r"did you mean --trainer.max_steps\?",
    ),
    "fit, empty value": (
        "fit --config experiments/debug/tiny.yaml --config empty_value.yaml",
        r"empty_value.yaml, line 1: trainr is not a key",
    ),
    "fit, strategy": (
        "fit --config experiments/debug/tiny.yaml --trainer.strategy dpp",
        r"--trainer.strategy .*did you mean ddp\?",
    ),
    "fit, checkpoint": (
        "fit --config experiments/debug/tiny.yaml --ckpt_path folder/x.ckpt",
        r"folder/x.ckpt: there is no such file; folder holds last.ckpt",
    ),
    "fit, reward that is none": (
        "fit --config experiments/flow/wan_on_policy.yaml --config rewards.yaml --data.prompts p.txt",
        r"rewards.yaml, line 4: .*rewards.x.class_path names torch.nn.Identity, which is no ScoresVideos: "
        "it has no check, place",
    ),
    "fit, name of a reward that is no text": (
        "fit --config experiments/flow/wan_on_policy.yaml --config numbered.yaml --data.prompts p.txt",
        r"numbered.yaml, line 4: model.init_args.rewards.1 is a key that YAML reads as no text; put it in quotes",
    ),
    "fit, no reward behind a name": (
        "fit --config experiments/flow/wan_on_policy.yaml --config nothing.yaml --data.prompts p.txt",
        r"nothing.yaml, line 4: model.init_args.rewards.x must be a ScoresVideos .*, got null",
    ),
    "fit, parameter of a reward": (
        "fit --config experiments/flow/wan_on_policy.yaml --data.prompts p.txt --model.rewards.x.class_path "
        "videoalign.models.function_scores.FunctionScores",
        r"--model.rewards.x.function must be set: FunctionScores needs text",
    ),
    "fit, reward with other types": (
        "fit --config experiments/flow/wan_on_policy.yaml --data.prompts p.txt --model.rewards.x untyped.Scores",
        r"error: rewards: untyped.Scores has a method whose arguments or types are not those of ScoresVideos",
    ),
    "validate, last": (
        "validate --config experiments/debug/tiny.yaml --model.network.backbone backbone --ckpt_path last",
        r"--ckpt_path last: there is no checkpoint in runs/debug/tiny yet",
    ),
}
CONTENT = {
    "empty.yaml": "",
    "syntax.yaml": "a: 1\n b: 2\n",
    "tab.yaml": "a:\n\tb: 1\n",
    "twice.yaml": "trainer:\n  max_steps: 1\n  max_steps: 2\n",
    "samplin.yaml": "samplin: 3\n",
    "judge.yaml": "judges:\n  a: {class_path: RewardJudg}\n",
    "empty_value.yaml": "trainr: {}\n",
    "folder/last.ckpt": "",
    "p.txt": "a red circle\n",
    "rewards.yaml": "model:\n  init_args:\n    rewards:\n      x: {class_path: torch.nn.Identity}\n",
    "numbered.yaml": (
        "model:\n  init_args:\n    rewards:\n      1: {class_path: videoalign.models.http_scores.HTTPScores}\n"
    ),
    "nothing.yaml": "model:\n  init_args:\n    rewards:\n      x: null\n",
    "untyped.py": (
        "class Scores:\n    name, needs = 'u', 'videos'\n    def check(self, prompts): pass\n"
        "    def __call__(self, videos, prompts): return {}\n    def place(self, device): pass\n"
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_line(name, tmp_path, monkeypatch, capsys, backbone):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("folder").mkdir()
    for file, content in CONTENT.items():
        Path(file).write_text(content)
    if "backbone" in COMMANDS[name][0]:
        shutil.copytree(backbone, "backbone")
    line, words = COMMANDS[name]
    assert call(*line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("videoalign: error: ") and re.search(words, printed.err), printed.err
    assert "Traceback" not in printed.err and "usage:" not in printed.err and not printed.out


@pytest.mark.parametrize("line", ["help", "help fit", "help shards info", "fit --help", "compare --help", "--help"])
def test_help_is_found(line, capsys):
    assert call(*line.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: videoalign")
    recipes = [*(Path(videoalign.__file__).parent / "experiments").rglob("*.yaml")]
    assert len(printed.splitlines()) < len(recipes) + 20, "a line for each recipe, and what stands above them"
    assert max(map(len, printed.splitlines())) <= 120


def test_a_bug_in_a_message_does_not_hide_the_parsers(keys, monkeypatch):
    monkeypatch.setattr("videoalign.commands.config_faults.faults", lambda *args: 1 / 0)
    assert explained([*TINY], keys("fit"), "the parser's words") == "the parser's words"
    with pytest.raises(VideoAlignError, match="the parser's words"), lightning_cli.explaining([], keys("fit")):
        raise VideoAlignError("the parser's words")


def test_a_file_that_is_put_behind_others_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("fit", "--config", "experiments/flow/wan_dpo.yaml", "--config", "experiments/miniature.yaml") == 2
    err = capsys.readouterr().err
    assert "experiments/flow/wan_dpo.yaml is put behind experiments/flow/wan_sft.yaml" in err


def test_a_run_that_is_refused_leaves_no_folder(backbone, tmp_path, monkeypatch, capsys):
    """Else the first good run would not be version_0, which the documentation names."""
    monkeypatch.chdir(tmp_path)
    options = [f"--model.network.backbone={backbone}", "--data.train=nowhere", "--data.val=nowhere"]
    assert call("fit", "--config", "experiments/debug/tiny.yaml", *options) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(tmp_path.glob("runs/debug/tiny/version_*"))
