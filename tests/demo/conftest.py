"""The shipped model, and the demo's page served at a free port: what a visitor gets."""

import pytest

from iomm_hf.demo import app, model


@pytest.fixture(scope="module")
def shipped():
    return model.load(device="cpu")


@pytest.fixture(scope="module")
def address():
    """Where the page is served."""
    page = app.build(device="cpu")
    _, url, _ = page.launch(**app.launch_options() | {"prevent_thread_lock": True})
    yield url
    page.close()
