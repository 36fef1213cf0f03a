"""Stage 0: makes the tiny MLLM bind what it reads. At full size a published MLLM is downloaded instead.

    python recipes/warm_up_text.py --init_from outputs/mine/mllm/final --output_dir outputs/mine/bound --max_steps 1500

Dense labels, as in `warm_up_vision.py`, but for words: at each noun of a caption, the shape, and which colour, number and place
belong to it; behind the caption all its objects again, for where the first one is becomes clear only at the end. A large
MLLM's rows hold that; a tiny one learns from chats to look it up when asked, and meanwhile what is conditioned on its rows reads
captions as bags of words. The same linear head names what the image tokens show, so that a shape is spelled alike whether read or
seen. Chats go on beside it, so that nothing is forgotten; the vision tower and the projector stay as they were. Same seed and
--max_steps, same weights; --minutes stops by the clock instead.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from trl import TrlParser

from iomm_hf.data.shapes import Scene, corpus_scene, describe, patch_labels, render
from iomm_hf.data.shapes_chat import NOUN_LABELS, Turn, chat_example, noun_labels
from iomm_hf.modeling_iomm import load_mllm
from iomm_hf.processing_iomm import IOMMProcessor
from iomm_hf.training.stage0 import Budget, WarmUpConfig, save_mllm


IGNORED = -100  # what cross-entropy leaves out
IMAGE_SIZE = 64  # of the tiny MLLM
TEXT_SHARE = 0.3  # of the chats, about a text alone


@dataclass(kw_only=True)
class TextConfig(WarmUpConfig):
    init_from: str = field(metadata={"help": "MLLM folder to go on from, as written by sft_mllm.py."})
    output_dir: str = field(
        default="outputs/bound", metadata={"help": "Folder of the finished MLLM, in InternVL's layout."}
    )


class Example(NamedTuple):
    """A token sequence and what each of its rows is to say."""

    input_ids: list[int]
    next_tokens: list[int]  # IGNORED outside an answer
    labels: np.ndarray  # (L, len(NOUN_LABELS)) places in their names, IGNORED outside nouns and objects
    scene: Scene | None = None  # whose picture is in the sequence


class Sequences(NamedTuple):
    """Examples, padded on the right."""

    input_ids: torch.Tensor  # (N, L)
    attention_mask: torch.Tensor  # (N, L), False on padding
    next_tokens: torch.Tensor  # (N, L)
    labels: torch.Tensor  # (N, L, len(NOUN_LABELS))
    features: torch.Tensor  # (N, image tokens, D), what the vision tower sees; zeros without a picture

    def take(self, rows: torch.Tensor) -> "Sequences":
        return Sequences(*(part[rows] for part in self))


class NounLabeller(nn.Module):
    """The language model, and a linear head on its last rows that is thrown away afterwards."""

    def __init__(self, mllm: PreTrainedModel):
        super().__init__()
        self.mllm = mllm
        self.head = nn.Linear(mllm.config.get_text_config().hidden_size, sum(map(len, NOUN_LABELS.values())))

    def forward(self, batch: Sequences) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Rows (B, L, D), and by kind of label the logits of each."""
        embeddings = self.mllm.get_input_embeddings()(batch.input_ids)
        is_image = batch.input_ids == self.mllm.config.image_token_id
        seen = batch.features[is_image.any(1)].to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(is_image[..., None], seen)
        rows = self.mllm.model.language_model(
            inputs_embeds=embeddings, attention_mask=batch.attention_mask
        ).last_hidden_state
        logits = self.head(F.layer_norm(rows, rows.shape[-1:]))
        return rows, logits.split([len(names) for names in NOUN_LABELS.values()], dim=-1)


def read_example(processor: IOMMProcessor, caption: str) -> Example:
    """A caption to draw. A noun is labelled at the token that its last letter is in; the rows behind the caption go through
    the objects again, over and over."""
    ids = processor.encode([processor.text_to_image(caption)])["input_ids"][0].tolist()
    pieces = [processor.tokenizer.decode([token]) for token in ids]
    token_ends = np.cumsum([len(piece) for piece in pieces])
    word_ends = np.cumsum([len(word) + 1 for word in caption.split(" ")]) - 1 + "".join(pieces).rindex(caption)
    tokens = np.searchsorted(token_ends, word_ends)
    nouns, objects = noun_labels(caption)
    labels = np.full((len(ids), len(NOUN_LABELS)), IGNORED)
    for word, of_noun in nouns.items():
        labels[tokens[word]] = of_noun
    behind = np.arange(len(ids) - tokens[-1] - 1)
    labels[tokens[-1] + 1 :] = np.array(objects)[behind % len(objects)]
    return Example(ids, [IGNORED] * len(ids), labels)


