import pytest
import torch

from ghostify.graph.execution_regions import recorded_regions


@pytest.mark.parametrize(
    "region",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        lambda: torch.autocast("cpu", enabled=False),
        lambda: torch.set_grad_enabled(False),  # it takes effect when it is made
    ],
    ids=["no_grad", "inference_mode", "autocast", "no autocast", "set_grad_enabled"],
)
def test_a_region_is_recorded_while_it_is_active_whatever_the_caller_has_set(region):
    with torch.no_grad(), torch.autocast("cpu"):
        with recorded_regions() as regions:
            assert regions.is_default()
            with region():
                assert not regions.is_default()
            assert regions.is_default()
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")


def test_gradients_that_are_enabled_or_depend_on_a_value_are_refused():
    with recorded_regions(), pytest.raises(TypeError, match="it enables gradients"), torch.enable_grad():
        pass
