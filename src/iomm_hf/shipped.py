"""Where the tiny trained model lies that comes with this package."""

from pathlib import Path


def shipped_model() -> Path:
    r"""
    Folder of the small model that this package ships, trained on the shapes world.

    Returns:
        `Path` of a pipeline folder, frozen parts included.

    Example:

    ```python
    >>> import iomm_hf
    >>> pipe = iomm_hf.IOMMPipeline.from_pretrained(iomm_hf.shipped_model())
    ```
    """
    return Path(__file__).parent / "assets" / "tiny"
