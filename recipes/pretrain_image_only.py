"""Stage 1: image-only pre-training. The generator learns to draw from pictures without a word of text.

    accelerate launch recipes/pretrain_image_only.py --config recipes/configs/shapes-pretrain.yaml
    accelerate launch recipes/pretrain_image_only.py --config ... --images my_pictures/ --output_dir outputs/mine

Flags override the YAML file; `--help` explains every field. The same command again resumes a stopped run.
"""

from trl import TrlParser

from iomm_hf.training import PretrainConfig, train


def main(config: PretrainConfig):
    print(f"Finished: {train(config)}")


if __name__ == "__main__":
    main(*TrlParser(PretrainConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
