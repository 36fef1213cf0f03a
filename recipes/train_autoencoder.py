"""Stage 0: trains a small autoencoder on pictures alone. At full size a published one is downloaded instead.

    python recipes/train_autoencoder.py --images my_pictures/ --output_dir outputs/mine/vae --minutes 8
    python recipes/train_autoencoder.py --images my_pictures/ --output_dir outputs/mine/vae --max_steps 5000

It is convolutional, so random crops of half the side teach the same at a quarter of the cost. Latents must suit a generator
as well as the decoder: averaged latents have to decode to the averaged picture (Kouzelis et al., EQ-VAE, arXiv 2502.09509),
which keeps them smooth; what they say has to be heard through noise (Yang et al., l-DeTok, arXiv 2507.15856), which sets apart
what looks different; and at the end they are whitened. Same seed and --max_steps, same weights; --minutes stops by the clock
instead, so such a run is not repeatable step for step.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm
from trl import TrlParser

from iomm_hf.data.images import resize_and_crop, to_tensor
from iomm_hf.data.shapes import COLORS, corpus_scene, render
from iomm_hf.data.streams import build_stream
from iomm_hf.evaluation.shapes import score_image
from iomm_hf.files import write_json
from iomm_hf.tiny import tiny_vae
from iomm_hf.training.checkpoints import whole_folder
from iomm_hf.training.config import as_source
from iomm_hf.training.stage0 import Budget, check_budget


SCORED_SCENES = 200
STANDARD_WEIGHT = 0.1  # beside a reconstruction loss of about 0.1


@dataclass
class AutoencoderConfig:
    images: list[str] = field(default_factory=list, metadata={"help": "Sources of pictures; no text is read."})
    output_dir: str = field(default="outputs/vae", metadata={"help": "Folder of the finished autoencoder."})
    init_from: str | None = field(default=None, metadata={"help": "Autoencoder folder to go on from."})
    resolution: int = field(default=64, metadata={"help": "Side that pictures are resized and cropped to, px."})
    crop: int = field(default=32, metadata={"help": "Side of the training crops, px."})
    num_pictures: int = field(default=8000, metadata={"help": "Most pictures to hold in memory."})
    held_out: int = field(default=128, metadata={"help": "Further pictures, kept for the measurement."})
    shapes: bool = field(
        default=False, metadata={"help": f"Also score reconstructions of {SCORED_SCENES} scenes of the shapes world."}
    )
    batch_size: int = field(default=12, metadata={"help": "Crops a step; small ones learn faster at this size."})
    candidates: int = field(
        default=3, metadata={"help": "Crops drawn for each one used, the busiest: plain background teaches little."}
    )
    max_steps: int | None = field(default=None, metadata={"help": "Number of steps; repeatable."})
    minutes: float | None = field(default=None, metadata={"help": "Time to train, instead of max_steps."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak rate of AdamW."})
    kl_weight: float = field(default=1e-6, metadata={"help": "Weight of the KL term."})
    scale_weight: float = field(
        default=0.5, metadata={"help": "Weight of decoding latents of half the size to the picture of half the size."}
    )
    latent_noise: float = field(
        default=0.5, metadata={"help": "Scale of the noise that the decoder learns to hear through; 0 for none."}
    )
    seed: int = field(default=0, metadata={"help": "Everything random derives from it."})

    def __post_init__(self):
        if not self.images:
            raise ValueError("Give at least one source of pictures: --images FOLDER.")
        if not 0 < self.crop <= self.resolution:
            raise ValueError(f"crop must be between 1 and the resolution {self.resolution}, got {self.crop}.")
        for name in ("kl_weight", "scale_weight", "latent_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("batch_size", "candidates", "num_pictures", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        check_budget(self.minutes, max_steps=self.max_steps)


def read_pictures(config: AutoencoderConfig) -> torch.Tensor:
    """Up to `num_pictures + held_out` distinct pictures as uint8 (N, 3, resolution, resolution)."""
    first_epoch = {}
    wanted = config.num_pictures + config.held_out
    for sample in tqdm(
        islice(build_stream([as_source(source) for source in config.images], seed=config.seed), wanted),
        "Reading",
        total=wanted,
    ):
        if sample["key"] in first_epoch:
            break
        first_epoch[sample["key"]] = to_tensor(resize_and_crop(sample["image"], config.resolution))
    if len(first_epoch) <= config.held_out:
        raise ValueError(f"Only {len(first_epoch)} pictures were found, {config.held_out} of them to be held out.")
    return torch.stack(list(first_epoch.values()))


def random_crops(pictures: torch.Tensor, config: AutoencoderConfig, rng: np.random.Generator) -> torch.Tensor:
    """A batch (B, 3, crop, crop) in [-1, 1], cut and mirrored at random; each the busiest of `candidates` crops."""
    room, count = config.resolution - config.crop + 1, config.batch_size * config.candidates
    drawn = []
    for index, y, x, mirror in zip(
        rng.integers(len(pictures), size=count),
        rng.integers(room, size=count),
        rng.integers(room, size=count),
        rng.random(count) < 0.5,
        strict=True,
    ):
        crop = pictures[index, :, y : y + config.crop, x : x + config.crop]
        drawn.append(crop.flip(-1) if mirror else crop)
    crops = (torch.stack(drawn) / 127.5 - 1).unflatten(0, (-1, config.candidates))  # (B, candidates, 3, crop, crop)
    busiest = crops.std((-2, -1)).sum(-1).argmax(1)
    return crops[torch.arange(len(crops)), busiest]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> uint8 of the same shape, through the posterior's mean."""
    parts = [vae.decode(vae.encode(part / 127.5 - 1).latent_dist.mean).sample for part in pictures.split(64)]
    return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def reconstruction_loss(drawn: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(drawn, pictures) + F.l1_loss(drawn, pictures)


def autoencoder_loss(vae: AutoencoderKL, batch: torch.Tensor, config: AutoencoderConfig) -> torch.Tensor:
    """Reconstruction through noise of a random level a crop, the two KL terms, and reconstruction at half the size from
    averaged latents."""
    posterior = vae.encode(batch).latent_dist
    latents = heard = posterior.sample()
    loss = config.kl_weight * posterior.kl().mean()
    if config.latent_noise:
        level = config.latent_noise * torch.randn(len(latents), 1, 1, 1).abs()
        heard = latents + level * torch.randn_like(latents)
        loss = loss + STANDARD_WEIGHT * divergence_from_standard(posterior.mean)
    loss = loss + reconstruction_loss(vae.decode(heard).sample, batch)
    half = vae.decode(F.avg_pool2d(latents, 2)).sample
    return loss + config.scale_weight * reconstruction_loss(half, F.avg_pool2d(batch, 2))


def divergence_from_standard(latents: torch.Tensor) -> torch.Tensor:
    """KL of the channels' joint normal from N(0, I): it keeps an encoder from outshouting the noise, or saying all of it in
    every channel."""
    rows = latents.transpose(0, 1).flatten(1)  # (C, B h w)
    covariance = torch.cov(rows)
    return (rows.mean(1).square().sum() + covariance.trace() - len(rows) - covariance.logdet()) / 2


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pictures: torch.Tensor):
    """
    Gives the latent channels deviation 1 and no correlation, by a linear map A of channels that goes into the encoder's last
    convolution and its inverse into the decoder's first; reconstructions stay the same. A scale alone would leave them as
    unequal as pictures are, with nearly all variance in light against dark.

    The posterior's variance becomes a constant for each channel, since A would make its noise correlated.
    """
    if vae.config.use_quant_conv or vae.config.use_post_quant_conv:
        raise ValueError(
            "Latents of an autoencoder with quant_conv layers cannot be whitened; its config must turn them off."
        )
    posteriors = [vae.encode(part / 127.5 - 1).latent_dist for part in pictures.split(64)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    variance = torch.cat([posterior.var for posterior in posteriors]).mean((0, 2, 3))
    covariance = torch.cov(means.transpose(0, 1).flatten(1)) + torch.diag(variance)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(eigenvalues.rsqrt()) @ vectors.T  # of all that whiten, the one that turns least

    channels = len(whiten)
    conv_out, conv_in = vae.encoder.conv_out, vae.decoder.conv_in
    conv_out.weight[:channels] = torch.einsum("ij,jchw->ichw", whiten, conv_out.weight[:channels])
    conv_out.bias[:channels] = whiten @ conv_out.bias[:channels]
    conv_out.weight[channels:] = 0
    conv_out.bias[channels:] = (whiten.square() @ variance).log()
    conv_in.weight.copy_(torch.einsum("ojhw,ji->oihw", conv_in.weight, whiten.inverse()))
    shift = (whiten @ means.mean((0, 2, 3))).mean().item()
    vae.register_to_config(scaling_factor=1.0, shift_factor=shift)


def psnr(pictures: torch.Tensor, others: torch.Tensor) -> float:
    error = (pictures.float() - others.float()).square().mean((1, 2, 3)).clamp(min=1e-6)
    return (10 * torch.log10(255**2 / error)).mean().item()


def share_still_right(vae: AutoencoderKL, count: int) -> float:
    """Share of fresh scenes whose reconstruction still shows its caption: a ceiling on everything behind it."""
    scenes, wanted = zip(*(corpus_scene(10**6, index) for index in range(count)), strict=True)
    pictures = torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) for scene in scenes])
    drawn = reconstruct(vae, pictures).permute(0, 2, 3, 1).numpy()
    return sum(score_image(picture, metadata).correct for picture, metadata in zip(drawn, wanted, strict=True)) / count