def said_example(processor: IOMMProcessor, scene: Scene | None, turn: Turn) -> Example:
    """A question and its answer; where there is a picture, its tokens' shapes and colours are labelled."""
    images = [] if scene is None else [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))]
    question = processor.encode([processor.understand(turn.question, *images)])["input_ids"][0].tolist()
    tokenizer = processor.tokenizer
    answer = [*tokenizer(turn.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = question + answer
    labels = np.full((len(ids), len(NOUN_LABELS)), IGNORED)
    if scene is not None:
        side = int(processor.image_seq_length**0.5)
        shown = patch_labels(scene, IMAGE_SIZE, IMAGE_SIZE // side).reshape(-1, 2)  # counted from 1, 0 is background
        is_image = np.array(ids) == processor.image_token_id
        labels[is_image, :2] = np.where(shown[:, :1] > 0, shown - [1, 0], IGNORED)
    return Example(ids, [*[IGNORED] * (len(question) - 1), *answer, IGNORED], labels, scene)


@torch.no_grad()
def stack(examples: list[Example], mllm: PreTrainedModel, processor: IOMMProcessor) -> Sequences:
    ids, next_tokens = ([torch.tensor(example[part]) for example in examples] for part in (0, 1))
    features = torch.zeros(len(examples), processor.image_seq_length, mllm.config.get_text_config().hidden_size)
    with_picture = [row for row, example in enumerate(examples) if example.scene is not None]
    for start in range(0, len(with_picture), 100):
        rows = with_picture[start : start + 100]
        pictures = [Image.fromarray(render(examples[row].scene, IMAGE_SIZE)) for row in rows]
        pixels = processor.image_processor(pictures, crop_to_patches=False, return_tensors="pt")["pixel_values"]
        features[rows] = mllm.model.get_image_features(pixels).pooler_output.reshape(len(rows), *features.shape[1:])
    return Sequences(
        pad_sequence(ids, batch_first=True),
        pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True),
        pad_sequence(next_tokens, batch_first=True, padding_value=IGNORED),
        pad_sequence([torch.from_numpy(e.labels) for e in examples], batch_first=True, padding_value=IGNORED),
        features,
    )


def make_sequences(
    config: TextConfig, mllm: PreTrainedModel, processor: IOMMProcessor, seed: int, count: int
) -> tuple[Sequences, Sequences]:
    """`count` captions, by turns a benchmark prompt and a full description, and `count` chats."""
    captions, chats = [], []
    for index in tqdm(range(count), "Captions and chats"):
        scene, metadata = corpus_scene(seed, index, tasks=config.tasks)
        captions.append(read_example(processor, metadata["prompt"] if index % 2 else describe(scene)))
        chat = chat_example(seed, index, tasks=config.tasks, text_share=TEXT_SHARE)
        chats.append(said_example(processor, *chat))
    return stack(captions, mllm, processor), stack(chats, mllm, processor)


def label_loss(logits: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    return sum(
        F.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
        for part, target in zip(logits, labels.unbind(-1), strict=True)
        if (target != IGNORED).any()
    )


def answer_loss(labeller: NounLabeller, rows: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
    said = next_tokens != IGNORED
    return F.cross_entropy(labeller.mllm.lm_head(rows[said]), next_tokens[said])


@torch.no_grad()
def measure(labeller: NounLabeller, captions: Sequences, chats: Sequences) -> dict[str, float]:
    """Shares, on held-out scenes: of labels named right at nouns (read) and at image tokens (seen), and of chats answered
    right throughout, each word given those before it."""
    right: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, sequences in (("read", captions), ("seen", chats)):
        for part in torch.arange(len(sequences.input_ids)).split(64):
            batch = sequences.take(part)
            rows, logits = labeller(batch)
            for kind, values, target in zip(NOUN_LABELS, logits, batch.labels.unbind(-1), strict=True):
                right[f"{name}_{kind}"].append((values.argmax(-1) == target)[target != IGNORED])
            words = labeller.mllm.lm_head(rows).argmax(-1)
            answered = ((words == batch.next_tokens) | (batch.next_tokens == IGNORED)).all(1)
            right["chats"].append(answered[(batch.next_tokens != IGNORED).any(1)])
    shares = {name: torch.cat(values).float() for name, values in right.items()}
    return {"held_out": len(captions.input_ids)} | {n: v.mean().item() for n, v in shares.items() if len(v)}


def main(config: TextConfig):
    mllm, processor = load_mllm(config.init_from, dtype=torch.float32), IOMMProcessor.from_pretrained(config.init_from)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    captions, chats = make_sequences(config, mllm, processor, config.seed, config.num_scenes)
    held_out = make_sequences(config, mllm, processor, 10**6, config.held_out)
    labeller = NounLabeller(mllm).train()
    mllm.model.language_model.requires_grad_(True)
    output = Path(config.output_dir)
    log = output.with_name(f"{output.name}-log.jsonl")
    trained = [parameter for parameter in labeller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95))
    budget = Budget(optimizer, config.max_steps, config.minutes, log, "Dense labels", warmup=100)
    for _ in budget:
        read, said = (
            sequences.take(torch.from_numpy(rng.integers(config.num_scenes, size=config.batch_size)))
            for sequences in (captions, chats)
        )
        _, logits = labeller(read)
        loss = label_loss(logits, read.labels)
        rows, logits = labeller(said)
        budget.update(loss + answer_loss(labeller, rows, said.next_tokens) + label_loss(logits, said.labels))

    summary = {"steps": len(budget.losses)} | measure(labeller.eval(), *held_out)
    save_mllm(output, mllm, processor, summary)


if __name__ == "__main__":
    main(*TrlParser(TextConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
