"""The condition encoder's invariants: the cached prefix is exact, dropping is masking, nothing leaks, frozen is frozen."""

import copy

import pytest
import torch
from transformers import InternVLConfig

from iomm_hf import IOMMConditionEncoder, IOMMConfig, ResidualQueryAdapter
from iomm_hf.modeling_iomm import draw_image_mask, hash_weight_files, load_mllm
from iomm_hf.presets import PRESETS
from iomm_hf.testing.reference import plain_full_pass


@pytest.fixture(scope="module")
def batch(processor, images):
    """All five uses in one padded batch."""
    return processor.encode(
        [
            processor.text_to_image("a red circle left of a blue star"),
            processor.image_only(images[0]),
            processor.edit("make it blue", images[1], images[2]),
            processor.unconditional(),
            processor.understand("What is it?", images[3]),
        ]
    )


@pytest.fixture
def image_mask(batch, processor, generators):
    return draw_image_mask(batch["input_ids"], processor.image_token_id, 0.5, generators(5))


def adapter_gradients(encoder, condition):
    weights = torch.linspace(-1, 1, condition.numel()).view_as(condition)  # an arbitrary, fixed direction
    encoder.zero_grad()
    (condition * weights).sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter_type", ["residual", "plain"])
@pytest.mark.parametrize("text_model", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_pass_equals_full_pass(processor, batch, image_mask, text_model, checkpointing, adapter_type):
    mllm = PRESETS["tiny"].mllm_config
    text_config = mllm["text_config"] | {"model_type": text_model, "vocab_size": len(processor.tokenizer)}
    config = InternVLConfig(**mllm | {"text_config": text_config, "image_token_id": processor.image_token_id})
    torch.manual_seed(0)
    encoder = IOMMConditionEncoder(
        IOMMConfig(
            mllm_config=config, num_queries=8, adapter_head_dim=32, connector_layers=1, adapter_type=adapter_type
        )
    )
    encoder.train()
    if checkpointing:
        encoder.activation_checkpointing_enable()
        assert encoder.gradient_checkpointing

    expected = plain_full_pass(encoder, **batch, image_mask=image_mask)
    expected_gradients = adapter_gradients(encoder, expected)
    condition = encoder(**batch, image_mask=image_mask).condition
    gradients = adapter_gradients(encoder, condition)

    assert (condition - expected).abs().max() < 1e-4
    assert gradients.keys() == expected_gradients.keys()
    assert all(name.startswith(("adapter.", "connector.")) for name in gradients)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() < 1e-4 * max(1, scale), name
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3


def test_prefix_pass_equals_full_pass_under_bf16_autocast(make_encoder, processor):
    encoder = make_encoder(num_queries=4)
    batch = processor.encode([processor.text_to_image("a star"), processor.unconditional()])
    with torch.autocast("cpu", torch.bfloat16):
        condition = encoder(**batch).condition
        expected = plain_full_pass(encoder, **batch)
    assert (condition.float() - expected.float()).abs().max() < 0.1 * expected.float().std()


def test_dropping_equals_masking_and_changes_the_condition(make_encoder, batch, image_mask):
    encoder = make_encoder()
    with torch.no_grad():
        dropped = encoder(**batch, image_mask=image_mask).condition
        assert (dropped - plain_full_pass(encoder, **batch, image_mask=image_mask)).abs().max() < 1e-4
        whole = encoder(**batch).condition
    with_images = [1, 2, 4]
    assert ((dropped - whole)[with_images].abs().amax((1, 2)) > 1e-3).all()
    assert (dropped - whole)[[0, 3]].abs().max() < 1e-4


def test_dropped_tokens_leave_the_sequence_and_neighbours_keep_their_positions(make_encoder, batch, image_mask):
    encoder = make_encoder()
    attention_mask = batch["attention_mask"].bool()
    _, _, positions = encoder.embed(batch["input_ids"], attention_mask, batch["pixel_values"])
    _, kept, kept_positions = encoder.embed(batch["input_ids"], attention_mask, batch["pixel_values"], image_mask)
    assert (kept.sum(-1) == (attention_mask & ~image_mask).sum(-1)).all()
    for row in range(len(kept)):
        assert (
            kept_positions[row, kept[row]].tolist() == positions[row, attention_mask[row] & ~image_mask[row]].tolist()
        )


def test_zero_mode_keeps_the_token_and_zeroes_it(make_encoder, batch, image_mask):
    encoder = make_encoder(mask_mode="zero")
    embeddings, mask, _ = encoder.embed(
        batch["input_ids"], batch["attention_mask"].bool(), batch["pixel_values"], image_mask
    )
    assert mask.shape == batch["input_ids"].shape
    assert (embeddings[image_mask] == 0).all()
    with torch.no_grad():
        zeroed = encoder(**batch, image_mask=image_mask).condition
        dropped = make_encoder(mask_mode="drop")(**batch, image_mask=image_mask).condition
    assert (zeroed - dropped)[1].abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [0.0, 0.45, 0.85])
