"""Edits keep what was asked to be kept, exactly, and masks mean the same whatever file or array they come in."""

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from sampling.editing import (
    VARIATION_STREAM,
    Known,
    blend,
    cells_to_draw,
    fit_mask,
    forced_codes,
    grow_for,
    harmonize,
    known_outside,
    known_rows,
    known_share,
    pixels_of,
    read_mask,
)
from sampling.pipeline import Pipeline
from sampling.random_stream import uniforms
from tessera.data.images import fit_to
from tessera.errors import UserError

CODES = torch.arange(24).reshape(4, 6)
ORIENTATION = 0x0112


def paint(height: int, width: int, *pixels: tuple[int, int]) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    for row, column in pixels:
        mask[row, column] = True
    return mask


def cells_of(mask: Tensor) -> set[tuple[int, int]]:
    return {(int(row), int(column)) for row, column in mask.nonzero()}


def random_image(seed: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# which codes are known


def test_the_first_rows_are_known_and_no_others() -> None:
    known = known_rows(CODES, 3)
    assert known.mask.sum(dim=1).tolist() == [6, 6, 6, 0]
    assert torch.equal(known.codes, CODES)


@pytest.mark.parametrize("rows", [-1, 0, 4, 99])
def test_rows_that_leave_nothing_to_do_are_refused(rows: int) -> None:
    with pytest.raises(UserError, match=f"{rows} known rows of a grid of 4, expected 1 to 3"):
        known_rows(CODES, rows)


def test_outside_of_the_drawn_cells_all_is_known() -> None:
    known = known_outside(CODES, paint(4, 6, (0, 0), (2, 5)))
    assert cells_of(~known.mask) == {(0, 0), (2, 5)}
    with pytest.raises(UserError, match=r"torch.bool \(6, 4\), expected torch.bool \(4, 6\)"):
        known_outside(CODES, paint(6, 4))


def test_codes_that_are_no_grid_are_refused() -> None:
    for codes in (CODES.flatten(), CODES[None], CODES.float()):
        with pytest.raises(UserError, match=r"expected integers \[h, w\]"):
            known_rows(codes, 1)
        with pytest.raises(UserError, match=r"expected integers \[h, w\]"):
            known_share(codes, keep=0.5, seed=0, image_index=0)


@pytest.mark.parametrize(("keep", "count"), [(0.01, 0), (0.1, 2), (0.5, 12), (0.8, 19), (0.99, 24)])
def test_a_variation_keeps_an_exact_count(keep: float, count: int) -> None:
    for image_index in range(20):
        assert int(known_share(CODES, keep=keep, seed=3, image_index=image_index).mask.sum()) == count


def test_a_larger_share_keeps_the_same_cells_and_more() -> None:
    masks = [known_share(CODES, keep=tenths / 10, seed=5, image_index=2).mask for tenths in range(1, 10)]
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert bool((smaller <= larger).all()) and not torch.equal(smaller, larger)


def test_every_image_keeps_cells_of_its_own_and_every_cell_is_kept_as_often() -> None:
    grid = torch.zeros(8, 8, dtype=torch.int64)
    masks = torch.stack([known_share(grid, keep=0.25, seed=7, image_index=index).mask for index in range(400)])
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 400
    frequency = masks.double().mean(dim=0)
    assert float((frequency - 0.25).abs().max()) < 4.5 * (0.25 * 0.75 / 400) ** 0.5
    assert not torch.equal(masks[3], known_share(grid, keep=0.25, seed=8, image_index=3).mask)


def test_what_is_kept_does_not_hang_on_the_numbers_that_draw_codes() -> None:
    mask = known_share(CODES, keep=0.5, seed=1, image_index=4).mask.flatten()
    seeds, indices = torch.tensor([1]), torch.tensor([4])
    own = uniforms(seeds, indices, num_positions=24, stream=VARIATION_STREAM)[0]
    drawing = uniforms(seeds, indices, num_positions=24)[0]
    assert float(own[mask].max()) < float(own[~mask].min())
    assert float(drawing[mask].max()) > float(drawing[~mask].min())


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 80.0, float("nan"), float("inf")])
def test_a_share_outside_of_0_and_1_is_refused(keep: float) -> None:
    with pytest.raises(UserError, match="expected a share between 0"):
        known_share(CODES, keep=keep, seed=0, image_index=0)


