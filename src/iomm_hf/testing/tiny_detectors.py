"""GenEval's detector and colour classifier at a size for tests: the same classes, random weights, a real folder to load from."""

from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from ..evaluation.geneval_rules import CLASSES
from ..tiny import seeded, train_tokenizer


def save_tiny_detectors(folder: str | Path, seed: int = 0) -> tuple[Path, Path]:
    """
    Writes a Mask2Former with COCO's 80 classes and a CLIP.

    Returns:
        Their folders, to be given as `detector` and `clip` of [`~iomm_hf.evaluation.geneval_models.GenEvalModels`].

    Example:

    ```python
    >>> import tempfile
    >>> from iomm_hf.evaluation.geneval_models import GenEvalModels
    >>> detector, clip = save_tiny_detectors(tempfile.mkdtemp())
    >>> len(GenEvalModels(str(detector), str(clip)).labels)
    80
    ```
    """
    detector, clip = Path(folder, "detector"), Path(folder, "clip")
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    tokenizer = train_tokenizer([f"a photo of a {name}" for name in CLASSES], vocab_size=600)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )  # CLIP reads a text off its last token
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    with seeded(seed):
        model = Mask2FormerForUniversalSegmentation(config)
        model.class_predictor.weight.data *= 40  # loud enough for some objects to count
        model.save_pretrained(detector)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(clip)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32).save_pretrained(
        detector
    )
    size = {"shortest_edge": 32}
    CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    ).save_pretrained(clip)
    return detector, clip
