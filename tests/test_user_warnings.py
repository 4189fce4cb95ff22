"""A warning names the line that called the package, however deep it arises."""

import warnings

import pytest
from torch import nn

import ghostify
from ghostify.user_warnings import warn_user


def test_a_warning_points_at_the_users_line():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)).eval()
    with pytest.warns(ghostify.GhostifyWarning, match="no convolution is rewritten") as warned:
        ghostify.ghostify(model)
    assert warned[0].filename == __file__


def test_warnings_of_this_package_can_be_silenced_by_their_class():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ghostify.GhostifyWarning)
        warn_user("silent")
    with pytest.warns(DeprecationWarning, match="old"):
        warn_user("old", DeprecationWarning)