def test_images_are_forced_in_raster_order() -> None:
    forced = forced_codes([known_rows(CODES, 1), Known(CODES + 1, paint(4, 6, (1, 2)))])
    assert forced.codes.tolist() == [list(range(24)), list(range(1, 25))]
    assert forced.mask.nonzero().tolist() == [[0, column] for column in range(6)] + [[1, 8]]


# which cells a mask stands for


def test_one_painted_pixel_is_enough_for_its_cell() -> None:
    assert cells_of(cells_to_draw(paint(16, 24, (0, 0), (7, 11), (8, 23)), cell=4)) == {(0, 0), (1, 2), (2, 5)}


def test_growing_takes_neighbors_in_eight_directions_and_stops_at_the_border() -> None:
    painted = paint(16, 24, (0, 9))
    assert cells_of(cells_to_draw(painted, cell=4, grow=1)) == {(row, column) for row in (0, 1) for column in (1, 2, 3)}
    two = cells_to_draw(painted, cell=4, grow=2)
    assert cells_of(two) == {(row, column) for row in (0, 1, 2) for column in range(5)}


@pytest.mark.parametrize(
    ("painted", "grow", "message"),
    [
        (paint(16, 24), 0, "paints nothing"),
        (~paint(16, 24), 0, "leave the init image out"),
        (paint(16, 24, (0, 0)), 1000, "leave the init image out"),
        (paint(16, 22, (0, 0)), 0, "16x22 pixels, expected multiples of 4"),
        (paint(16, 24, (0, 0)), -1, "grow is -1"),
        (paint(16, 24)[None], 0, r"expected torch.bool \[H, W\]"),
        (paint(16, 24).float(), 0, r"expected torch.bool \[H, W\]"),
    ],
)
def test_masks_that_leave_nothing_to_do_are_refused(painted: Tensor, grow: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cells_to_draw(painted, cell=4, grow=grow)


def test_drawn_cells_cover_the_paint_and_whole_cells_only() -> None:
    painted = paint(16, 24, (3, 4), (9, 20))
    to_draw = cells_to_draw(painted, cell=4)
    covered = pixels_of(to_draw, cell=4)
    assert bool(covered[painted].all()) and int(covered.sum()) == 2 * 16
    assert torch.equal(cells_to_draw(covered, cell=4), to_draw)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_codes_give_nothing_away_unless_the_mask_should_grow(kernel_size: Literal[1, 3]) -> None:
    config = DiscreteVAEConfig(widths=(8, 8), blocks=(1, 1), patch_size=2, encoder_kernel_size=kernel_size)
    vae = DiscreteVAE(config)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    images = torch.rand(1, 3, 16, 24)
    painted = paint(16, 24, (8, 8))
    covered = pixels_of(cells_to_draw(painted, cell=4), cell=4)
    repainted = torch.where(covered, 1 - images, images)
    changed = (vae.encode(images) != vae.encode(repainted))[0]
    elsewhere = changed & ~cells_to_draw(painted, cell=4)
    assert bool(changed.any()) and bool(elsewhere.any()) == (grow_for(config) > 0)


def test_the_encoder_of_the_paper_looks_around() -> None:
    assert grow_for(DiscreteVAEConfig(network="paper", patch_size=1, widths=(4, 4), blocks=(1, 1))) == 1
    assert grow_for(DiscreteVAEConfig()) == 0


# reading masks


def stored(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_white_is_drawn_anew_from_128_on(tmp_path: Path) -> None:
    gray = np.full((16, 24), 0, np.uint8)
    gray[0, :4] = 127, 128, 200, 255
    path = stored(Image.fromarray(gray), tmp_path / "mask.png")
    assert cells_of(read_mask(path, (16, 24))) == {(0, 1), (0, 2), (0, 3)}
    assert cells_of(read_mask(str(path), (16, 24))) == {(0, 1), (0, 2), (0, 3)}


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_an_opaque_mask_says_the_same_in_every_mode(mode: str, tmp_path: Path) -> None:
    gray = np.zeros((16, 24), np.uint8)
    gray[4:9, 5:20] = 255
    picture = Image.fromarray(gray)
    picture = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
    painted = read_mask(stored(picture, tmp_path / "mask.png"), (16, 24))
    assert torch.equal(painted, torch.from_numpy(gray > 0))
    if mode != "I;16":
        assert torch.equal(read_mask(picture, (16, 24)), painted)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_are_read(kind: str, tmp_path: Path) -> None:
    gray = np.zeros((16, 24), np.uint8)
    gray[:8] = 255
    painted = read_mask(stored(Image.fromarray(gray), tmp_path / "mask", format=kind), (16, 24))
    assert painted[:7].all() and not painted[9:].any()


def erased(color: tuple[int, int, int]) -> Image.Image:
    """A picture of one color from which a part has been erased."""
    pixels = np.full((16, 24, 4), (*color, 255), np.uint8)
    pixels[2:6, 3:9, 3] = 0
    pixels[10, :3, 3] = 100, 127, 128
    return Image.fromarray(pixels)


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (200, 30, 90)])
def test_transparent_is_drawn_anew_whatever_the_color(color: tuple[int, int, int], tmp_path: Path) -> None:
    expected = paint(16, 24, (10, 0), (10, 1))
    expected[2:6, 3:9] = True
    for source in (erased(color), np.asarray(erased(color)), stored(erased(color), tmp_path / "mask.png")):
        assert torch.equal(read_mask(source, (16, 24)), expected)


