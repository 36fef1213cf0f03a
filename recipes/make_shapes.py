"""
Write a corpus of the shapes world as a Hub dataset.

    python recipes/make_shapes.py --output_dir data/shapes-pairs --num_samples 20000
    python recipes/make_shapes.py --output_dir data/shapes-images --num_samples 100000 --seed 1 --captions False

    python recipes/make_shapes.py --output_dir data/shapes-chat --num_samples 60000 --layout chat

A YAML file with the same keys is read with `--config`.
"""

from dataclasses import dataclass, field

from tqdm import tqdm
from trl import TrlParser

from iomm_hf.data.chat import write_chat
from iomm_hf.data.shapes import TASKS
from iomm_hf.data.shapes_chat import shapes_chat
from iomm_hf.data.shapes_writer import write_shards


@dataclass
class ShapesArguments:
    output_dir: str = field(metadata={"help": "Folder of the corpus."})
    num_samples: int = field(default=20_000, metadata={"help": "Samples to write."})
    seed: int = field(default=0, metadata={"help": "The corpus; two seeds share no scene."})
    image_size: int = field(default=64, metadata={"help": "Side of the pictures in pixels."})
    captions: bool = field(default=True, metadata={"help": "Write captions, or pictures alone."})
    layout: str = field(
        default="webdataset",
        metadata={"help": "`webdataset`, `parquet`, or `chat`: questions and answers, for sft_mllm.py."},
    )
    text_share: float = field(
        default=0.0, metadata={"help": "Of chats, the share of turns about a text alone, which teach an MLLM to read."}
    )
    samples_per_shard: int = field(default=2500, metadata={"help": "Samples of all shards but the last."})
    tasks: list[str] = field(
        default_factory=lambda: list(TASKS),
        metadata={"help": "Kinds of scenes, equally likely; name one twice to double its share."},
    )
    show_held_out: bool | None = field(
        default=None,
        metadata={"help": "Let pictures show held-out combinations. By default those without captions do."},
    )


def main(args: ShapesArguments) -> None:
    if args.layout == "chat":
        examples = shapes_chat(
            args.num_samples, seed=args.seed, image_size=args.image_size, tasks=args.tasks, text_share=args.text_share
        )
        progress = tqdm(examples, "Drawing shapes", total=args.num_samples, unit="scene")
        write_chat(args.output_dir, progress, args.samples_per_shard)
        return
    write_shards(
        args.output_dir,
        args.num_samples,
        seed=args.seed,
        image_size=args.image_size,
        captions=args.captions,
        layout=args.layout,
        samples_per_shard=args.samples_per_shard,
        tasks=args.tasks,
        show_held_out=args.show_held_out,
    )


if __name__ == "__main__":
    parser = TrlParser((ShapesArguments,))
    (script_args,) = parser.parse_args_and_config()
    main(script_args)
