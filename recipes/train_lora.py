"""LoRA: a finished pipeline learns a style or a subject from 10 to 1,000 pictures, with captions or without.

    accelerate launch recipes/train_lora.py --config recipes/configs/shapes-lora.yaml --images my_pictures/
    accelerate launch recipes/train_lora.py --init_from user/model --images my_pictures/ --lora_rank 32 --output_dir outputs/mine

Pictures with captions are `pairs` in a YAML file, as in finetune_mixed.py. Flags override the YAML file; `--help` explains every
field. The same command again resumes a stopped run. Afterwards: `pipe.load_lora_weights("outputs/mine/final")`.
"""

from trl import TrlParser

from iomm_hf.training import LoraTrainingConfig, train


def main(config: LoraTrainingConfig):
    print(f"Finished: {train(config)}")


if __name__ == "__main__":
    main(*TrlParser(LoraTrainingConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
