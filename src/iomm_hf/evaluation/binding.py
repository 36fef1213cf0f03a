"""Does a model bind words to each other, or does it read a caption as a bag of words?

A scene's caption is compared with the same words bound otherwise ([`~iomm_hf.data.shapes.exchange`]): "a heart left of a
star" with "a heart right of a star", "a red circle and a blue star" with "a blue circle and a red star". The MLLM is asked
whether the scene shows each; the generator denoises the scene under each. A bag of words prefers the true one half of the time.
What an MLLM makes of a text alone is asked apart from pictures ([`reading`]).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.collate import IOMMCollator
from ..data.shapes import Metadata, Scene, exchange, render
from ..data.shapes_chat import MATCH, read
from ..pipeline_iomm import IOMMPipeline
from ..processing_iomm import IOMMProcessor
from ..training.module import IOMMTrainingModule
from .shapes import Share, wilson_share


Told = tuple[Scene, Metadata]


@torch.no_grad()
def mllm_binding(
    mllm: PreTrainedModel, processor: IOMMProcessor, scenes: Sequence[Told], batch_size: int = 64
) -> Share:
    r"""
    Share of scenes that an MLLM says "yes" to more willingly under their caption than under the exchanged one.

    Args:
        mllm (`PreTrainedModel`): The MLLM.
        processor ([`IOMMProcessor`]): Its processor.
        scenes (sequence of `(Scene, dict)`): Scenes of `position` or `color_attr` with their metadata.
        batch_size (`int`, *optional*, defaults to 64): Questions a forward pass.
    """
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    questions = [
        (Image.fromarray(render(scene)), MATCH.format(told["prompt"]))
        for scene, metadata in scenes
        for told in (metadata, exchange(metadata))
    ]
    willingness: list[torch.Tensor] = []
    for start in tqdm(range(0, len(questions), batch_size), desc="Questions", unit="batch"):
        part = questions[start : start + batch_size]
        inputs = processor.encode([processor.understand(question, image) for image, question in part])
        logits = mllm(**inputs.to(mllm.device), logits_to_keep=1).logits[:, -1].float()
        willingness.append((logits[:, yes] - logits[:, no]).cpu())
    true, exchanged = torch.cat(willingness).view(-1, 2).unbind(1)
    return wilson_share(int((true > exchanged).sum()), len(scenes))


@torch.no_grad()
def reading(
    mllm: PreTrainedModel, processor: IOMMProcessor, turns: int = 400, batch_size: int = 64, seed: int = 10**6
) -> dict[str, Share]:
    r"""
    Share of turns about a text alone ([`~iomm_hf.data.shapes_chat.read`]) that an MLLM answers word for word.

    Args:
        mllm (`PreTrainedModel`): The MLLM.
        processor ([`IOMMProcessor`]): Its processor.
        turns (`int`, *optional*, defaults to 400): Turns to answer.
        batch_size (`int`, *optional*, defaults to 64): Turns a forward pass.
        seed (`int`, *optional*, defaults to 1000000): What they derive from.

    Returns:
        `dict` with a [`~iomm_hf.evaluation.shapes.Share`] for texts to say again (`restated`: repeated, turned around, in other
        words) and for questions about them (`asked`).
    """
    told = [read(np.random.default_rng([seed, index])) for index in range(turns)]
    right: dict[str, list[bool]] = {"restated": [], "asked": []}
    for start in tqdm(range(0, turns, batch_size), desc="Texts", unit="batch"):
        part = told[start : start + batch_size]
        inputs = processor.encode([processor.understand(turn.question) for turn in part])
        answers = mllm.generate(**inputs.to(mllm.device), max_new_tokens=60, do_sample=False)
        texts = processor.tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for turn, text in zip(part, texts, strict=True):
            right["asked" if turn.question.endswith("?") else "restated"].append(text.strip() == turn.answer)
    return {kind: wilson_share(sum(answers), len(answers)) for kind, answers in right.items() if answers}


@torch.no_grad()
def generator_binding(
    pipeline: IOMMPipeline, scenes: Sequence[Told], draws: int = 8, batch_size: int = 32, seed: int = 0
) -> Share:
    r"""
    Share of scenes that a generator denoises better under their caption than under the exchanged one, with the same times
    and noise.

    Args:
        pipeline ([`IOMMPipeline`]): The model.
        scenes (sequence of `(Scene, dict)`): Scenes of `position` or `color_attr` with their metadata.
        draws (`int`, *optional*, defaults to 8): Draws of time and noise averaged for each scene.
        batch_size (`int`, *optional*, defaults to 32): Scenes a forward pass.
        seed (`int`, *optional*, defaults to 0): What the draws derive from.
    """
    module = IOMMTrainingModule(pipeline.text_encoder, pipeline.transformer, pipeline.vae, mask_ratio=0.0).eval()
    pictures = [Image.fromarray(render(scene, pipeline.resolution)) for scene, _ in scenes]
    captions = {
        "true": [metadata["prompt"] for _, metadata in scenes],
        "exchanged": [exchange(metadata)["prompt"] for _, metadata in scenes],
    }
    losses = {name: torch.zeros(len(scenes), dtype=torch.float64) for name in captions}
    for draw in tqdm(range(draws), desc="Binding", unit="draw"):
        collator = IOMMCollator(pipeline.processor, pipeline.resolution, condition_dropout=0.0, seed=seed + draw)
        for start in range(0, len(scenes), batch_size):
            part = range(start, min(start + batch_size, len(scenes)))
            for name, prompts in captions.items():
                samples = [
                    {
                        "key": str(i),
                        "epoch": 0,
                        "image": pictures[i],
                        "caption": prompts[i],
                        "cached": None,
                        "skipped": {},
                    }
                    for i in part
                ]
                batch = {
                    key: value.to(pipeline.device) if isinstance(value, torch.Tensor) else value
                    for key, value in collator(samples).items()
                }
                losses[name][part.start : part.stop] += module.sample_losses(batch).double().cpu()
    return wilson_share(int((losses["true"] < losses["exchanged"]).sum()), len(scenes))