def test_a_palette_with_a_transparent_color_is_an_alpha_channel(tmp_path: Path) -> None:
    palette = Image.new("P", (24, 16), 1)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.paste(0, (0, 0, 24, 4))
    path = stored(palette, tmp_path / "mask.png", transparency=0)
    assert cells_of(read_mask(path, (16, 24))) == {(row, column) for row in range(4) for column in range(24)}


def test_the_transparent_color_of_16_bit_gray_is_a_color(tmp_path: Path) -> None:
    gray = np.zeros((16, 24), np.uint16)
    gray[:4] = 65535
    path = stored(Image.fromarray(gray), tmp_path / "mask.png", transparency=65535)
    assert torch.equal(read_mask(path, (16, 24)), torch.from_numpy(gray > 0))


@pytest.mark.parametrize("alpha", [False, True])
def test_a_mask_is_turned_upright_with_its_alpha_channel(alpha: bool, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turn by 90 degrees clockwise
    lying = np.zeros((16, 24, 4 if alpha else 3), np.uint8)
    lying[..., 3:] = 255
    if alpha:
        lying[0, :5, 3] = 0
    else:
        lying[0, :5] = 255
    path = stored(Image.fromarray(lying), tmp_path / "mask.png", exif=exif)
    assert cells_of(read_mask(path, (24, 16))) == {(row, 15) for row in range(5)}


def test_damaged_exif_does_not_hurt_a_sound_alpha_channel(tmp_path: Path) -> None:
    path = stored(erased((9, 9, 9)), tmp_path / "mask.png", exif=b"Exif\0\0garbage")
    assert torch.equal(read_mask(path, (16, 24)), read_mask(erased((9, 9, 9)), (16, 24)))


def test_arrays_and_tensors_are_masks_too() -> None:
    expected = paint(16, 24, (1, 2), (15, 23))
    gray = expected.to(torch.uint8) * 255
    color = gray[..., None].expand(16, 24, 3)
    for source in (expected, expected.numpy(), gray, gray.numpy(), color, color.numpy()):
        assert torch.equal(read_mask(source, (16, 24)), expected)


def test_a_mask_shares_no_memory_with_what_it_was_read_from() -> None:
    source = paint(16, 24, (1, 2))
    read_mask(source, (16, 24))[:] = True
    read_mask(source.numpy(), (16, 24))[:] = True
    assert cells_of(source) == {(1, 2)}


@pytest.mark.parametrize(
    "source",
    [
        torch.zeros(16, 24),
        np.zeros((16, 24), np.int64),
        torch.zeros(3, 16, 24, dtype=torch.uint8),
        np.zeros((16, 24, 2), np.uint8),
        np.zeros((16, 24, 3), bool),
        np.zeros((), bool),
    ],
    ids=lambda source: f"{source.dtype}{list(source.shape)}",
)
def test_arrays_of_other_kinds_are_refused(source: Tensor | np.ndarray) -> None:
    with pytest.raises(UserError, match=r"expected bool \[H, W\], or uint8"):
        read_mask(source, (16, 24))


def test_pictures_of_more_than_8_bits_are_refused() -> None:
    for mode in ("I", "F", "I;16"):
        with pytest.raises(UserError, match=f"mode {mode}, expected 8 bits"):
            read_mask(Image.new(mode, (24, 16)), (16, 24))


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = stored(Image.new("L", (24, 16)), tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask has 16x24 pixels \(height x width\), the image 24x16"):
        read_mask(path, (24, 16))


def test_files_that_are_no_masks_are_named_in_one_line(tmp_path: Path) -> None:
    text, cut, empty = tmp_path / "mask.txt", tmp_path / "cut.png", tmp_path / "empty.png"
    text.write_text("white")
    content = io.BytesIO()
    erased((1, 2, 3)).save(content, "PNG")
    cut.write_bytes(content.getvalue()[:-30])
    empty.touch()
    for path, reason in ((text, "not an image"), (cut, "truncated"), (empty, "empty"), (tmp_path / "no", "No such")):
        with pytest.raises(UserError, match=f"mask .*{path.name}: .*{reason}") as caught:
            read_mask(path, (16, 24))
        assert "\n" not in str(caught.value)


# a mask follows its image to the model's size


@pytest.mark.parametrize("shape", [(160, 90), (90, 160), (37, 101), (16, 24), (10, 9)])
def test_a_mask_is_cropped_and_resized_as_its_image(shape: tuple[int, int]) -> None:
    painted = torch.zeros(shape, dtype=torch.bool)
    painted[shape[0] // 3 : shape[0] // 2, shape[1] // 2 : shape[1] * 3 // 4] = True
    picture = Image.fromarray(painted.numpy().astype(np.uint8) * 255).convert("RGB")
    fitted = torch.from_numpy(fit_to(picture, (16, 24))[..., 0])  # uint8 [16, 24]
    mask = fit_mask(painted, (16, 24))
    assert bool(mask[fitted > 140].all())  # paint is where its image is
    bare = F.pad(~mask, (1, 1, 1, 1), value=True).float()[None]
    inside = F.max_pool2d(bare, 3, stride=1)[0] == 0
    assert bool((fitted[inside] > 127).all())  # and reaches at most a pixel further


def test_a_mask_of_the_right_size_is_kept() -> None:
    painted = torch.rand(16, 24) < 0.3
    assert torch.equal(fit_mask(painted, (16, 24)), painted)


def test_a_stroke_thinner_than_a_pixel_is_not_lost() -> None:
    for column in range(0, 240, 7):
        painted = torch.zeros(160, 240, dtype=torch.bool)
        painted[:, column] = True
        assert cells_of(fit_mask(painted, (16, 24))) == {(row, column // 10) for row in range(16)}


def test_paint_in_the_part_that_is_cropped_away_is_gone() -> None:
    painted = torch.zeros(20, 50, dtype=torch.bool)
    painted[:, :10] = painted[:, 40:] = True
    assert not fit_mask(painted, (16, 24)).any()  # of 50 columns the middle 30 are kept


# seams


def test_a_hard_edge_takes_every_pixel_from_one_of_the_two() -> None:
    original, generated = random_image(1), random_image(2)
    painted = torch.rand(16, 24) < 0.3
    blended = blend(original, generated, painted, feather_pixels=0)
    assert torch.equal(blended, torch.where(painted, generated, original))


@pytest.mark.parametrize("feather", [1, 2, 5])
def test_the_fade_lies_outside_of_the_paint_and_ends_at_the_feather(feather: int) -> None:
    original, generated = random_image(1, 32, 32), random_image(2, 32, 32)
    painted = torch.zeros(32, 32, dtype=torch.bool)
    painted[12:18, 10:20] = True
    blended = blend(original, generated, painted, feather_pixels=feather)
    assert torch.equal(blended[:, painted], generated[:, painted])
    far = torch.ones(32, 32, dtype=torch.bool)
    far[12 - feather : 18 + feather, 10 - feather : 20 + feather] = False
    assert torch.equal(blended[:, far], original[:, far])
    between = ~far & ~painted
    low, high = torch.minimum(original, generated), torch.maximum(original, generated)
    assert bool(((low <= blended) & (blended <= high)).all())
    assert not torch.equal(blended[:, between], original[:, between])


def test_the_fade_falls_in_equal_steps() -> None:
    painted = torch.zeros(8, 12, dtype=torch.bool)
    painted[:, :3] = True
    black, white = torch.zeros(3, 8, 12, dtype=torch.uint8), torch.full((3, 8, 12), 241, dtype=torch.uint8)
    expected = [241, 241, 241, 193, 145, 96, 48, 0, 0, 0, 0, 0]  # rounded
    assert blend(black, white, painted, feather_pixels=4)[1, 5].tolist() == expected


def test_many_generated_images_share_one_original() -> None:
    generated = torch.stack([random_image(seed) for seed in (2, 3)])
    painted = paint(16, 24, (5, 5), (9, 20))
    both = blend(random_image(1), generated, painted, feather_pixels=2)
    assert torch.equal(both[1], blend(random_image(1), generated[1], painted, feather_pixels=2))


def test_images_that_do_not_fit_are_refused() -> None:
    image, painted = random_image(1), paint(16, 24, (0, 0))
    with pytest.raises(UserError, match=r"generated image is torch.uint8 \(3, 8, 8\), expected torch.uint8 .*16, 24"):
        blend(image, random_image(2, 8, 8), painted, feather_pixels=1)
    with pytest.raises(UserError, match="original image is torch.float32"):
        blend(image.float(), image, painted, feather_pixels=1)
    with pytest.raises(UserError, match="feather_pixels is -1"):
        blend(image, image, painted, feather_pixels=-1)


def test_codes_without_paint_survive_the_second_pass_and_the_others_are_of_the_composite(pipeline: Pipeline) -> None:
    vae = pipeline.vae
    original, drawn = torch.rand(3, 16, 24), torch.randint(0, vae.codebook_size, (5, 4, 6))
    generated = vae.decode(drawn)
    painted = torch.zeros(16, 24, dtype=torch.bool)
    painted[5:12, 6:13] = True  # cells of 4x4 pixels: some all paint, some in part
    result = harmonize(vae, generated, original, painted)
    untouched = ~cells_to_draw(painted, cell=4)
    assert torch.equal(result.codes[:, untouched], vae.encode(original[None]).expand(5, 4, 6)[:, untouched])
    composite = generated.clone()
    composite[:, :, ~painted] = original[:, ~painted]
    assert torch.equal(result.codes, vae.encode(composite))
    assert torch.equal(result.pixels, vae.decode(result.codes))
    in_part = ~untouched & ~pixels_all_painted(painted)
    again = vae.encode(generated)
    assert bool((result.codes != again)[:, in_part].any())  # they know of the original's pixels
    assert torch.equal(result.codes[:, pixels_all_painted(painted)], again[:, pixels_all_painted(painted)])


def pixels_all_painted(painted: Tensor) -> Tensor:
    """The cells of 4x4 pixels that are all paint, bool [h, w]."""
    return painted.reshape(4, 4, 6, 4).all(dim=3).all(dim=1)


def test_harmonizing_changes_none_of_its_inputs(pipeline: Pipeline) -> None:
    generated, original = torch.rand(2, 3, 16, 24), torch.rand(3, 16, 24)
    before = generated.clone(), original.clone()
    harmonize(pipeline.vae, generated, original, paint(16, 24, (3, 3)))
    assert torch.equal(generated, before[0]) and torch.equal(original, before[1])
    with pytest.raises(UserError, match=r"original image has shape \(3, 8, 8\)"):
        harmonize(pipeline.vae, generated, original[:, :8, :8], paint(16, 24, (3, 3)))
