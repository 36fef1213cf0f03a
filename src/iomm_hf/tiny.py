"""The embedded world's own small parts, made from nothing: tokenizer, MLLM, autoencoder, generator.

They are real components of the same classes as the full-size ones, so that tests, the quickstart and a laptop run the
very code that a cluster runs. Weights are random here; the recipes train them.
"""

import inspect
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cache

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModelMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import InternVLConfig, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from .data.shapes import TASKS, list_metadata
from .data.shapes_chat import instructions
from .modeling_iomm import IOMMConditionEncoder, IOMMConfig
from .pipeline_iomm import IOMMPipeline
from .presets import PRESETS, Preset, build_transformer
from .processing_iomm import IOMMProcessor


# InternVL3's template: roles in ChatML, an image as its context token and a newline.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS.values()]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with InternVL's control tokens: whatever a user types has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        extra_special_tokens=IMAGE_TOKENS,
    )


@cache
def shapes_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the shapes world, trained on its captions, questions, edits and on every instruction."""
    processor_defaults = inspect.signature(IOMMProcessor.__init__).parameters
    wordings = [
        parameter.default for name, parameter in processor_defaults.items() if name.endswith(("_template", "_prompt"))
    ]
    captions = [metadata["prompt"] for task in TASKS for metadata in list_metadata(task, show_held_out=False)]
    return train_tokenizer([*captions, *instructions(), *filter(None, wordings)])


def tiny_processor(preset: Preset = PRESETS["tiny"]) -> IOMMProcessor:
    """The processor of the embedded world."""
    height, width = preset.mllm_config["vision_config"]["image_size"]
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": height, "width": width}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    return IOMMProcessor(
        image_processor=image_processor,
        tokenizer=shapes_tokenizer(),
        image_seq_length=preset.mllm_config["image_seq_length"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_mllm_config(processor: IOMMProcessor, preset: Preset = PRESETS["tiny"]) -> InternVLConfig:
    """The MLLM's configuration with the vocabulary of `processor`."""
    tokenizer = processor.tokenizer
    text_config = preset.mllm_config["text_config"] | {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    return InternVLConfig(
        **preset.mllm_config | {"text_config": text_config, "image_token_id": processor.image_token_id}
    )


def tiny_encoder(
    processor: IOMMProcessor, preset: Preset = PRESETS["tiny"], seed: int = 0, **config
) -> IOMMConditionEncoder:
    """A condition encoder with random weights; `config` overrides fields of [`IOMMConfig`]."""
    config = IOMMConfig(mllm_config=tiny_mllm_config(processor, preset), **preset.condition_config | config)
    with seeded(seed):
        return IOMMConditionEncoder(config).eval()


def tiny_vae(preset: Preset = PRESETS["tiny"], seed: int = 0) -> AutoencoderKL:
    """An autoencoder with random weights."""
    with seeded(seed):
        return AutoencoderKL(**preset.vae_config).eval()


def tiny_transformer(preset: Preset = PRESETS["tiny"], seed: int = 0) -> ModelMixin:
    """A generator with random weights."""
    with seeded(seed):
        return build_transformer(preset).eval()


def tiny_pipeline(preset: Preset = PRESETS["tiny"], seed: int = 0, **config) -> IOMMPipeline:
    """A whole pipeline with random weights: it draws noise until somebody trains it."""
    processor = tiny_processor(preset)
    return IOMMPipeline(
        text_encoder=tiny_encoder(processor, preset, seed, **config),
        processor=processor,
        transformer=tiny_transformer(preset, seed),
        vae=tiny_vae(preset, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=preset.shift),
    )


@contextmanager
def seeded(seed: int):
    """Draws fresh weights from `seed` without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
