"""VideoReward: its input, what its rewards depend on, and what trains."""

import pytest
import torch

from reward_network_kit import BASE, FROZEN, PROMPTS, ROWS, SIZES, clip_and_prompts, clips, rewards, train
from videoalign import VideoAlignError
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import FrameSampling, LoRA, Template
from videoalign.models.patch_projection import project_patches
from videoalign.models.processor import RewardProcessor
from videoalign.models.video_reward import Statistics, TokenRows
from videoalign.models.vision_attention import NAME

# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_huggingfaces(build, size):
    processor, (video,) = build().processor, clips([size])
    patches, grid = processor.patchify(video)
    want = processor.huggingface.video_processor([video], return_tensors="pt", do_resize=False)
    assert patches.dtype == torch.uint8
    assert [list(grid)] == want["video_grid_thw"].tolist()
    torch.testing.assert_close(processor.geometry.pixels(patches), want["pixel_values_videos"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 3, 32, 32), (4, 3, 24, 32), (4, 3, 32, 40), (1, 3, 32, 32)])
def test_videos_that_do_not_divide_are_refused(build, size):
    with pytest.raises(VideoAlignError, match=f"{size[0]} frames of {size[2]}x{size[3]}"):
        build().processor(clips([size]), PROMPTS[:1])


@pytest.mark.parametrize("template", ["plain", "plain_shared", "rubrics", "shared"])
def test_rows_hold_the_template_the_video_and_the_prompt(build, template):
    processor = build(template=template).processor
    batch = processor(clips(), PROMPTS)
    names = dict(zip(processor.reward_ids, (f"[{t}]" for t in processor.template.tokens)))
    for ids, mask, (t, h, w), prompt in zip(
        batch["input_ids"], batch["attention_mask"], batch["video_grid_thw"].tolist(), PROMPTS
    ):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        text = "".join(names.get(i) or processor.tokenizer.decode([i]) for i in ids[:length].tolist())
        body = processor.template.text.replace("<prompt>", prompt)
        body = body.replace("<video>", "<|vision_start|>" + "<|video_pad|>" * (t * h * w // 4) + "<|vision_end|>")
        for mark, name in zip((m for m in processor.template.marks if "reward" in m), names.values()):
            body = body.replace(mark, name)
        assert text == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
        )
    found = batch["input_ids"].gather(1, batch["reward_positions"])
    assert found.tolist() == [processor.reward_ids] * 3
    assert len(batch["pixel_patches"]) == batch["video_grid_thw"].prod(1).sum()


INJECTIONS = ["<|VQ_reward|>", "<|TA_reward|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def processor_with_reward_tokens(backbone, tmp_path_factory):
    """A processor whose tokenizer knows the reward tokens, as the released model's does."""
    huggingface = RewardProcessor(backbone, Template.load("plain"), FrameSampling(min_pixels=0)).huggingface
    names = [f"<|{d}_reward|>" for d in ("VQ", "MQ", "TA")]
    huggingface.tokenizer.add_tokens(["<|other|>", *names], special_tokens=True)
    folder = tmp_path_factory.mktemp("processor")
    huggingface.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("known", [False, True], ids=["own ids", "tokenizer's ids"])
@pytest.mark.parametrize("text", [*INJECTIONS, "<reward:VQ>", "<video>", "<prompt>"])
def test_special_text_in_a_prompt_injects_nothing(build, processor_with_reward_tokens, known, text):
    network = build(processor=processor_with_reward_tokens if known else None)
    processor = network.processor
    special = {*processor.reward_ids, *processor.tokenizer.all_special_ids}
    special |= set(processor.tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|vision_start|>", "<|im_end|>"]))
    videos, prompts = clip_and_prompts("a red circle", f"a {text} red {text} circle {text}")
    batch = processor(videos, prompts)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    plain, spelled = ([i for i in row if i in special] for row in rows)
    assert plain == spelled
    assert set(processor.reward_ids) <= set(plain)
    assert len(rows[1]) > len(rows[0])  # the text is there, as plain letters
    got = rewards(network, videos, prompts)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0, :2], got[1, :2], rtol=0, atol=1e-5)  # VQ and MQ are read where they were


def test_a_tokenizer_that_knows_the_reward_tokens_keeps_its_ids(build, processor_with_reward_tokens):
    known, own = build(processor=processor_with_reward_tokens).processor, build().processor
    assert known.reward_ids == known.tokenizer.convert_tokens_to_ids(known.template.tokens)
    assert own.reward_ids == [len(own.tokenizer) + i for i in range(3)]
    assert known.reward_ids == [i + 1 for i in own.reward_ids]
    torch.testing.assert_close(
        rewards(build(processor=processor_with_reward_tokens), clips(), PROMPTS), rewards(build(), clips(), PROMPTS)
    )


def test_prompts_that_are_too_long_are_refused(build):
    processor = build(max_prompt_tokens=40).processor
    assert len(processor.prompt_ids("a red circle")) < 40
    with pytest.raises(VideoAlignError, match=r"prompt 'red red .* tokens, more than 40"):
        processor(clips(SIZES[:1]), ["red " * 200])
    assert processor.prompt_ids("") == []


def test_the_template_does_not_count_as_prompt(build):
    network = build(template="shared", max_prompt_tokens=40)
    assert rewards(network, clips(SIZES[:1]), ["a red circle"]).isfinite().all()
    with pytest.raises(VideoAlignError, match="more than 40"):
        network.processor(clips(SIZES[:1]), ["red " * 200])


# --- what rewards depend on -----------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["mrope", "1d"])
@pytest.mark.parametrize("template", ["plain", "shared"])
def test_a_batch_gives_what_one_at_a_time_gives(build, positions, template):
    network = build(positions=positions, template=template)
    single = torch.cat([rewards(network, [video], [prompt]) for video, prompt in zip(clips(), PROMPTS)])
    torch.testing.assert_close(rewards(network, clips(), PROMPTS), single, rtol=0, atol=1e-5)
    swapped = rewards(network, clips()[::-1], PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(swapped, single, rtol=0, atol=1e-5)
    assert (single[0] - single[1]).abs().min() > 1e-3


@pytest.mark.parametrize("template", ["plain", "rubrics"])
def test_only_text_alignment_depends_on_the_prompt(build, template):
    network = build(template=template)
    got = rewards(network, *clip_and_prompts(*PROMPTS))
    torch.testing.assert_close(got[1:, :2], got[:1, :2].expand(2, 2), rtol=0, atol=1e-5)
    assert (got[1:, 2] - got[0, 2]).abs().min() > 1e-3


def test_every_reward_of_a_shared_token_depends_on_the_prompt(build):
    got = rewards(build(template="shared"), *clip_and_prompts(*PROMPTS))
    assert (got[1:] - got[0]).abs().min() > 1e-4


@pytest.mark.parametrize("template", ["plain", "shared"])
def test_every_reward_depends_on_every_frame(build, template):
    network = build(template=template)
    (video,) = clips(SIZES[:1])
    for frame in range(len(video)):
        other = video.clone()
        other[frame] = 255 - other[frame]
        got = rewards(network, [video, other], PROMPTS[:1] * 2)
        assert (got[0] - got[1]).abs().min() > 1e-4


def test_position_schemes(build):
    time, line = build(), build(positions="1d")
    line.load_state_dict(time.state_dict())
    batch = time.processor(clips(), PROMPTS)
    arguments = batch["input_ids"], batch["attention_mask"], batch["video_grid_thw"]
    counted, placed = line._position_ids(*arguments), time._position_ids(*arguments)
    assert counted.shape == placed.shape == (3, *batch["input_ids"].shape)
    assert (counted == torch.arange(batch["input_ids"].shape[1])).all()
    # a clip of 2 x 4 x 6 patches becomes 2 x 2 x 3 tokens with their time, row and column
    video = batch["input_ids"][0] == time.config.video_token_id
    place = placed[:, 0, video] - placed[:, 0, video][:, :1]
    assert place.T.tolist() == [[t, h, w] for t in range(2) for h in range(2) for w in range(3)]
    first = int(video.nonzero()[0])
    assert (placed[:, 0, :first] == torch.arange(first)).all()
    assert (rewards(time, clips(), PROMPTS) - rewards(line, clips(), PROMPTS)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_batched_vision_attention_is_plain_attention(build, family, tmp_path, monkeypatch):
    make_qwen(tmp_path / family, family, corpus=PROMPTS, hidden=32, layers=1, vision_layers=3)
    network = build(tmp_path / family)
    tower = network.backbone.visual
    videos, prompts = clips([*SIZES, (4, 3, 32, 80)]), [*PROMPTS, "a circle"]
    batch = network.processor(videos, prompts)
    pixels = network.processor.geometry.pixels(batch["pixel_patches"])
    assert tower.config._attn_implementation == NAME
    asked, unique = [], torch.unique
    monkeypatch.setattr(torch, "unique", lambda x, **how: (asked.append(x), unique(x, **how))[1])
    with torch.no_grad():
        batched = tower(pixels, grid_thw=batch["video_grid_thw"]).pooler_output
        # lengths come from the device once for all layers; the newer tower packs windows beside whole frames
        assert len(tower.blocks) == 3
        assert len(asked) == (2 if family == "qwen2_5_vl" else 1)
        got = rewards(network, videos, prompts)
        tower.config._attn_implementation = "sdpa"
        plain = tower(pixels, grid_thw=batch["video_grid_thw"]).pooler_output
    torch.testing.assert_close(batched, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, rewards(network, videos, prompts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_projected_as_the_convolution_does(bias):
    torch.manual_seed(0)
    tower = torch.nn.Module()
    tower.patch_embed = torch.nn.Module()
    tower.patch_embed.proj = conv = torch.nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4), bias=bias).double()
    project_patches(tower)
    patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (conv, tower.patch_embed.proj):
        out = layer(patches)
        wanted = [patches, *layer.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    assert [*tower.state_dict()] == [f"patch_embed.proj.{name}" for name in conv.state_dict()]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_eager_attention_agrees(build):
    torch.testing.assert_close(
        rewards(build(attention="eager"), clips(), PROMPTS), rewards(build(), clips(), PROMPTS), rtol=0, atol=1e-5
    )


def test_qwen2_5_vl_works(build, backbone_2_5):
    network = build(backbone_2_5)
    got = rewards(network, clips(), PROMPTS)
    single = torch.cat([rewards(network, [video], [prompt]) for video, prompt in zip(clips(), PROMPTS)])
    assert got.shape == (3, 3)
    assert got.isfinite().all()
    torch.testing.assert_close(got, single, rtol=0, atol=1e-5)
    blind = rewards(network, *clip_and_prompts(*PROMPTS))
    torch.testing.assert_close(blind[1:, :2], blind[:1, :2].expand(2, 2), rtol=0, atol=1e-5)


# --- head and reward tokens -----------------------------------------------------------------------


def hidden_states(network, videos, prompts):
    """The hidden states that the head reads, (B, K, E)."""
    seen = []
    handle = network.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    got = rewards(network, videos, prompts)
    handle.remove()
    return seen[0], got


def test_each_row_of_the_head_reads_its_own_token(build):
    network = build()
    states, got = hidden_states(network, clips(), PROMPTS)
    assert states.shape == (3, 3, 32)
    assert network.head.weight.shape == (3, 32)
    for i in range(3):
        torch.testing.assert_close(got[:, i], states[:, i] @ network.head.weight[i])


def test_shared_token_gives_three_rewards(build):
    network = build(template="shared")
    assert network.processor.template.tokens == ["<|reward|>"]
    states, got = hidden_states(network, clips(), PROMPTS)
    assert states.shape == (3, 1, 32)
    assert dict(network.named_parameters())[ROWS].shape == (1, 32)
    torch.testing.assert_close(got, states[:, 0] @ network.head.weight.T)


def test_one_row_of_the_head_reads_three_tokens(build):
    one, three = build(head_rows=1), build()
    assert one.head.weight.shape == (1, 32)
    state = one.state_dict()
    three.load_state_dict({**state, "head.weight": state["head.weight"].expand(3, -1)})
    torch.testing.assert_close(rewards(one, clips(), PROMPTS), rewards(three, clips(), PROMPTS))
    with pytest.raises(VideoAlignError, match="head_rows: 1"):
        build(head_rows=1, template="shared")


def test_head_stays_in_fp32(build):
    network = build(dtype="bfloat16")
    assert network.backbone.language_model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert network.head.weight.dtype == dict(network.named_parameters())[ROWS].dtype == torch.float32
    states, got = hidden_states(network, clips(), PROMPTS)
    assert states.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    want = torch.einsum("bde,de->bd", states.double(), network.head.weight.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network.head(states), got)
    torch.testing.assert_close(got, rewards(build(), clips(), PROMPTS), rtol=0, atol=0.2)


def test_token_rows_leave_other_tokens_alone():
    base = torch.nn.Embedding(7, 4)
    rows = TokenRows(base, [3, 9])  # one id of the matrix's own, one behind its end
    ids = torch.tensor([[0, 3, 6], [9, 9, 1]])
    got = rows(ids)
    assert rows.weight is base.weight
    assert torch.equal(got[0, [0, 2]], base.weight[[0, 6]])
    assert torch.equal(got[1, 2], base.weight[1])
    assert torch.equal(got[0, 1], rows.rows[0])
    assert torch.equal(got[1, :2], rows.rows[[1, 1]])
    got.sum().backward()
    assert rows.rows.grad.tolist() == [[1.0] * 4, [2.0] * 4]


def test_normalised_rewards_are_z_scores(build):
    network = build()
    network.statistics = Statistics([1.0, 2.0, 3.0], [2.0, 4.0, 0.5])
    assert network.normalise(torch.tensor([[1.0, 6.0, 4.0]])).tolist() == [[0.0, 1.0, 2.0]]


# --- training -------------------------------------------------------------------------------------


def expected_names(network, language, vision, train_merger):
    """Parameters that should train, from the options' documentation."""
    names = {ROWS, "head.weight"}
    for name, _ in network.named_parameters():
        merger, adapter = name.startswith("backbone.visual.merger."), ".lora_" in name
        if merger:
            trains = train_merger and (not adapter or vision == "lora")
        elif name.startswith("backbone.visual."):
            trains = vision == "full" or (vision == "lora" and adapter)
        elif name.startswith("backbone.language_model.") and name not in (BASE, ROWS):
            trains = language == "full" or (language == "lora" and adapter)
        else:
            trains = False
        names |= {name} if trains else set()
    return names


@pytest.mark.parametrize("train_merger", [True, False], ids=["merger", "no merger"])
@pytest.mark.parametrize("vision", ["full", "lora", "frozen"])
@pytest.mark.parametrize("language", ["lora", "full", "frozen"])
def test_exactly_the_chosen_parameters_train(build, language, vision, train_merger):
    network = build(language=language, vision=vision, train_merger=train_merger, lora=LoRA(rank=2, alpha=4))
    want = expected_names(network, language, vision, train_merger)
    assert set(network.trained_names()) == want
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    train(network)
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == want
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("option", ["language", "vision"])
def test_adapters_cover_every_linear_layer_of_their_part(build, option):
    network = build(**{**FROZEN, option: "lora"}, lora=LoRA(rank=2))
    part = {"language": "backbone.language_model.", "vision": "backbone.visual.blocks."}[option]
    adapted = {name.split(".lora_")[0] for name in network.trained_names() if ".lora_" in name}
    linear = {
        name
        for name, module in build(**FROZEN).named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(part)
    }
    assert {name for name in adapted if ".merger." not in name} == linear
    assert len(linear) >= 4


def test_adapters_on_named_layers_only(build):
    names = build(language="lora", vision="frozen", lora=LoRA(rank=2, targets=["q_proj", "v_proj"])).trained_names()
    assert {n.split(".")[-4] for n in names if ".lora_" in n} == {"q_proj", "v_proj"}


def test_adapters_add_their_scaled_product(build):
    layer = build(lora=LoRA(rank=2, alpha=6)).backbone.language_model.layers[0].mlp.up_proj
    x, a, b = torch.randn(4, 32), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2, 32)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6 / 2 * x @ a.T @ b.T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank"), ({"dropout": 1.0}, "dropout"), ({"targets": ["q_proj", "nowhere"]}, r"nowhere.*q_proj")],
)
def test_adapters_that_cannot_be_are_refused(build, settings, message):
    with pytest.raises(VideoAlignError, match=message):
        build(lora=LoRA(**settings))


@pytest.mark.parametrize("language", ["full", "frozen"])
def test_of_the_vocabulary_only_the_new_rows_train(build, language):
    network = build(**{**FROZEN, "language": language})
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    train(network)
    now = dict(network.named_parameters())
    assert torch.equal(now[BASE], before[BASE])
    assert now[BASE].grad is None
    assert now[ROWS].shape == (3, 32)
    assert (now[ROWS] != before[ROWS]).any(1).all()
    if language == "frozen":
        assert set(network.trained_names()) == {ROWS, "head.weight"}


def test_gradient_checkpointing_changes_no_gradient(build):
    plain, saving = build(), build(gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    gradients, calls = [], []
    for network in (plain, saving):
        count = [0, 0]
        for i, module in enumerate((network.backbone.language_model.layers[0], network.backbone.visual.blocks[0])):
            module.mlp.register_forward_pre_hook(lambda *_, count=count, i=i: count.__setitem__(i, count[i] + 1))
        rewards(network.train(), clips(), PROMPTS, grad=True).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
        calls.append(count)
    assert calls == [[1, 1], [2, 2]]  # computed again in the backward pass, in both towers
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