def test_expected_share_dropped_is_the_mask_ratio(processor, ratio, generators):
    ids = torch.full((400, 100), processor.image_token_id)
    ids[:, :20] = 0
    hidden = draw_image_mask(ids, processor.image_token_id, ratio, generators(400))
    assert not hidden[:, :20].any()
    assert abs(hidden[:, 20:].float().mean() - ratio) < 0.01  # 32,000 draws: 3.6 standard deviations at 0.5


def test_mask_ratio_zero_is_the_identity(make_encoder, batch, processor, generators):
    encoder = make_encoder()
    nothing = draw_image_mask(batch["input_ids"], processor.image_token_id, 0.0, generators(5))
    with torch.no_grad():
        whole = encoder(**batch).condition
        assert (encoder(**batch, image_mask=nothing).condition - whole).abs().max() < 1e-5


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_mask_ratio_outside_its_range_is_refused(processor, ratio, generators):
    with pytest.raises(ValueError, match=f"{ratio}"):
        draw_image_mask(torch.zeros(1, 4, dtype=torch.long), processor.image_token_id, ratio, generators(1))


@pytest.mark.parametrize("condition_tokens", ["queries", "all"])
@pytest.mark.parametrize("connector_layers", [0, 2])
def test_batch_equals_single(make_encoder, processor, images, generators, condition_tokens, connector_layers):
    encoder = make_encoder(condition_tokens=condition_tokens, connector_layers=connector_layers)
    conversations = [
        processor.text_to_image("a red circle left of a blue star"),
        processor.image_only(images[0]),
        processor.edit("make it blue", images[1]),
        processor.unconditional(),
    ]

    def conditions(chosen):
        inputs = processor.encode([conversations[i] for i in chosen])
        seeds = [generators(4)[i] for i in chosen]
        mask = draw_image_mask(inputs["input_ids"], processor.image_token_id, 0.6, seeds)
        with torch.no_grad():
            output = encoder(**inputs, image_mask=mask)
        masks = output.condition_mask
        assert (masks is None) == (condition_tokens == "queries")
        return [c if masks is None else c[masks[i]] for i, c in enumerate(output.condition)]

    together = conditions([0, 1, 2, 3])
    for i, condition in enumerate(together):
        (alone,) = conditions([i])
        assert alone.shape == condition.shape
        assert (alone - condition).abs().max() < 1e-4


def test_all_rows_are_prefix_and_queries(make_encoder, batch):
    with torch.no_grad():
        rows = make_encoder(condition_tokens="all")(**batch)
        queries = make_encoder()(**batch).condition
    assert rows.condition.shape[1] == batch["input_ids"].shape[1] + 16
    assert torch.equal(rows.condition_mask[:, :-16], batch["attention_mask"].bool())
    assert torch.equal(rows.condition[:, -16:], queries)


def test_without_queries_the_rows_are_the_mllms_own(make_encoder, batch, image_mask, tmp_path):
    encoder = make_encoder(num_queries=0, condition_tokens="all")
    assert encoder.adapter is None and not list(filter(lambda p: p.requires_grad, encoder.parameters()))
    with torch.no_grad():
        rows = encoder(**batch, image_mask=image_mask, output_hidden_states=True)
        embeddings, mask, positions = encoder.embed(**batch, image_mask=image_mask)
        hidden = encoder.mllm.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions
        )
    assert torch.equal(rows.condition, hidden.last_hidden_state) and torch.equal(rows.condition_mask, mask.bool())
    assert not rows.hidden_states

    encoder.mllm.save_pretrained(tmp_path / "mllm")
    encoder.config.mllm_name_or_path = str(tmp_path / "mllm")
    encoder.save_pretrained(tmp_path / "encoder", include_frozen=False)
    loaded = IOMMConditionEncoder.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(loaded(**batch, image_mask=image_mask).condition, rows.condition)


def test_adapter_has_the_papers_weights():
    adapter = ResidualQueryAdapter(hidden_size=1536, num_queries=256, head_dim=128)
    assert sum(p.numel() for p in adapter.parameters()) == 28_718_592
    assert abs(adapter.queries.std() - 1536**-0.5) < 1e-3


def test_mllm_stays_frozen_and_in_eval_mode(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path)
    for model in (encoder, IOMMConditionEncoder.from_pretrained(tmp_path)):
        model.train().requires_grad_(True)
        assert not model.mllm.training and not any(m.training for m in model.mllm.modules())
        assert not any(p.requires_grad for p in model.mllm.parameters())
        assert model.adapter.training and all(p.requires_grad for p in model.adapter.parameters())


def test_integers_of_a_quantised_adapter_do_not_train(make_encoder):
    encoder = make_encoder()
    encoder.adapter.rounded = torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    trains = {name: p.requires_grad for name, p in encoder.requires_grad_(True).adapter.named_parameters()}
    assert [name for name, value in trains.items() if not value] == ["rounded"]


