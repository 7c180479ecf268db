import pytest
import torch

from hf_anomaly.ops.tiles import cut_tiles, draw_tiles, join_tiles


def test_tiles_of_images_and_back():
    images = torch.rand(2, 3, 6, 9)
    tiles = cut_tiles(images, 3)
    for i in range(2):
        for row in range(3):
            for column in range(3):
                expected = images[i, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                assert torch.equal(tiles[9 * i + 3 * row + column], expected)
    assert torch.equal(join_tiles(tiles, 3), images)


def test_chosen_tiles():
    images, chosen = torch.rand(2, 3, 6, 9), torch.tensor([[4, 0], [8, 3]])
    assert torch.equal(cut_tiles(images, 3, chosen), cut_tiles(images, 3)[[4, 0, 17, 12]])


@pytest.mark.parametrize("cut", [cut_tiles, lambda images, tiles: draw_tiles(tiles, images)])
def test_sides_that_are_no_multiple(cut, refused):
    with refused("6×9 pixels", "2×2 tiles"):
        cut(torch.rand(2, 3, 6, 9), 2)
    with refused("9×6 pixels", "2×2 tiles"):
        cut(torch.rand(2, 3, 9, 6), 2)


def test_drawn_tiles():
    images = torch.rand(500, 1, 4, 6)
    torch.manual_seed(0)
    drawn, variants, nothing = draw_tiles(2, images, torch.stack([images, -images], 1), None)
    assert torch.equal(variants, torch.stack([drawn, -drawn], 1))
    assert nothing is None
    matches = (cut_tiles(images, 2).view(500, 4, 1, 2, 3) == drawn[:, None]).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    assert matches.sum(0).min() > 90
    torch.manual_seed(0)
    assert torch.equal(draw_tiles(2, images)[0], drawn)


def test_one_tile_is_the_image_and_takes_no_random_number():
    images = torch.rand(2, 3, 5, 5)
    state = torch.get_rng_state()
    assert draw_tiles(1, images)[0] is images
    assert torch.equal(torch.get_rng_state(), state)
