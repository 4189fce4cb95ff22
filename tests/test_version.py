import importlib
from importlib import metadata

import ghostify
from ghostify.io.checkpoint import versions


def test_the_version_is_that_of_the_installed_package():
    assert ghostify.__version__ == metadata.version("ghostify") == versions()["ghostify"]


def test_a_source_tree_has_a_version_too(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", version)
        assert importlib.reload(ghostify).__version__ == "0+unknown"
    assert importlib.reload(ghostify).__version__ != "0+unknown"
