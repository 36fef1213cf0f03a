"""The condition encoder: a frozen multimodal LLM that describes what to draw, and the small adapter that asks it.

The MLLM is causal and the learned queries come last, so no other row depends on a trained weight: the sequence runs once
without a graph into a key-value cache, and only the query rows are differentiated. Output and gradients equal the plain
full pass (see `tests/test_modeling_iomm.py`).

The paper's symbols: `g` is `mllm`, `v` its vision tower, `q` is `adapter`, `c` the embeddings, `M` the mask, `h` the
condition. This file imports torch, transformers and what they need alone, because published checkpoints carry a copy of it.
"""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import SubConfigSpec
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput


FROZEN_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # weights, settings, tokenizer


@strict
class IOMMConfig(PreTrainedConfig):
    r"""
    Configuration of an [`IOMMConditionEncoder`].

    Args:
        mllm_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the frozen MLLM: any InternVL of transformers with a causal, full-attention language model.
        num_queries (`int`, *optional*, defaults to 256):
            Learned queries of the adapter (paper: 256). At 0 there is no adapter and the generator reads the MLLM's own
            rows, as in the paper's ablation; this needs `condition_tokens="all"`.
        adapter_type (`str`, *optional*, defaults to `"residual"`):
            `"residual"` is [`ResidualQueryAdapter`] (the paper's); `"plain"` is [`LearnedQueries`], which it is
            compared with.
        adapter_head_dim (`int`, *optional*, defaults to 128):
            Width of an attention head in adapter and connector; it must divide the MLLM's hidden size. The paper gives
            none, and it does not change the number of weights.
        condition_tokens (`str`, *optional*, defaults to `"queries"`):
            Which rows the generator sees: `"queries"` (length `num_queries`) or `"all"` valid rows. The paper leaves it
            open; with `"queries"` nothing else needs a gradient.
        mask_mode (`str`, *optional*, defaults to `"drop"`):
            What becomes of a masked image token: `"drop"` takes it out of the sequence, its neighbours keep their
            positions (the paper's figure); `"zero"` multiplies it by zero and keeps it (the paper's Algorithm 1).
        connector_layers (`int`, *optional*, defaults to 0):
            Bidirectional layers between MLLM and generator. The paper names none; neighbours use six.
        mllm_name_or_path (`str`, *optional*):
            Where the frozen weights are found when a checkpoint leaves them out: a Hub id or a folder.
        mllm_revision (`str`, *optional*):
            The commit of `mllm_name_or_path` that the adapter was trained against.
        mllm_hash (`str`, *optional*):
            [`hash_weight_files`] of those weights, checked at load: an adapter on another MLLM would draw noise.

    Example:

    ```python
    >>> from iomm_hf import IOMMConfig
    >>> IOMMConfig(num_queries=16, condition_tokens="all").num_queries
    16
    ```
    """

    model_type = "iomm"
    sub_configs_defaults = {"mllm_config": SubConfigSpec(config_class=AutoConfig, model_type="internvl")}

    mllm_config: Any = None  # `SubConfigSpec` makes it a config
    num_queries: int = 256
    adapter_type: Literal["residual", "plain"] = "residual"
    adapter_head_dim: int = 128
    condition_tokens: Literal["queries", "all"] = "queries"
    mask_mode: Literal["drop", "zero"] = "drop"
    connector_layers: int = 0
    mllm_name_or_path: str | None = None
    mllm_revision: str | None = None
    mllm_hash: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_queries < 0:
            raise ValueError(f"num_queries must be 0 or more, got {self.num_queries}.")
        if self.num_queries == 0 and self.condition_tokens == "queries":
            raise ValueError("num_queries=0 leaves the generator nothing to read; set condition_tokens='all'.")
        if self.connector_layers < 0:
            raise ValueError(f"connector_layers must be 0 or more, got {self.connector_layers}.")
        if self.hidden_size % self.adapter_head_dim:
            raise ValueError(
                f"adapter_head_dim={self.adapter_head_dim} does not divide the MLLM's hidden size {self.hidden_size}."
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        return self.mllm_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def hidden_size(self) -> int:
        """Width D of the condition: that of the MLLM's language model."""
        return self.get_text_config().hidden_size


@dataclass
class IOMMConditionOutput(ModelOutput):
    r"""
    condition (`torch.FloatTensor` of shape `(batch_size, num_rows, hidden_size)`):
        What the generator is conditioned on (the paper's `h`).
    condition_mask (`torch.BoolTensor` of shape `(batch_size, num_rows)`, *optional*):
        False on rows that are padding. `None` where every row is valid, as always with `condition_tokens="queries"`.
    hidden_states (`tuple(torch.FloatTensor)` of shape `(batch_size, num_queries, hidden_size)`, *optional*):
        The query rows before the MLLM's first layer and after each one; with `output_hidden_states`.
    """

    condition: torch.Tensor | None = None
    condition_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None


class IOMMAttention(nn.Module):
    """Multi-head attention of `hidden_states` to `context`, four D x D projections with biases."""

    def __init__(self, hidden_size: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor | None
    ) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, Q, d)
        key = self.k_proj(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, L, d)
        value = self.v_proj(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        mask = None if context_mask is None else context_mask[:, None, None, :]  # (B, 1, 1, L), True is seen
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class IOMMMLP(nn.Module):
    """Feed-forward of width 4D with GELU-tanh."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


def layer_norm(hidden_states: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weight or bias, eps 1e-6."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)


class ResidualQueryAdapter(nn.Module):
    r"""
    The residual query adapter (RQA, the paper's `q`): learned queries read the MLLM's *input embeddings* in one
    cross-attention block, and the result is appended to the sequence. No weight of the MLLM changes.

    Each normalised input replaces the input before its residual, as the follow-up's released weights have it. At
    D = 1536 with 256 queries it has 28,718,592 weights, the paper's "29M".

    Args:
        hidden_size (`int`): Width D of the MLLM.
        num_queries (`int`): Number of learned queries.
        head_dim (`int`): Width of an attention head.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf import ResidualQueryAdapter
    >>> adapter = ResidualQueryAdapter(hidden_size=64, num_queries=4, head_dim=32)
    >>> adapter(torch.randn(2, 7, 64), torch.ones(2, 7, dtype=torch.bool)).shape
    torch.Size([2, 4, 64])
    ```
    """

    def __init__(self, hidden_size: int, num_queries: int, head_dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size) / hidden_size**0.5)
        self.attention = IOMMAttention(hidden_size, head_dim)
        self.mlp = IOMMMLP(hidden_size)

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, L, D) embeddings and their (B, L) mask, True where a token may be seen -> (B, num_queries, D)."""
        context = layer_norm(embeddings.to(self.queries.dtype))
        queries = layer_norm(self.queries).expand(len(context), -1, -1)
        queries = layer_norm(queries + self.attention(queries, context, mask))
        return queries + self.mlp(queries)


class LearnedQueries(nn.Module):
    r"""
    Queries that look at nothing before the MLLM reads them (MetaQuery, arXiv:2504.06256): what the paper compares its
    adapter with.

    Args:
        hidden_size (`int`): Width D of the MLLM.
        num_queries (`int`): Number of learned queries.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.modeling_iomm import LearnedQueries
    >>> LearnedQueries(hidden_size=64, num_queries=4)(torch.randn(2, 7, 64), torch.ones(2, 7, dtype=torch.bool)).shape
    torch.Size([2, 4, 64])
    ```
    """

    def __init__(self, hidden_size: int, num_queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size) / hidden_size**0.5)

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.queries.expand(len(embeddings), -1, -1)


class IOMMConnectorLayer(nn.Module):
    """One bidirectional pre-norm layer over the condition rows."""

    def __init__(self, hidden_size: int, head_dim: int):
        super().__init__()
        self.attention = IOMMAttention(hidden_size, head_dim)
        self.mlp = IOMMMLP(hidden_size)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = layer_norm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, normed, mask)
        return hidden_states + self.mlp(layer_norm(hidden_states))


class PrefixLayer(DynamicLayer):
    """Keys and values of the prefix, read-only: asking again, as activation checkpointing does, gives the same answer."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def hash_weight_files(folder: str | Path) -> str:
    """SHA-256 over the names and contents of a folder's safetensors files: the identity of frozen weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` was told of the Hub and holds for every repository, so not its `revision`."""
    names = ("cache_dir", "force_download", "local_files_only", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def resolve_frozen(name_or_path: str, revision: str | None, subfolder: str | None = None, **hub_kwargs) -> Path:
    r"""
    The folder that holds frozen weights, downloaded first if `name_or_path` is a Hub id.

    Raises:
        `OSError`: nothing is found there; the message names id and revision.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        patterns = [f"{subfolder}/{pattern}" for pattern in FROZEN_FILES] if subfolder else FROZEN_FILES
        try:
            folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns, **hub_kwargs))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
            raise OSError(
                f"The frozen weights {name_or_path!r} (revision {revision!r}) were not found, neither as a folder nor"
                " on the Hub nor in its cache. Check the name and the connection, or point to a copy that you have."
            ) from error
    folder = folder / subfolder if subfolder else folder
    if not any(folder.glob("*.safetensors")):
        raise OSError(f"{name_or_path!r} (revision {revision!r}) holds no *.safetensors weights in {folder}.")
    return folder


def draw_image_mask(
    input_ids: torch.Tensor,
    image_token_id: int,
    mask_ratio: float | Sequence[float],
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    r"""
    The paper's Bernoulli mask: each image token is hidden with probability r = `mask_ratio`.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`): The token sequences.
        image_token_id (`int`): The id that marks an image token.
        mask_ratio (`float` or one per sample): r in [0, 1).
        generators (one CPU `torch.Generator` per sample): A sample's mask does not depend on its neighbours.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, length)`, True where an image token is hidden.

    Raises:
        `ValueError`: a mask ratio outside [0, 1).
    """
    ratios = [mask_ratio] * len(input_ids) if isinstance(mask_ratio, float | int) else list(mask_ratio)
    is_image = input_ids == image_token_id
    draws = []
    for count, ratio, generator in zip(is_image.sum(1).tolist(), ratios, generators, strict=True):
        if not 0 <= ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {ratio}: at 1 nothing of the image would be left.")
        draws.append(torch.rand(count, generator=generator) < ratio)
    hidden = torch.zeros_like(is_image)
    hidden[is_image] = torch.cat(draws).to(hidden.device)  # one copy to the device for the whole batch
    return hidden


class IOMMPreTrainedModel(PreTrainedModel):
    config: IOMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualQueryAdapter", "LearnedQueries", "IOMMConnectorLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the MLLM's; transformers would judge by `IOMMAttention`, which is SDPA whatever is set

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # The MLLM initialises itself; what comes here is adapter and connector.
        if isinstance(module, nn.Linear):
            # Scaled by width (our choice): with a fixed 0.02 two pictures' queries would differ by 1 % at small widths.
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ResidualQueryAdapter | LearnedQueries):
            init.normal_(module.queries, std=self.config.hidden_size**-0.5)


class IOMMConditionEncoder(IOMMPreTrainedModel):
    r"""
    Describes to a generator what to draw: a frozen MLLM reads text, an image or both, and the adapter's queries gather
    the answer. Only `adapter` and `connector` train; `mllm` stays frozen and in eval mode whatever is called.

    Args:
        config ([`IOMMConfig`]): The configuration.
        mllm (`PreTrainedModel`, *optional*): A loaded MLLM to build on; random weights without it.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_encoder, tiny_processor
    >>> processor = tiny_processor()
    >>> encoder = tiny_encoder(processor, condition_tokens="queries", num_queries=16)
    >>> inputs = processor.encode([processor.text_to_image("a red circle")])
    >>> encoder(**inputs).condition.shape
    torch.Size([1, 16, 128])
    ```
    """

    def __init__(self, config: IOMMConfig, mllm: PreTrainedModel | None = None):
        super().__init__(config)
        with nullcontext() if mllm is None else torch.device("meta"):  # no memory for weights that `mllm` replaces
            self.mllm = AutoModelForImageTextToText.from_config(config.mllm_config)
        language_config = config.get_text_config()
        layer_types = set(getattr(language_config, "layer_types", None) or ["full_attention"])
        if config.mllm_config.model_type != "internvl" or layer_types != {"full_attention"}:
            raise ValueError(
                "The MLLM must be an InternVL with a full-attention language model, got"
                f" {config.mllm_config.model_type!r} with layers {sorted(layer_types)}."
            )
        self.adapter: nn.Module | None = None
        if config.num_queries and config.adapter_type == "residual":
            self.adapter = ResidualQueryAdapter(config.hidden_size, config.num_queries, config.adapter_head_dim)
        elif config.num_queries:
            self.adapter = LearnedQueries(config.hidden_size, config.num_queries)
        self.connector = nn.ModuleList(
            IOMMConnectorLayer(config.hidden_size, config.adapter_head_dim) for _ in range(config.connector_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()
        if mllm is not None:
            self.mllm = mllm
        self.requires_grad_(True)

    def train(self, mode: bool = True) -> "IOMMConditionEncoder":
        super().train(mode)
        self.mllm.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "IOMMConditionEncoder":
        for name, parameter in self.named_parameters():  # quantised ones may be integers, which cannot train
            trains = not name.startswith("mllm.") and parameter.is_floating_point()
            parameter.requires_grad_(requires_grad and trains)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.mllm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.mllm.set_input_embeddings(value)

    @property
    def image_token_id(self) -> int:
        return self.config.mllm_config.image_token_id

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, h, w) as the language model reads them: the paper's `c_img = v(x)`, (N, P * P, D)."""
        return self.mllm.model.get_image_features(pixel_values).pooler_output

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sequence `c` as the MLLM reads it: embeddings (B, L, D), mask (B, L) and positions (B, L). With
        `mask_mode="drop"` the hidden tokens are gone from it, so L shrinks while positions keep their gaps."""
        is_image = input_ids == self.image_token_id
        embeddings = self.get_input_embeddings()(input_ids)
        num_image_tokens = int(is_image.sum())
        if pixel_values is not None and image_features is not None:
            raise ValueError("image_features are what the vision tower makes of pixel_values: give one or the other.")
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)
        if image_features is None and num_image_tokens:
            raise ValueError(f"input_ids hold {num_image_tokens} image tokens, but no pixel_values were given.")
        if image_features is not None:
            if num_image_tokens != image_features.shape[0] * image_features.shape[1]:
                raise ValueError(
                    f"input_ids hold {num_image_tokens} image tokens, but pixel_values give {image_features.shape[0]} x"
                    f" {image_features.shape[1]}. Were they prepared together by the processor?"
                )
            embeddings = embeddings.masked_scatter(is_image[..., None], image_features.to(embeddings.dtype))

        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if image_mask is None:
            return embeddings, attention_mask, positions
        if image_mask.shape != input_ids.shape or bool((image_mask & ~is_image).any()):
            raise ValueError(
                f"image_mask must have the shape of input_ids {tuple(input_ids.shape)} and hide image tokens only, got"
                f" shape {tuple(image_mask.shape)}."
            )
        if self.config.mask_mode == "zero":
            return embeddings.masked_fill(image_mask[..., None], 0), attention_mask, positions
        keep = attention_mask & ~image_mask
        order = keep.int().argsort(dim=-1, descending=True, stable=True)[:, : int(keep.sum(-1).max())]
        embeddings = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[-1]))
        return embeddings, keep.gather(1, order), positions.gather(1, order)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_mask: torch.BoolTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> IOMMConditionOutput | tuple:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                Sequences built by [`IOMMProcessor`], padded on either side.
            attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
                0 on padding. Defaults to no padding.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                The images of the batch, in the order of their tokens.
            image_mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*):
                True on image tokens to hide, as drawn by [`draw_image_mask`]; `config.mask_mode` says how.
            image_features (`torch.FloatTensor` of shape `(num_images, tokens, hidden_size)`, *optional*):
                In place of `pixel_values`, what [`~IOMMConditionEncoder.image_features`] made of them before.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the query rows of all layers, or of these only; defaults to the config's.
            output_attentions (`bool`, *optional*):
                Accepted, as of every model of transformers; no attentions are returned.

        Raises:
            `ValueError`: image tokens and images do not match, or a sequence is longer than the MLLM takes.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        num_queries = self.config.num_queries
        limit = self.config.get_text_config().max_position_embeddings
        lengths = mask.bool().sum(-1, keepdim=True)  # (B, 1), hidden image tokens included
        if int(lengths.max()) + num_queries > limit:
            raise ValueError(
                f"A sequence of {int(lengths.max())} tokens and {num_queries} queries is longer than the {limit}"
                " positions of the MLLM. Shorten the prompt."
            )

        # The prefix: frozen from end to end, so it needs no graph.
        with torch.no_grad():
            embeddings, mask, positions = self.embed(input_ids, mask.bool(), pixel_values, image_mask, image_features)
            cache = DynamicCache()
            prefix = self.mllm.model.language_model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (B, L, D)

        hidden_states: list[torch.Tensor] = []
        condition: torch.Tensor = prefix
        condition_mask: torch.Tensor | None = mask
        if self.adapter is not None:
            queries = self.adapter(embeddings, mask).to(embeddings.dtype)  # (B, Q, D)
            full_mask = torch.cat([mask, mask.new_ones(len(mask), num_queries)], dim=1)
            query_positions = lengths + torch.arange(num_queries, device=lengths.device)  # (B, Q)
            hidden_states = self._run_queries(queries, full_mask, query_positions, cache)
            condition, condition_mask = hidden_states[-1], None
            if self.config.condition_tokens == "all":
                condition, condition_mask = torch.cat([prefix, condition], dim=1), full_mask
        for layer in self.connector:
            condition = self._checkpointed(layer, condition, condition_mask)

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if isinstance(wanted, bool):
            kept = set(range(len(hidden_states))) if wanted else set()
        else:
            chosen, count = [wanted] if isinstance(wanted, int) else wanted, len(hidden_states)
            if outside := [i for i in chosen if not -count <= i < count]:
                raise ValueError(
                    f"output_hidden_states must be of the {count} states of the query rows, got {outside}."
                )
            kept = {i % count for i in chosen}
        output = IOMMConditionOutput(
            condition=condition,
            condition_mask=condition_mask,
            hidden_states=tuple(s if i in kept else None for i, s in enumerate(hidden_states)) if kept else None,
        )
        return output if return_dict else output.to_tuple()

    def _run_queries(
        self, queries: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> list[torch.Tensor]:
        """The MLLM's layers over the query rows, which see the cached prefix: the rows before the first layer and after
        each one. transformers would drop the cache under its own checkpointing (wrong by 0.12), hence the loop and the
        read-only prefix."""
        language_model = self.mllm.model.language_model
        prefix = Cache(layers=[PrefixLayer(layer) for layer in cache.layers])
        causal_mask = create_causal_mask(
            config=language_model.config,
            inputs_embeds=queries,
            attention_mask=mask,
            past_key_values=prefix,
            position_ids=positions,
        )
        rotary = language_model.rotary_emb(queries, positions)
        hidden_states = [queries]
        for layer in language_model.layers:
            run = partial(
                layer,
                attention_mask=causal_mask,
                position_embeddings=rotary,
                position_ids=positions,
                past_key_values=prefix,
                use_cache=True,
            )
            hidden_states.append(self._checkpointed(run, hidden_states[-1]))
        hidden_states[-1] = language_model.norm(hidden_states[-1])
        return hidden_states

    def _checkpointed(self, function, *args) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)

    @property
    def dtype(self) -> torch.dtype:
        """That of the trained part, which `config.dtype` records; the frozen MLLM may be held in another."""
        return self._any_weight().dtype

    def _any_weight(self) -> nn.Parameter:
        """A trained one, or the MLLM's where none trains."""
        part = next(part for part in (self.adapter, *self.connector, self.mllm) if part is not None)
        return next(part.parameters())

    @torch.no_grad()
    def generate(self, *args, **kwargs) -> torch.LongTensor:
        """The frozen MLLM's own `generate`: captions and answers are exactly those it gave before any training."""
        return self.mllm.generate(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory,
        include_frozen: bool = True,
        state_dict: dict | None = None,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs,
    ):
        r"""
        Writes the encoder. With `include_frozen=False` the MLLM's weights stay out, unless there are no others, and
        loading fetches them from `config.mllm_name_or_path`.

        Raises:
            `ValueError`: `include_frozen=False` without such a reference, or an MLLM that was quantised as it came from one:
                nobody could load the result.
        """
        if include_frozen and getattr(self.mllm, "is_quantized", False):
            raise ValueError("The MLLM was quantised as it came from its reference: save with include_frozen=False.")
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not include_frozen:
            if self.config.mllm_name_or_path is None:
                raise ValueError("include_frozen=False needs config.mllm_name_or_path, from which to load the MLLM.")
            trained = {name: value for name, value in state_dict.items() if not name.startswith("mllm.")}
            state_dict = trained or state_dict  # a file must hold something
        # diffusers passes the last two on only to methods that name them.
        super().save_pretrained(
            save_directory, state_dict=state_dict, max_shard_size=max_shard_size, variant=variant, **kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        r"""
        Loads an encoder. Frozen weights that the checkpoint leaves out come from `config.mllm_name_or_path`, and then
        `quantization_config` is for them alone; a weight that is found nowhere is an error, never a random one.

        Raises:
            `ValueError`: `device_map` for an MLLM that comes from its reference, or a `quantization_config` for one that is
                referred to from the Hub: download the encoder first.
            `OSError`: the checkpoint is incomplete, its MLLM is not found, or is not the one it was trained with.
        """
        # transformers would call a left-out MLLM newly initialised; what is missing raises below. A filter and not a level:
        # at a higher level transformers prints its whole tensor-parallel plan.
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        of_frozen = {}
        if kwargs.get("quantization_config") is not None and leaves_mllm_out(folder):
            of_frozen["quantization_config"] = kwargs.pop("quantization_config")
        report = logging.getLogger("transformers.modeling_utils")
        report.addFilter(silence)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        finally:
            report.removeFilter(silence)
        missing = set(info["missing_keys"])
        redrawn = sorted(name for name, *_ in info["mismatched_keys"] if name.startswith("mllm."))
        if redrawn:  # possible only with `ignore_mismatched_sizes=True`
            raise OSError(f"{pretrained_model_name_or_path} holds frozen weights of other shapes: {redrawn[:3]}.")
        if pretrained_model_name_or_path is not None and missing:
            frozen = {name for name in missing if name.startswith("mllm.")}
            wanted = {name for name in model.state_dict() if name.startswith("mllm.")}
            tied = set(model.all_tied_weights_keys)
            if missing - frozen or (wanted - frozen) - tied:
                raise OSError(
                    f"{pretrained_model_name_or_path} is incomplete: {len(missing)} weights are missing, such as"
                    f" {sorted(missing)[:3]}. Was it copied or downloaded whole?"
                )
            given = [name for name in ("device_map", "quantization_config") if kwargs.get(name) is not None]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} would not reach the MLLM, to which {pretrained_model_name_or_path} only refers."
                    " Load it plainly, save it whole with save_pretrained, and load that."
                )
            model._load_frozen(of_frozen, **hub_options(kwargs))
            info["missing_keys"] = missing - frozen
        model.requires_grad_(True)  # transformers sets it on all weights; this keeps the MLLM's off
        model.eval()
        return (model, info) if output_loading_info else model

    def _load_frozen(self, options: dict[str, Any] | None = None, dtype: torch.dtype | None = None, **hub_kwargs):
        config = self.config
        if config.mllm_name_or_path is None:
            raise OSError(
                "This checkpoint holds no MLLM weights and its config no mllm_name_or_path to load them from."
            )
        folder = resolve_frozen(config.mllm_name_or_path, config.mllm_revision, **hub_kwargs)
        if config.mllm_hash is not None and hash_weight_files(folder) != config.mllm_hash:
            raise OSError(
                f"The MLLM in {folder} is not the one that this checkpoint was trained with: its weights' hash is"
                f" {hash_weight_files(folder)}, expected {config.mllm_hash} ({config.mllm_name_or_path!r}, revision"
                f" {config.mllm_revision!r})."
            )
        device, dtype = self._any_weight().device, dtype or self.dtype
        self.mllm.to("meta")  # frees the placeholders before the real weights arrive
        self.mllm = load_mllm(folder, dtype=dtype, **(options or {}))
        if not getattr(self.mllm, "is_quantized", False):  # a quantised one is where its library put it
            self.mllm.to(device)


def silence(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def leaves_mllm_out(folder: Path) -> bool:
    """Whether an encoder's folder holds trained weights alone."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
    return bool(names) and not any(name.startswith("mllm.") for name in names)


def load_mllm(folder: str | Path, dtype: torch.dtype | str = "auto", **kwargs) -> PreTrainedModel:
    r"""
    A frozen MLLM from a folder, with options of transformers' `from_pretrained`.

    Raises:
        `OSError`: weights are missing there, which transformers would otherwise draw at random.
    """
    mllm, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
    )
    missing = set(info["missing_keys"]) - set(mllm.all_tied_weights_keys)
    if missing:
        raise OSError(
            f"The MLLM in {folder} is incomplete: {len(missing)} weights are missing: {sorted(missing)[:3]}."
        )
    return mllm.eval().requires_grad_(False)


__all__ = ["IOMMConditionEncoder", "IOMMConditionOutput", "IOMMConfig", "ResidualQueryAdapter"]
