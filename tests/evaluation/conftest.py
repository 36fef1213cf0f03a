"""What tests of benchmarks and judges share."""

import pytest
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from iomm_hf.tiny import seeded, train_tokenizer


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A tiny random LLaVA: 16 tokens a picture of 32 px."""
    folder = tmp_path_factory.mktemp("vlm")
    tokenizer = train_tokenizer(["Is it red? yes no"], vocab_size=300)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, num_hidden_layers=2, image_size=32, patch_size=8),
        text_config=LlamaConfig(**size, **ends, num_hidden_layers=1, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    with seeded(0):
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder
