"""Stage 0: teaches an MLLM to speak of pictures, from chats about images; TRL's SFTTrainer does the work.

    python recipes/sft_mllm.py --config recipes/configs/shapes-mllm.yaml
    python recipes/sft_mllm.py --model_name_or_path OpenGVLab/InternVL3-2B-hf --dataset_name user/chats \
        --use_peft --lora_r 16 --lora_target_modules q_proj k_proj v_proj o_proj --output_dir outputs/mine/mllm

The data set has the columns `images`, `prompt` and `completion`, or `images` and `messages`, as TRL's documentation has them; a
folder of parquet files or a Hub id. The tiny MLLM learns all it knows here; the same recipe adapts a full-size one to the
pictures of a domain before stage 1, with LoRA, which is merged in at the end. Flags override the YAML file.
"""

from pathlib import Path

import torch
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from iomm_hf.modeling_iomm import load_mllm, resolve_frozen
from iomm_hf.processing_iomm import IOMMProcessor
from iomm_hf.training.checkpoints import whole_folder


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig):
    if script_args.dataset_name is None or model_args.model_name_or_path is None:
        raise ValueError("Give the chats and the MLLM: --dataset_name FOLDER_OR_ID --model_name_or_path FOLDER_OR_ID.")
    folder = resolve_frozen(model_args.model_name_or_path, model_args.model_revision)
    mllm = load_mllm(folder, dtype=torch.float32).requires_grad_(True)
    processor = IOMMProcessor.from_pretrained(folder)
    dataset = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    trainer = SFTTrainer(
        model=mllm,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trained = trainer.accelerator.unwrap_model(trainer.model)
    if model_args.use_peft:
        trained = trained.merge_and_unload()
    final = Path(training_args.output_dir) / "final"
    with whole_folder(final, trainer.accelerator) as writing:
        if trainer.accelerator.is_main_process:
            trained.save_pretrained(writing)
            processor.save_pretrained(writing)
    trainer.accelerator.print(f"Finished: {final}")


if __name__ == "__main__":
    main(
        *TrlParser(
            (ScriptArguments, SFTConfig, ModelConfig), description=__doc__.splitlines()[0]
        ).parse_args_and_config()
    )
