"""What tests of benchmarks and judges share."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from iomm_hf.evaluation.authors_files import REPOSITORIES
from iomm_hf.evaluation.benchmarks import PROMPTS, read_lines
from iomm_hf.tiny import seeded, train_tokenizer


WORDING = """
def build(prompt_data, image):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You judge {strictly}."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f'''Of "{prompt_data["Prompt"]}" ({prompt_data['Explanation']}).'''},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]},
    ]
"""
QUESTIONS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
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


@pytest.fixture(scope="session")
def write_files():
    """Writes a benchmark's files into a folder in their authors' form, with items of our own."""

    def write(name: str, folder: Path) -> Path:
        origin = REPOSITORIES[name]
        for file in (*origin.prompts, origin.wording):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        if name == "dpg":
            items = [row["item_id"] for row in read_lines(PROMPTS / "dpg.jsonl")]
            rows = [f"{item},x,,1,0,e,w,t,Is it red?\n{item},x,,2,1,e,w,t,Is it there?" for item in items]
            (folder / origin.wording).write_text("\n".join([QUESTIONS, *rows]))
        elif name == "imgedit":
            (folder / "pictures/animal").mkdir(parents=True)
            Image.new("RGB", (64, 64), "green").save(folder / "pictures/animal/1.jpg")
            items = {
                str(i): {"id": "animal/1.jpg", "prompt": f"edit {i}", "edit_type": "add" if i % 2 else "style"}
                for i in range(1, 738)
            }
            (folder / origin.prompts[0]).write_text(json.dumps(items))
            wording = {"add": "Add <edit_prompt>!", "style": "Style <edit_prompt>!"}
            (folder / origin.wording).write_text(json.dumps(wording))
        else:  # both forms of WISE
            per_file = (range(1, 401), range(401, 701), range(701, 1001))
            for file, ids in zip(origin.prompts, per_file, strict=True):
                rows = [
                    {"prompt_id": i, "Prompt": f"thing {i}", "Explanation": f"it is {i}", "Subcategory": "x"}
                    for i in ids
                ]
                (folder / file).write_text(json.dumps(rows))
            (folder / origin.wording).write_text(WORDING)
        return folder

    return write
