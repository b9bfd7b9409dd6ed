"""LTX-2: the video of a model of video and sound (HaCohen et al., 2026).

Video and sound are two streams that read each other. Here the video is trained and sampled *alone*: with
``isolate_modalities`` neither stream reads the other, and the sound is one silent token. Layers of the sound, and those
between the streams, take no part; autoencoder and vocoder of the sound are not loaded.

An encoded prompt is what the connectors make of the text encoder's states, which would be 188,160 wide. Connectors fill
the padding with registers of their own, so that every prompt is as long as the longest.
"""

from torch import Tensor, cat, nn

from .family import Condition, Encoded
from .ltx import LTX


class LTX2(LTX):
    """Adapter for diffusers' :class:`~diffusers.LTX2Pipeline`: the video alone, with a silent stream of sound."""

    class_name = "LTX2Pipeline"
    max_tokens = 1024
    further_parts = {"text_encoder": ("connectors",)}
    left_out = ("audio_vae", "vocoder", "processor", "prompt_enhancer", "duration_head")
    plain_pipeline = False
    behind = (*LTX.behind, "audio_norm_out", "audio_proj_out", "audio_scale_shift_table")
    shifts = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}

    @property
    def text_width(self) -> int:
        return self.config.caption_channels if self.config.use_prompt_embeddings else self.config.cross_attention_dim

    def adaptable(self, layer: str, blocks: int | None = None) -> bool:
        """Whether a layer is of the video stream: layers of the sound, and those between both, take no part."""
        return not any(word in layer for word in ("audio", "av_cross", "a2v", "keyframes"))

    def _embed(self, prompts: list[str], lengths: list[int]) -> list[Encoded]:
        pipeline, device, most = self.pipeline, self.text_encoder.device, self.max_tokens
        encoded = []
        for prompt in prompts:  # one at a time: the states of all layers are 0.4 GB per prompt
            states, mask, *_ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=most, device=device
            )
            padding = pipeline.tokenizer.padding_side
            (embeds,), _, (kept,) = pipeline.connectors(states, mask, padding_side=padding)
            encoded.append({"prompt": embeds[kept.bool()]})
        return encoded

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        net, clean = transformer or self.transformer, self.clean_frames(condition)
        kind, times, config = net.dtype, self.timesteps(t), net.config
        size = dict(zip(("num_frames", "height", "width"), x.shape[2:]))
        width = config.caption_channels if config.use_prompt_embeddings else config.audio_cross_attention_dim
        v = net(
            self.packed(x).to(kind),
            x.new_zeros(len(x), 1, config.audio_in_channels, dtype=kind),
            condition["prompt"].to(kind),
            x.new_zeros(len(x), 1, width, dtype=kind),
            timestep=self.token_times(t, x, clean) if clean else times,
            audio_timestep=times,
            sigma=times,
            encoder_attention_mask=condition["prompt_mask"],
            fps=self.fps,
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
            **size,
        )[0]  # (B, F*H*W, C)
        return self.unpacked(v.float(), size)

    def _step_velocity(
        self,
        x: Tensor,
        t: Tensor,
        sigma: Tensor,
        condition: Condition,
        null: Condition | None,
        scale: float,
        net: nn.Module,
    ) -> Tensor:
        if scale > 1 and null is not None:
            both = {name: cat([null[name], condition[name]]) for name in condition}
            empty, end = (x - v * sigma for v in self.velocity(cat([x, x]), cat([t, t]), both, net).chunk(2))
            end = end + (scale - 1) * (end - empty)
        else:
            end = x - self.velocity(x, t, condition, net) * sigma
        return (x - end) / sigma  # the pipeline's way through predicted ends, which rounds differently


class LTX2Image(LTX2):
    """Adapter for :class:`~diffusers.LTX2ImageToVideoPipeline`: the image is the first latent frame, at time 0.

    Images are encoded as they are; diffusers compresses them as a video first (``image_crf``), which a clip's frame is.
    """

    class_name = "LTX2ImageToVideoPipeline"
    image = "required"
    begins_with_image = True
