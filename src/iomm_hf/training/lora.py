"""What a LoRA's run does otherwise: everything is frozen but small matrices beside the weights, and the result is these alone.

Its checkpoints hold no pipeline, so a resumed run loads the base anew and makes sure that it is the same.
"""

import json
from pathlib import Path

from peft import LoraConfig
from torch import nn

from ..hub.card import source_name
from ..pipeline_iomm import IOMMPipeline
from ..shipped import shipped_model
from .config import LoraTrainingConfig
from .module import IOMMTrainingModule
from .setup import build_pipeline, hash_module


# Every linear layer of adapter and connector; a pattern must match a whole name, so the MLLM has no part in it.
ADAPTER_LAYERS = r"(adapter|connector)\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def hash_weights(pipeline: IOMMPipeline) -> str:
    """Identity of what a LoRA was trained beside: all of the pipeline's weights."""
    return hash_module(
        nn.ModuleDict({name: getattr(pipeline, name) for name in ("text_encoder", "transformer", "vae")})
    )


def reload_base(config: LoraTrainingConfig, run: Path) -> IOMMPipeline:
    r"""
    The pipeline that the run in progress adapts, loaded again.

    Raises:
        `ValueError`: its weights are no longer those that the run began with.
    """
    pipeline = build_pipeline(config)
    expected, found = json.loads(run.read_text())["base_hash"], hash_weights(pipeline)
    if expected != found:
        raise ValueError(
            f"The weights in {config.init_from} have changed since this run began (hash {found}, expected {expected}), so it"
            " cannot be resumed exactly. Bring the old ones back, or start a new output_dir."
        )
    return pipeline


def add_lora(module: IOMMTrainingModule, config: LoraTrainingConfig):
    r"""
    Freezes encoder and generator and puts a LoRA named `default` beside their layers; it starts as no change at all.

    Raises:
        `ValueError`: a target that no layer's name ends with, or `lora_on_adapter` without an adapter that has layers.
    """
    encoder, transformer = module.encoder, module.transformer
    names = [name for name, _ in transformer.named_modules()]
    unknown = [
        target for target in config.lora_targets if not any(f".{name}".endswith(f".{target}") for name in names)
    ]
    if unknown:
        raise ValueError(
            f"lora_targets {unknown} match no layer of {type(transformer).__name__}, such as {names[-1]}."
        )
    if config.lora_on_adapter and not any(isinstance(layer, nn.Linear) for layer in adapter_layers(module)):
        raise ValueError("lora_on_adapter=True, but this pipeline's adapter and connector have no layers to adapt.")

    encoder.requires_grad_(False)
    transformer.requires_grad_(False)
    rank, alpha = config.lora_rank, config.lora_alpha or config.lora_rank
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=config.lora_targets))
    if config.lora_on_adapter:
        encoder.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=ADAPTER_LAYERS))


def adapter_layers(module: IOMMTrainingModule) -> list[nn.Module]:
    """Of adapter and connector."""
    parts = [part for part in (module.encoder.adapter, module.encoder.connector) if part is not None]
    return [layer for part in parts for layer in part.modules()]


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- lora
- iomm
{base_model}---

# LoRA for {base}

Unofficial: made with iomm-hf, an open implementation of IOMM (arXiv:2603.16139) that is not its authors'. This folder holds a LoRA
and none of the weights that it was trained beside.

| | |
|---|---|
| base | {base} |
| adapted | {adapted} |
| rank, alpha | {rank}, {alpha} |
| weights | {weights:,} |
| pictures from | {sources} |
| text | {text} |
| training | {steps} steps, {samples:,} samples, learning rate {rate:g}, seed {seed} |

```python
from iomm_hf import IOMMPipeline{shipped_import}

pipe = IOMMPipeline.from_pretrained({load})
pipe.load_lora_weights("path/to/this/folder")  # or its id on the Hub
picture = pipe("a red circle").images[0]
```

No licence is stated here. What may be done with it follows from the licences of the base and of the pictures.
"""


def lora_card(config: LoraTrainingConfig, module: IOMMTrainingModule, step: int, samples: int) -> str:
    """The README.md of a finished LoRA. Of a base on this machine it says the last name alone, of pictures here none."""
    assert config.init_from is not None  # filled in by the settings
    path = Path(config.init_from)
    shipped = path == shipped_model()
    if shipped:
        base, load = "the tiny model that comes with iomm-hf", "shipped_model()"
    else:
        base = path.name if path.is_dir() else config.init_from
        load = f'"{base}"'
    targets = ", ".join(f"`{target}`" for target in config.lora_targets)
    kinds = {(False, True): "captions", (True, False): "none", (True, True): "captions of some"}
    return CARD.format(
        base_model="" if path.is_dir() else f"base_model: {config.init_from}\nbase_model_relation: adapter\n",
        base=base,
        load=load,
        shipped_import=", shipped_model" if shipped else "",
        adapted=f"generator ({targets})" + (", adapter and connector" if config.lora_on_adapter else ""),
        rank=config.lora_rank,
        alpha=config.lora_alpha or config.lora_rank,
        weights=sum(weight.numel() for weight in module.trainable_parameters()),
        sources=", ".join(
            dict.fromkeys(source_name(source.path) for source in [*config.image_sources, *config.paired_sources])
        ),
        text=kinds[bool(config.images), bool(config.pairs)],
        steps=step,
        samples=samples,
        rate=config.learning_rate,
        seed=config.seed,
    )
