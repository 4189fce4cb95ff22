import math
import typing

import pytest

from ghostify import GhostifyError, Recipe
from ghostify.training.recipe import RECIPE_CHECKS, SCHEDULES

WRONG = {
    "epochs": (0, -1.0, math.nan, math.inf, 1e300, None, "many", True),
    "batch": (0, -1, 2.5, "a", None, 2**80),
    "optimizer": ("foo", "", 3, None),
    "learning_rate": (0, -0.1, math.nan, math.inf, "a"),
    "weight_decay": (-1.0, math.nan, "x", None),
    "schedule": ("foo", "none", 3, None),
    "warmup": (-0.1, 2.0, math.nan),
    "distill": (-1.0, math.nan, None),
    "temperature": (0, math.nan, "a"),
    "features": (-1.0, math.nan, [0.1]),
    "labels": (-1.0, math.inf, "abc"),
    "smoothing": (-0.1, 1.0, 5.0),
    "mixup": (-0.1, math.nan, "a"),
    "cutmix": (-0.1, math.nan, "a"),
    "ema": (-0.1, 1.0, 2.0, "a", math.nan),
    "clip": (0, -1.0, "a", math.nan),
    "frozen_norms": ("False", 0, 1, None),
    "precision": ("int8", None, 16),
    "evaluate_every": (0, math.nan, None),
    "patience": (-1, 0, 1.5, "a"),
    "save_every": (0, 1.5, None),
    "workers": (-1, 10**6, "a", None),
    "seed": (-1, 2**80, 1.5, "abc", None),
}


def test_every_setting_has_wrong_values():
    assert set(WRONG) == set(typing.get_type_hints(Recipe))
    assert set(RECIPE_CHECKS) == set(WRONG)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_in_one_line_that_names_its_setting(key, value):
    message = rf"^recipe: {key} [^\n]*: is (not|unknown)[^\n]*\. (Set|Use|Pass) [^\n]*\.$"
    with pytest.raises(GhostifyError, match=message):
        Recipe(**{key: value})


def test_whole_numbers_are_numbers_and_only_optional_settings_may_be_none():
    recipe = Recipe(epochs=2, distill=1, ema=None, clip=None, patience=None, optimizer="lookahead_AdamW")
    assert recipe.epochs == 2
    assert all(Recipe(schedule=name).schedule == name for name in SCHEDULES)
