"""A datasets cache of their own."""

import datasets
import pytest


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Keep the user's datasets cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()
