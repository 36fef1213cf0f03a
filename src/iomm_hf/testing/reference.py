"""The method as written, with nothing saved: what the fast paths must equal, and are timed against."""

import torch

from ..modeling_iomm import IOMMConditionEncoder


def plain_full_pass(
    encoder: IOMMConditionEncoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
    image_features: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    One pass of the MLLM over [c, q(c)], with a graph over every row and masked tokens hidden but present: no cached prefix,
    no dropping. Takes what the encoder takes.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_queries, hidden_size)`: the condition.

    Raises:
        `ValueError`: an encoder without queries.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.testing.reference import plain_full_pass
    >>> from iomm_hf.tiny import tiny_encoder, tiny_processor
    >>> processor = tiny_processor()
    >>> encoder = tiny_encoder(processor, condition_tokens="queries")
    >>> inputs = processor.encode([processor.text_to_image("a star")])
    >>> bool((plain_full_pass(encoder, **inputs) - encoder(**inputs).condition).abs().max() < 1e-4)
    True
    ```
    """
    if encoder.adapter is None:
        raise ValueError("An encoder with num_queries=0 has no queries to pass.")
    mask = attention_mask.bool()
    embeddings, _, positions = encoder.embed(input_ids, mask, pixel_values, image_features=image_features)
    visible = mask if image_mask is None else mask & ~image_mask
    queries = encoder.adapter(embeddings, visible)
    query_positions = mask.sum(-1, keepdim=True) + torch.arange(queries.shape[1], device=mask.device)
    hidden = encoder.mllm.model.language_model(
        inputs_embeds=torch.cat([embeddings, queries], dim=1),
        attention_mask=torch.cat([visible, visible.new_ones(queries.shape[:2])], dim=1).long(),
        position_ids=torch.cat([positions, query_positions], dim=1),
        use_cache=False,
    ).last_hidden_state
    rows = hidden[:, -queries.shape[1] :]
    for layer in encoder.connector:
        rows = layer(rows, None)
    return rows
