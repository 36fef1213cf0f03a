"""The Space's entry point. What it shows is `iomm_hf.demo.app`, which `iomm-hf publish-space` uploads beside this file."""

import os

from iomm_hf.demo.app import serve


if __name__ == "__main__":
    serve(os.environ.get("IOMM_CHECKPOINT") or None)
