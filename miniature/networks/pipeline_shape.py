"""What the miniature pipelines of all families share: their size, their tokenizer and their T5 text encoder."""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["a red circle moves left to right", "a blue square moves top to bottom", "a video of the same scene"]
WIDTH = 32
"""Width of text and image encoders."""


@dataclass(frozen=True)
class Shape:
    """Size of a miniature pipeline.

    Attributes:
        corpus: Texts whose words the tokenizer knows.
        hidden: Width of the transformer.
        layers: Depth of the transformer.
        heads: Attention heads of the transformer.
        vocabulary: Number of tokens.
        max_tokens: Number of tokens that prompts are padded to; the family's own if None.
        shift: Shift of the sampler's time steps; the family's own if None.
    """

    corpus: list[str]
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    max_tokens: int | None
    shift: float | None

    @property
    def attention(self) -> dict[str, int]:
        """Depth, heads and their width, as the transformers of diffusers call them."""
        head = self.hidden // self.heads
        return {"num_attention_heads": self.heads, "attention_head_dim": head, "num_layers": self.layers}


def byte_level(shape: Shape, special: list[str]) -> Tokenizer:
    """A byte-level BPE of the corpus.

    Args:
        shape: Size of the pipeline.
        special: Special tokens, which have the first ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(shape.corpus, trainer)
    return tokenizer


def fast_tokenizer(shape: Shape, special: dict[str, str], template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around every text.

    Args:
        shape: Size of the pipeline.
        special: Special tokens by role, such as ``pad_token``, in the order of their ids.
        template: The text ``$A`` and the special tokens around it.
    """
    tokenizer = byte_level(shape, list(special.values()))
    around = [(token, tokenizer.token_to_id(token)) for token in special.values() if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=around)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.model_max_length = shape.max_tokens or fast.model_max_length
    return fast


def t5_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A tokenizer that ends every text, as T5's tokenizers do.

    Args:
        shape: Size of the pipeline.
    """
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return fast_tokenizer(shape, special, "$A </s>")


def t5_config(vocabulary: int) -> dict[str, int]:
    """Configuration of a T5 or UMT5 encoder.

    Args:
        vocabulary: Number of tokens.
    """
    return {
        "vocab_size": vocabulary,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def vision_config(image: int, patch: int, layers: int = 2) -> dict[str, int]:
    """Configuration of a CLIP, SigLIP or Gemma vision tower.

    Args:
        image: Side of its images, in pixels.
        patch: Side of a patch, in pixels.
        layers: Depth of the tower.
    """
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image,
        "patch_size": patch,
    }
