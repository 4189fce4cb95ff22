import pytest
from torch import nn

from ghostify.imports import import_object


def test_dotted_attributes_are_followed():
    assert import_object("torch:nn.Module.forward") is nn.Module.forward
    assert import_object("torch.nn:Conv2d") is nn.Conv2d


@pytest.mark.parametrize("name", ["torch.nn:Missing", "no_such_module:x", "torch:"])
def test_missing_names_raise_what_importing_raises(name):
    with pytest.raises((ImportError, AttributeError)):
        import_object(name)