def test_training_leaves_the_mllm_and_its_answers_alone(make_encoder, processor, images, batch, image_mask):
    encoder = make_encoder(connector_layers=1).train()
    question = processor.encode([processor.understand("Describe the image.", images[0])])
    before = copy.deepcopy(encoder.mllm.state_dict())
    answer = encoder.generate(**question, max_new_tokens=8, do_sample=False)
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-2)
    start = encoder.adapter.queries.clone()
    for _ in range(3):
        optimizer.zero_grad()
        encoder(**batch, image_mask=image_mask).condition.square().mean().backward()
        optimizer.step()
    assert not torch.equal(encoder.adapter.queries, start)
    assert all(torch.equal(value, before[name]) for name, value in encoder.mllm.state_dict().items())
    assert torch.equal(encoder.generate(**question, max_new_tokens=8, do_sample=False), answer)


def test_left_out_mllm_comes_from_its_reference(make_encoder, batch, tmp_path):
    encoder = make_encoder()
    encoder.mllm.save_pretrained(tmp_path / "mllm")
    encoder.config.mllm_name_or_path = str(tmp_path / "mllm")
    encoder.config.mllm_hash = hash_weight_files(tmp_path / "mllm")
    encoder.save_pretrained(tmp_path / "encoder", include_frozen=False)
    size = (tmp_path / "encoder" / "model.safetensors").stat().st_size
    assert size < 1.1 * 4 * sum(p.numel() for p in encoder.adapter.parameters())

    loaded = IOMMConditionEncoder.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).condition, encoder(**batch).condition)
    assert not any(p.requires_grad for p in loaded.mllm.parameters()) and not loaded.mllm.training


def test_a_frozen_weight_is_never_freshly_initialised(make_encoder, tmp_path):
    encoder = make_encoder()
    with pytest.raises(ValueError, match="mllm_name_or_path"):
        encoder.save_pretrained(tmp_path / "encoder", include_frozen=False)

    encoder.mllm.save_pretrained(tmp_path / "mllm")
    encoder.config.mllm_name_or_path = str(tmp_path / "mllm")
    encoder.config.mllm_hash = hash_weight_files(tmp_path / "mllm")
    encoder.save_pretrained(tmp_path / "encoder", include_frozen=False)
    other = make_encoder()
    with torch.no_grad():
        other.mllm.lm_head.weight += 1
    other.mllm.save_pretrained(tmp_path / "mllm")
    with pytest.raises(OSError, match="not the one that this checkpoint was trained with"):
        IOMMConditionEncoder.from_pretrained(tmp_path / "encoder")

    (tmp_path / "mllm" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="mllm"):
        IOMMConditionEncoder.from_pretrained(tmp_path / "encoder")


def test_an_incomplete_checkpoint_is_refused(make_encoder, tmp_path):
    encoder = make_encoder()
    state = {name: value for name, value in encoder.state_dict().items() if name != "adapter.queries"}
    encoder.save_pretrained(tmp_path / "no_queries", state_dict=state)
    with pytest.raises(OSError, match="adapter.queries"):
        IOMMConditionEncoder.from_pretrained(tmp_path / "no_queries")

    name = next(name for name in encoder.state_dict() if "vision_tower" in name and name.endswith("weight"))
    state = {key: value for key, value in encoder.state_dict().items() if key != name}
    encoder.save_pretrained(tmp_path / "no_vision", state_dict=state)
    with pytest.raises(OSError, match="incomplete"):
        IOMMConditionEncoder.from_pretrained(tmp_path / "no_vision")

    state = {key: value for key, value in encoder.mllm.state_dict().items() if "norm" not in key}
    encoder.mllm.save_pretrained(tmp_path / "mllm", state_dict=state)
    with pytest.raises(OSError, match="incomplete"):
        load_mllm(tmp_path / "mllm")


def test_bad_inputs_are_refused_with_the_numbers(make_encoder, batch, processor, images):
    encoder = make_encoder()
    with pytest.raises(ValueError, match="no pixel_values"):
        encoder(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="64 image tokens"):
        encoder(**batch | {"pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="image tokens only"):
        encoder(**batch, image_mask=torch.ones_like(batch["input_ids"], dtype=torch.bool))
    with pytest.raises(ValueError, match="longer than the 1024"):
        encoder(**processor.encode([processor.text_to_image("circle " * 1200)]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("condition_tokens", "some"),
        ("mask_mode", "hide"),
        ("num_queries", -1),
        ("num_queries", 0),  # the generator would have nothing to read
        ("adapter_type", "deep"),
        ("connector_layers", -1),
        ("adapter_head_dim", 100),
    ],
)
def test_config_refuses_what_it_does_not_know(processor, field, value):
    from iomm_hf.tiny import tiny_mllm_config

    with pytest.raises(Exception, match=field):
        IOMMConfig(**{"mllm_config": tiny_mllm_config(processor), "adapter_head_dim": 32, field: value})


def test_sliding_window_language_models_are_refused(processor):
    mllm = PRESETS["tiny"].mllm_config
    text_config = mllm["text_config"] | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = InternVLConfig(**mllm | {"text_config": text_config})
    with pytest.raises(ValueError, match="sliding_attention"):
        IOMMConditionEncoder(IOMMConfig(mllm_config=config, adapter_head_dim=32))
