import pytest

from ghostify import skip_reasons


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (skip_reasons.FIRST_CONV, "first convolution (keep_first)"),
        (skip_reasons.grouped(4), "grouped convolution"),
        (skip_reasons.no_ghost_maps(1.5, 2), "no ghost maps at ratio 1.5"),
        (skip_reasons.no_macs_saved(64, 68), "no MACs saved"),
    ],
)
def test_kind_of_a_reason_has_no_details(reason, kind):
    assert skip_reasons.kind_of(reason) == kind
