"""From samples to batches: which conversation a sample becomes, and that nothing depends on its neighbours."""

import pytest
import torch

from iomm_hf.data.cache import Cached
from iomm_hf.data.collate import IOMMCollator, sample_seed


@pytest.fixture
def samples(images):
    captions = [None, "a red circle", None, "two stars"]
    return [
        {
            "key": f"source/0/{i}",
            "epoch": 0,
            "image": image,
            "caption": caption,
            "cached": None,
            "skipped": {"too_small": i},
        }
        for i, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]


def texts(processor, batch) -> list[str]:
    return processor.tokenizer.batch_decode(batch["input_ids"])


def test_a_caption_is_read_and_a_picture_without_one_is_looked_at(processor, samples):
    batch = IOMMCollator(processor, resolution=32, condition_dropout=0.0)(samples)
    assert batch["pixels"].shape == (4, 3, 32, 32) and batch["pixels"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (2, 3, 64, 64)  # the MLLM's own size
    assert ((batch["input_ids"] == processor.image_token_id).sum(1) > 0).tolist() == [True, False, True, False]
    assert "Generate an image: a red circle<" in texts(processor, batch)[1]
    assert batch["num_captions"] == 2
    assert batch["skipped"] == {"too_small": 6}


def test_the_mllm_sees_the_very_crop_that_is_drawn(processor, samples):
    batch = IOMMCollator(processor, resolution=64, condition_dropout=0.0)(samples[:1])
    mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    seen = batch["pixel_values"][0] * std[:, None, None] + mean[:, None, None]
    assert (seen * 255 - batch["pixels"][0]).abs().max() < 1


def test_dropout_replaces_its_share_of_both_kinds(processor, samples):
    collator = IOMMCollator(processor, resolution=16, condition_dropout=0.1)
    dropped = 0
    for epoch in range(250):
        batch = collator([sample | {"epoch": epoch} for sample in samples])
        dropped += sum("Generate an image.<" in text for text in texts(processor, batch))
    assert 60 < dropped < 140  # 1000 draws at 10 %: 4.2 standard deviations
    everything = IOMMCollator(processor, resolution=16, condition_dropout=1.0)(samples)
    assert all("Generate an image.<" in text for text in texts(processor, everything))
    assert "pixel_values" not in everything


def test_a_sample_does_not_depend_on_its_batch(processor, samples):
    collator = IOMMCollator(processor, resolution=32, condition_dropout=0.5, seed=3)
    together = collator(samples)
    for i, sample in enumerate(samples):
        alone = collator([sample])
        assert alone["seed"][0] == together["seed"][i]
        assert torch.equal(alone["pixels"][0], together["pixels"][i])
        length = alone["input_ids"].shape[1]
        assert torch.equal(alone["input_ids"][0], together["input_ids"][i, -length:])
        assert not together["attention_mask"][i, :-length].any()


def test_seeds_differ_by_run_key_and_epoch_and_fit_a_generator():
    seeds = {sample_seed(run, key, epoch) for run in range(3) for key in ("a", "b") for epoch in range(3)}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "a", 0) == sample_seed(0, "a", 0)


def test_a_dropout_that_is_no_share_is_refused(processor):
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        IOMMCollator(processor, resolution=32, condition_dropout=1.5)


def test_cached_samples_replace_pixels_and_are_not_mixed_with_others(processor, samples):
    cached = [
        sample | {"cached": Cached(torch.full((4, 8, 8), i), torch.zeros(4, 8, 8), torch.full((16, 128), i))}
        for i, sample in enumerate(samples)
    ]
    batch = IOMMCollator(processor, resolution=32, condition_dropout=0.0)(cached)
    assert "pixels" not in batch and "pixel_values" not in batch
    assert batch["latent_mean"][:, 0, 0, 0].tolist() == [0, 1, 2, 3] and batch["latent_logvar"].shape == (4, 4, 8, 8)
    assert batch["image_features"][:, 0, 0].tolist() == [0, 2]  # of the two that are looked at
    assert batch["vision_tokens"][:, 0, 0].tolist() == [0, 1, 2, 3]
    online = IOMMCollator(processor, resolution=32, condition_dropout=0.0)(samples)
    assert torch.equal(batch["input_ids"], online["input_ids"])
    with pytest.raises(ValueError, match="precompute all of them, or none"):
        IOMMCollator(processor, resolution=32)([cached[0], samples[1]])
