import pytest
import torch

from iomm_hf.flow_matching import flow_matching_loss, interpolate, sample_timesteps, shift_time, velocity_target


def test_path_runs_from_image_to_noise_at_constant_velocity():
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(interpolate(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(2)), noise)
    early, late = (
        interpolate(latents, noise, torch.full((2,), 0.2)),
        interpolate(latents, noise, torch.full((2,), 0.7)),
    )
    assert torch.allclose((late - early) / 0.5, velocity_target(latents, noise), atol=1e-5)


def test_loss_is_one_mean_per_sample():
    velocity = torch.zeros(2, 3, 2, 2)
    target = torch.stack([torch.full((3, 2, 2), 1.0), torch.full((3, 2, 2), 2.0)])
    assert flow_matching_loss(velocity, target).tolist() == [1.0, 4.0]


def test_timesteps_follow_their_law_and_their_sample(generators):
    uniform = sample_timesteps(generators(4000))
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.005
    normal = sample_timesteps(generators(4000), "logit_normal")
    assert abs(normal.logit().mean()) < 0.06 and abs(normal.logit().std() - 1) < 0.05
    assert torch.equal(sample_timesteps(generators(3))[2:], sample_timesteps(generators(1, seed=2)))


def test_shift_moves_times_towards_noise_and_keeps_the_ends(generators):
    t = torch.linspace(0, 1, 11)
    assert torch.equal(shift_time(t, 1.0), t)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    assert torch.equal(sample_timesteps(generators(5), shift=3.0), shift_time(sample_timesteps(generators(5)), 3.0))


def test_unknown_settings_are_refused(generators):
    with pytest.raises(ValueError, match="'cosine'"):
        sample_timesteps(generators(1), "cosine")
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        sample_timesteps(generators(1), shift=0)
