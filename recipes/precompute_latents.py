"""Computes what the frozen parts make of every picture once, for runs that see it many times.

    python recipes/precompute_latents.py --init_from outputs/mine/stage1/final --source my_pictures/ --output_dir cached/
    python recipes/precompute_latents.py --config recipes/configs/shapes-cache.yaml
    python recipes/precompute_latents.py --config recipes/configs/shapes-cache.yaml --push_to_hub user/shapes-cache

Writes parquet shards with the pictures at the run's resolution, their captions and what is cached; both recipes read the
folder like any other source, or by its id once it is pushed. A stopped run goes on with the next shard when started again.
"""

import io
import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Features, Image, Value
from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi
from tqdm.auto import tqdm
from trl import TrlParser

from iomm_hf.data.cache import CACHE_COLUMN, CACHE_FILE, KEY_COLUMN, Cached, pack
from iomm_hf.data.images import resize_and_crop, to_tensor
from iomm_hf.data.streams import SampleStream
from iomm_hf.files import write_json
from iomm_hf.pipeline_iomm import IOMMPipeline
from iomm_hf.presets import get_preset
from iomm_hf.training.config import as_source, check_choices
from iomm_hf.training.setup import FrozenParts, cache_identity, load_frozen_parts


SHARD_BYTES = 500_000_000  # a shard is closed at them: it is held in memory, and a run reads whole shards


