"""Turns pairs of picture and text into chats, from which sft_mllm.py teaches an MLLM your pictures.

    python recipes/make_chat.py --config mine-chat.yaml
    # mine-chat.yaml
    # pairs: [{path: path/to/pairs/*.tar, caption_column: txt}]
    # output_dir: outputs/mine/chat

Each pair becomes one turn: the question over the picture, its text as the answer. Every sample is read once; the stream skips
bad ones and says how many.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tqdm.auto import tqdm
from trl import TrlParser

from iomm_hf.data.chat import ChatExample, write_chat
from iomm_hf.data.images import resize_and_crop
from iomm_hf.data.shapes_chat import DESCRIBE
from iomm_hf.data.streams import SampleStream
from iomm_hf.training.config import as_source


@dataclass
class ChatConfig:
    pairs: list[str] = field(
        default_factory=list, metadata={"help": "Sources of pairs; in YAML mappings with a caption_column."}
    )
    output_dir: str = field(default="outputs/chat", metadata={"help": "Folder of the chats."})
    question: str = field(default=DESCRIBE, metadata={"help": "What is asked over each picture."})
    resolution: int = field(
        default=448, metadata={"help": "Side that pictures are resized and cropped to, px; what the MLLM sees."}
    )
    samples_per_shard: int = field(default=2500, metadata={"help": "Examples of all shards but the last."})

    def __post_init__(self):
        self.sources = [as_source(source) for source in self.pairs]
        if not self.sources:
            raise ValueError("Give at least one source of pairs: `pairs:` in the YAML file, with a caption_column.")
        for source in self.sources:
            if source.caption_column is None:
                raise ValueError(f"{source.path!r} needs a caption_column: the text is the answer.")
        if self.resolution < 1:
            raise ValueError(f"resolution must be positive, got {self.resolution}.")


def turns(config: ChatConfig) -> Iterator[ChatExample]:
    for source in config.sources:
        for sample in SampleStream(source):
            if sample["epoch"] > 0:
                break
            yield ChatExample(resize_and_crop(sample["image"], config.resolution), config.question, sample["caption"])


def main(config: ChatConfig):
    examples = tqdm(turns(config), "Writing chats", unit="turn")
    shards = write_chat(config.output_dir, examples, config.samples_per_shard)
    print(f"Finished: {config.output_dir}, {examples.n} turns in {len(shards)} shards")


if __name__ == "__main__":
    main(*TrlParser(ChatConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
