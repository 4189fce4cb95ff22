import base64
import io

import torch
from PIL import Image

from ghostify.reporting.images import data_uri, grey_tile, grid, write


def test_a_tile_is_black_where_the_scale_is_least_and_white_where_it_is_most():
    shown = torch.linspace(0, 1, 64).reshape(8, 8)
    made = grey_tile(shown, shown, 16)
    assert made.shape == (1, 16, 16)
    assert made[0, 0, 0] == 0
    assert made[0, -1, -1] == 1


def test_pictures_survive_as_files_and_as_addresses(tmp_path):
    tiles = [grey_tile(torch.rand(4, 4), torch.rand(4, 4), 20) for _ in range(6)]
    with Image.open(write(tiles, 3, tmp_path / "g.png")) as found:
        assert found.size == grid(tiles, 3).size == (3 * 22 + 2, 2 * 22 + 2)
    kind, _, data = data_uri(tiles[0]).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        assert found.size == (20, 20)
