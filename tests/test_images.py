import base64
import io

import torch
from PIL import Image

from ghostify.reporting.images import data_uri, grey_tile, grid, write_grid


def test_a_tile_is_black_where_the_scale_is_least_and_white_where_it_is_most():
    values = torch.linspace(0, 1, 64).reshape(8, 8)
    tile = grey_tile(values, values, 16)
    assert tile.shape == (1, 16, 16)
    assert tile[0, 0, 0] == 0
    assert tile[0, -1, -1] == 1


def test_tiles_are_written_as_files_and_as_data_uris(tmp_path):
    tiles = [grey_tile(torch.rand(4, 4), torch.rand(4, 4), 20) for _ in range(6)]
    with Image.open(write_grid(tiles, 3, tmp_path / "g.png")) as image:
        assert image.size == grid(tiles, 3).size == (3 * 22 + 2, 2 * 22 + 2)
    kind, _, data = data_uri(tiles[0]).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (20, 20)