@torch.no_grad()
def least_color_distance(vae: AutoencoderKL) -> float:
    """The least distance between the latents of two colours of the shapes world, inside a square of 32 px on light or dark
    ground; a latent channel's deviation is 1. At a small one a generator sees which colour it draws only when little noise
    is left."""
    distances = []
    for ground in (25, 235):
        pictures = torch.full((len(COLORS), 3, 64, 64), float(ground))
        pictures[:, :, 16:48, 16:48] = torch.tensor(list(COLORS.values())).float()[..., None, None]
        inside = vae.encode(pictures / 127.5 - 1).latent_dist.mean[..., 6:10, 6:10]
        distances.append(F.pdist(inside.mean((-2, -1))).min())
    return min(distances).item()


def main(config: AutoencoderConfig):
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    vae = tiny_vae(seed=config.seed) if config.init_from is None else AutoencoderKL.from_pretrained(config.init_from)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if config.crop % (2 * factor) or config.resolution % (2 * factor):
        raise ValueError(
            f"crop and resolution must be multiples of twice the autoencoder's factor {factor},"
            f" got {config.crop} and {config.resolution}."
        )
    pictures = read_pictures(config)
    held_out, pictures = pictures[: config.held_out], pictures[config.held_out :]
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    output = Path(config.output_dir)
    log = output.with_name(f"{output.name}-log.jsonl")

    budget = Budget(optimizer, config.max_steps, config.minutes, log, "Autoencoder")
    for _ in budget:
        batch = random_crops(pictures, config, rng)
        budget.update(autoencoder_loss(vae, batch, config))

    vae.eval()
    whiten_latents(vae, pictures[:512])
    drawn = reconstruct(vae, held_out)
    summary = {"held_out": len(held_out), "psnr": psnr(drawn, held_out), "steps": len(budget.losses)}
    if config.shapes:
        summary |= {"shapes_still_right": share_still_right(vae, SCORED_SCENES), "shapes_scored": SCORED_SCENES}
        summary["least_color_distance"] = least_color_distance(vae)
    with whole_folder(output, Accelerator(cpu=True)) as folder:
        vae.save_pretrained(folder)
        write_json(folder / "summary.json", summary)
        shown = torch.cat([held_out[:8], drawn[:8]]).permute(0, 2, 3, 1).numpy()
        make_image_grid([Image.fromarray(picture) for picture in shown], 2, 8).save(folder / "reconstructions.png")
    print(f"{output}: {summary}")


if __name__ == "__main__":
    main(*TrlParser(AutoencoderConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
