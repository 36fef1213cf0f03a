"""The shipped model, and the demo's page served at a free port: what a visitor gets."""

import pytest

from iomm_hf.demo import app, model


@pytest.fixture(scope="module")
def shipped():
    return model.load(device="cpu")


@pytest.fixture(scope="module")
def page():
    """The page, served."""
    page = app.build(device="cpu")
    page.launch(**app.launch_options() | {"prevent_thread_lock": True})
    yield page
    page.close()


@pytest.fixture(scope="module")
def address(page) -> str:
    return page.local_url
