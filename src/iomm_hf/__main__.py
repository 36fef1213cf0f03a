"""`python -m iomm_hf` is the command `iomm-hf`; launchers want a module: `accelerate launch -m iomm_hf evaluate ...`."""

from .cli import app


if __name__ == "__main__":
    app(prog_name="iomm-hf")