@dataclass
class CacheConfig:
    source: str = field(metadata={"help": "Pictures or pairs; in YAML a path or a mapping of SourceConfig's fields."})
    output_dir: str = field(metadata={"help": "Folder of the cache."})
    init_from: str | None = field(default=None, metadata={"help": "Pipeline whose frozen parts to use."})
    preset: str | None = field(default=None, metadata={"help": "Or the preset whose parts to use. Default: base."})
    mllm: str | None = field(default=None, metadata={"help": "In place of the preset's: folder or Hub id."})
    vae: str | None = field(default=None, metadata={"help": "In place of the preset's: folder or Hub id."})
    vae_subfolder: str | None = field(default=None, metadata={"help": "Its folder inside `vae`."})
    resolution: int | None = field(default=None, metadata={"help": "Side of the pictures, px. Default: the preset's."})
    vision_tokens: bool = field(
        default=True, metadata={"help": "Also keep the MLLM's vision tokens (2 x tokens x D bytes a picture)."}
    )
    dtype: Literal["float16", "float32"] = field(
        default="float16",
        metadata={"help": "Type of what is cached; float32 rounds nothing and takes twice the space."},
    )
    jpeg_quality: int | None = field(
        default=None,
        metadata={
            "help": "Keep the pictures, which the vision tower reads without vision_tokens, as JPEG of this quality (1 to"
            " 100). Default: PNG, exact, and of photographs several times larger."
        },
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Upload the finished cache to this data set, such as user/name."}
    )
    private: bool = field(default=False, metadata={"help": "Make that data set private if it is new."})
    samples_per_shard: int = field(
        default=2000, metadata={"help": "Samples of a shard at most; it is closed at half a gigabyte as well."}
    )
    batch_size: int = field(default=16, metadata={"help": "Pictures a forward pass."})
    device: str = field(default="cpu", metadata={"help": "Where the frozen parts run, such as cuda."})

    def __post_init__(self):
        check_choices(self)
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must be from 1 to 100, got {self.jpeg_quality}; leave it out for PNG.")
        for name in ("samples_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        given = [name for name in ("preset", "mllm", "vae", "vae_subfolder") if getattr(self, name) is not None]
        if self.init_from is not None and given:
            raise ValueError(f"init_from={self.init_from!r} brings its own parts; leave out {', '.join(given)}.")
        if self.vae is None and self.vae_subfolder is not None:
            raise ValueError(f"vae_subfolder={self.vae_subfolder!r} is a folder inside `vae`, which is missing.")


@torch.no_grad()
def compute(parts: FrozenParts, samples: list[dict[str, Any]], config: CacheConfig, resolution: int) -> list[dict]:
    """Rows of a shard for a batch of samples."""
    images = [resize_and_crop(sample["image"], resolution) for sample in samples]
    pixels = torch.stack([to_tensor(image) for image in images]).to(config.device)
    posterior = parts.vae.encode(pixels / 127.5 - 1).latent_dist
    tokens: list[torch.Tensor | None] = [None] * len(samples)
    if config.vision_tokens:
        inputs = parts.processor.encode([parts.processor.image_only(image) for image in images])
        pixel_values = inputs["pixel_values"].to(config.device)
        tokens = list(parts.mllm.model.get_image_features(pixel_values).pooler_output.cpu())
    rows = []
    for i, (sample, image) in enumerate(zip(samples, images, strict=True)):
        encoded = io.BytesIO()
        if config.jpeg_quality is None:
            image.save(encoded, format="PNG")
        else:
            image.save(encoded, format="JPEG", quality=config.jpeg_quality)
        cached = Cached(posterior.mean[i].cpu(), posterior.logvar[i].cpu(), tokens[i])
        row = {"image": {"bytes": encoded.getvalue(), "path": None}, CACHE_COLUMN: pack(cached, config.dtype)}
        row[KEY_COLUMN] = sample["key"]
        rows.append(row if sample["caption"] is None else row | {"caption": sample["caption"]})
    return rows


def load_parts(config: CacheConfig) -> tuple[FrozenParts, int]:
    """The frozen parts, and the resolution at which they are used."""
    if config.init_from is None:
        preset = get_preset(config.preset or "base")
        parts = load_frozen_parts(preset, config.mllm, config.vae, config.vae_subfolder)
        return parts, config.resolution or preset.resolution
    pipeline = IOMMPipeline.from_pretrained(config.init_from, dtype=torch.float32)
    parts = FrozenParts(pipeline.processor, pipeline.text_encoder.mllm, pipeline.vae, {}, {})
    return parts, config.resolution or pipeline.resolution


def push(folder: Path, config: CacheConfig):
    """Uploads a finished cache; what the Hub holds already is not sent again.

    Raises:
        `ValueError`: the data set holds shards that are not of this cache, and would be read as if they were.
    """
    api = HfApi()
    repo = api.create_repo(config.push_to_hub, repo_type="dataset", private=config.private, exist_ok=True).repo_id
    there = [file for file in api.list_repo_files(repo, repo_type="dataset") if file.endswith(".parquet")]
    if foreign := [file for file in there if not (folder / file).exists()]:
        raise ValueError(
            f"The data set {repo!r} holds {foreign[0]!r} and {len(foreign) - 1} more shards that {folder} lacks: push to"
            " another, or delete them there first."
        )
    # Which files are the data is said, not left to be guessed from names beside which a JSON file lies.
    data = DatasetCardData(configs=[{"config_name": "default", "data_files": "train-*.parquet"}], tags=["iomm-hf"])
    text = (
        f"# {repo}\n\nPictures, and what the frozen parts of an iomm-hf pipeline make of them (`{CACHE_FILE}` says of which"
        f" and at what resolution). Its recipes read it by id:\n\n```yaml\nimages: [{repo}]\n```"
    )
    DatasetCard(f"---\n{data}\n---\n\n{text}\n").save(folder / "README.md")
    # Where the originals lie, perhaps on this machine, concerns no reader.
    info = {name: value for name, value in json.loads((folder / CACHE_FILE).read_text()).items() if name != "source"}
    # One commit: hashes beside another cache's latents would pass for their own.
    files = {file.name: file for file in (*sorted(folder.glob("train-*.parquet")), folder / "README.md")}
    contents = files | {CACHE_FILE: json.dumps(info, indent=2).encode()}
    api.create_commit(
        repo,
        [CommitOperationAdd(name, content) for name, content in contents.items()],
        commit_message="Push with iomm-hf",
        repo_type="dataset",
    )
    print(f"Pushed: {api.endpoint}/datasets/{repo}")


def main(config: CacheConfig):
    source = as_source(config.source)
    parts, resolution = load_parts(config)
    info = cache_identity(parts.mllm, parts.vae, resolution)
    info |= {"source": asdict(source), "vision_tokens": config.vision_tokens}
    info |= {"dtype": config.dtype, "jpeg_quality": config.jpeg_quality}
    parts.mllm.to(config.device)
    parts.vae.to(config.device)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if (output / CACHE_FILE).exists() and json.loads((output / CACHE_FILE).read_text()) != info:
        raise ValueError(
            f"{output} holds another cache, or one of an earlier iomm-hf, which runs still read: see its {CACHE_FILE}."
            " Choose another output_dir."
        )
    write_json(output / CACHE_FILE, info)

    features = {"image": Image(), CACHE_COLUMN: Value("binary"), KEY_COLUMN: Value("string")}
    if source.caption_column is not None:
        features["caption"] = Value("string")
    stream = SampleStream(source)
    progress = output / "progress.json"  # shards written, and where the stream stood behind the last one
    state = {"shards": 0, "samples": 0, "done": False}
    if progress.exists():
        state |= json.loads(progress.read_text())
    if state["shards"]:
        stream.load_state_dict(state["stream"])
    samples = iter(stream)
    bar = tqdm(desc="Precomputing", unit="picture", initial=state["samples"])
    while not state["done"]:
        rows: list[dict] = []
        size = 0
        while len(rows) < config.samples_per_shard and size < SHARD_BYTES and not state["done"]:
            room = min(config.batch_size, config.samples_per_shard - len(rows))
            batch = list(islice(samples, room))
            fresh = [sample for sample in batch if sample["epoch"] == 0]
            state["done"] = len(fresh) < len(batch)
            if fresh:
                rows += compute(parts, fresh, config, resolution)
            size = sum(len(row[CACHE_COLUMN]) + len(row["image"]["bytes"]) for row in rows)
            bar.update(len(fresh))
        if rows:
            shard = output / f"train-{state['shards']:05d}.parquet"
            temporary = shard.with_name(f"{shard.name}.tmp")
            Dataset.from_list(rows, features=Features(features)).to_parquet(temporary)
            temporary.replace(shard)
            state |= {
                "shards": state["shards"] + 1,
                "samples": state["samples"] + len(rows),
                "stream": stream.state_dict(),
            }
        write_json(progress, state)
    bar.close()
    print(f"Finished: {output}, {state['shards']} shards")
    if config.push_to_hub is not None:
        push(output, config)


if __name__ == "__main__":
    main(*TrlParser(CacheConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
