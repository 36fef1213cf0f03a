"""The condition path, its language model part at full width: cached prefix and dropped tokens against the plain full pass.

    python benchmarks/condition_path.py

Both give the same condition and gradients (tests/test_modeling_iomm.py). D = 1536 as in InternVL3-2B, 4 of its 28 layers, 256
image tokens, 256 queries, forward and backward; the vision tower is left out, as it is where vision tokens are cached. On a GPU
equality is checked in float32 and bf16 is timed.
"""

from dataclasses import dataclass, field

import torch
from timing import compare, record, saved_bytes
from transformers import InternVLConfig
from trl import TrlParser

from iomm_hf import IOMMConditionEncoder, IOMMConfig
from iomm_hf.modeling_iomm import draw_image_mask
from iomm_hf.testing.reference import plain_full_pass


WORDING = 24  # tokens of chat template and instruction around the picture
CASES = {"pre-training, r = 0.85": 0.85, "pre-training, r = 0.45": 0.45, "editing, nothing masked": 0.0}


@dataclass
class ConditionPathConfig:
    layers: int = field(default=4, metadata={"help": "Layers of the language model."})
    hidden_size: int = field(default=1536, metadata={"help": "Its width D."})
    image_tokens: int = field(default=256, metadata={"help": "Image tokens of a picture."})
    queries: int = field(default=256, metadata={"help": "Learned queries."})
    batch_size: int = field(default=2, metadata={"help": "Pictures a pass."})
    rounds: int = field(default=10, metadata={"help": "Timed runs of both."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of condition_path.json."})


def build(config: ConditionPathConfig) -> IOMMConditionEncoder:
    torch.manual_seed(0)
    heads = config.hidden_size // 128
    return IOMMConditionEncoder(
        IOMMConfig(
            mllm_config=InternVLConfig(
                vision_config={
                    "num_hidden_layers": 1,
                    "hidden_size": 64,
                    "intermediate_size": 64,
                    "num_attention_heads": 1,
                },
                text_config={
                    "model_type": "qwen2",
                    "hidden_size": config.hidden_size,
                    "num_hidden_layers": config.layers,
                    "num_attention_heads": heads,
                    "num_key_value_heads": max(1, heads // 6),
                    "intermediate_size": config.hidden_size * 35 // 6,
                    "vocab_size": 512,
                },
                image_token_id=500,
                image_seq_length=config.image_tokens,
            ),
            num_queries=config.queries,
        )
    ).train()


def main(config: ConditionPathConfig):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = build(config).to(device)
    ids = torch.full((config.batch_size, WORDING + config.image_tokens), 7, device=device)
    ids[:, WORDING // 2 : WORDING // 2 + config.image_tokens] = encoder.image_token_id
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "image_features": torch.randn(config.batch_size, config.image_tokens, config.hidden_size, device=device),
    }
    results = {}
    for name, ratio in CASES.items():
        generators = [torch.Generator().manual_seed(seed) for seed in range(config.batch_size)]
        hidden = draw_image_mask(ids, encoder.image_token_id, ratio, generators)

        def fast(hidden=hidden):
            return encoder(**batch, image_mask=hidden).condition

        def plain(hidden=hidden):
            return plain_full_pass(encoder, **batch, image_mask=hidden)

        encoder.float()
        difference = (fast() - plain()).abs().max().item()
        assert difference < 1e-3, f"the two paths differ by {difference}"
        if device.type == "cuda":
            encoder.bfloat16()
        results[f"{name}: time, plain / ours"] = compare(
            lambda: plain().sum().backward(), lambda: fast().sum().backward(), config.rounds, name
        )
        ours, theirs = (saved_bytes(path, list(encoder.parameters())) for path in (fast, plain))
        results[f"{name}: kept for backward, ours / plain"] = round(ours / theirs, 3)
    record("condition_path", {"layers": config.layers, "batch_size": config.batch_size, **results}, config.output_dir)


if __name__ == "__main__":
    main(*TrlParser(ConditionPathConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
