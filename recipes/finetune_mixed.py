"""Stage 2: mixed fine-tuning. A small set of pairs, mixed with pictures alone, teaches the generator to follow text.

    accelerate launch recipes/finetune_mixed.py --config recipes/configs/shapes-finetune.yaml
    accelerate launch recipes/finetune_mixed.py --config ... --init_from outputs/mine/final

Flags override the YAML file; `--help` explains every field. The same command again resumes a stopped run.
"""

from trl import TrlParser

from iomm_hf.training import FinetuneConfig, train


def main(config: FinetuneConfig):
    print(f"Finished: {train(config)}")


if __name__ == "__main__":
    main(*TrlParser(FinetuneConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
