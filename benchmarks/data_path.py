"""Our stream against plain iteration of `datasets` with the same decoding: WebDataset tars, one reader, images/s.

    python benchmarks/data_path.py

The stream adds blocks that are truly shuffled, an exact resume and checks of every picture.
"""

import tempfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
from timing import compare, record
from trl import TrlParser

from iomm_hf.data.images import load_image
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import SampleStream


@dataclass
class DataPathConfig:
    samples: int = field(default=2000, metadata={"help": "Pictures a run."})
    size: int = field(default=256, metadata={"help": "Their side in pixels."})
    rounds: int = field(default=5, metadata={"help": "Timed runs of both."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of data_path.json."})


def main(config: DataPathConfig):
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), config.samples, image_size=config.size, samples_per_shard=config.samples // 4)
        files = sorted(str(path) for path in Path(folder).glob("*.tar"))

        def ours() -> int:
            stream = SampleStream(SourceConfig(folder, caption_column="json.prompt"))
            return sum(sample["image"].size == (config.size, config.size) for sample in islice(stream, config.samples))

        def plain() -> int:
            rows = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
            column = next(name for name in ("png", "jpg", "webp") if name in rows.column_names)
            rows = rows.cast_column(column, datasets.Image(decode=False))
            return sum(load_image(row[column]["bytes"]).size == (config.size, config.size) for row in rows)

        assert ours() == plain() == config.samples
        speed = compare(plain, ours, config.rounds, "Reading")
        record(
            "data_path",
            {
                "samples": config.samples,
                "size": config.size,
                "images/s, ours / datasets": speed,
                "images/s, ours": round(config.samples / speed.second),
            },
            config.output_dir,
        )


if __name__ == "__main__":
    main(*TrlParser(DataPathConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
