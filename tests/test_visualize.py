import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import _pylab_helpers
from PIL import Image

from ocvtp.visualize import (
    Panel,
    _oklab,
    draw_kept_tokens,
    draw_scores,
    draw_slot_masks,
    figure,
    figure_of_images,
    save_figure,
    slot_palette,
    slot_picture,
)


def photo(height=50, width=70, seed=0):
    return np.random.default_rng(seed).integers(60, 256, (height, width, 3), dtype=np.uint8)


def patch_of(size, grid):
    """Token of each pixel, one pixel at a time."""
    (height, width), (rows, columns) = size, grid
    cells = np.zeros(size, dtype=int)
    for y in range(height):
        for x in range(width):
            cells[y, x] = y * rows // height * columns + x * columns // width
    return cells


def inner(cells):
    """Pixels whose eight neighbours are of the same region: not on any line of one pixel."""
    padded = np.pad(cells, 1, mode="edge")
    height, width = cells.shape
    near = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.all([n == cells for n in near], axis=0)


def saturation(pixels):
    pixels = pixels.astype(float)
    return (pixels.max(-1) - pixels.min(-1)).mean() / pixels.mean()


def texts(drawing):
    return [axis.get_title() for axis in drawing.axes if axis.get_title()]


@pytest.mark.parametrize(
    ("size", "grid"), [((48, 64), (6, 8)), ((50, 70), (4, 9)), ((70, 50), (9, 4))]
)
def test_kept_patches_stay_and_the_rest_fades(size, grid):
    image = photo(*size)
    keep = torch.tensor([0, 7, 8, 20])
    drawn = draw_kept_tokens(image, keep, grid)
    cells = patch_of(size, grid)
    kept = np.isin(cells, keep.numpy())
    core = inner(kept)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (kept & core).any()
    assert np.array_equal(drawn[kept & core], image[kept & core])
    assert drawn[~kept].mean() < 0.5 * image[~kept].mean()
    assert saturation(drawn[~kept]) < 0.5 * saturation(image[~kept])
    outline = drawn[kept & ~core]
    assert len(np.unique(outline[(outline != image[kept & ~core]).any(-1)], axis=0)) == 1


def test_kept_patches_have_an_outline_on_each_side():
    image = np.full((30, 30, 3), 100, dtype=np.uint8)
    whole = draw_kept_tokens(image, torch.tensor([4]), (3, 3))
    drawn, line = whole[10:20, 10:20], whole[10, 10]
    ring = np.ones((10, 10), dtype=bool)
    ring[1:-1, 1:-1] = False
    assert (drawn[ring] == line).all()
    assert (drawn[~ring] == 100).all()
    assert (line != 100).any()
    assert (whole == line).all(-1).sum() == ring.sum()


def test_lines_are_thin_on_large_patches_and_absent_on_tiny_ones():
    large = draw_kept_tokens(photo(840, 840), torch.tensor([4]), (3, 3))
    changed = (large[280:560, 280:560] != photo(840, 840)[280:560, 280:560]).any(-1)
    assert changed[140].sum() == 2 * 20  # 280 / 14 on either side
    tiny = photo(12, 12)
    drawn = draw_kept_tokens(tiny, torch.arange(8), (4, 4))
    assert np.array_equal(drawn[:6], tiny[:6])


def test_a_mask_draws_what_its_indices_draw_and_keep_all_is_the_image():
    image = photo()
    mask = torch.rand(20, generator=torch.Generator().manual_seed(0)) < 0.5
    by_index = draw_kept_tokens(image, mask.nonzero()[:, 0], (4, 5))
    assert np.array_equal(draw_kept_tokens(image, mask, (4, 5)), by_index)
    assert np.array_equal(draw_kept_tokens(image, torch.arange(20), (4, 5)), image)
    assert (draw_kept_tokens(image, torch.zeros(0, dtype=torch.long), (4, 5)) < 128).all()


def test_images_come_as_arrays_tensors_or_pillow():
    image, keep = photo(), torch.tensor([3, 4])
    expected = draw_kept_tokens(image, keep, (4, 5))
    assert np.array_equal(draw_kept_tokens(torch.from_numpy(image), keep, (4, 5)), expected)
    assert np.array_equal(draw_kept_tokens(Image.fromarray(image), keep, (4, 5)), expected)
    assert np.array_equal(image, photo())


@pytest.mark.parametrize(
    ("size", "grid"), [((48, 64), (6, 8)), ((50, 70), (4, 9)), ((70, 50), (9, 4))]
)
def test_slots_are_told_apart_by_colour_and_line(size, grid):
    torch.manual_seed(0)
    grey = np.full((*size, 3), 128, dtype=np.uint8)
    attention = torch.rand(5, grid[0] * grid[1])
    drawn = draw_slot_masks(grey, attention, grid)
    regions = attention.argmax(dim=0).numpy()[patch_of(size, grid)]
    core = inner(regions)
    palette = slot_palette(5)
    for slot in range(5):
        colours = np.unique(drawn[core & (regions == slot)], axis=0)
        assert len(colours) == 1
        gaps = np.abs(np.subtract(colours, palette, dtype=float)).sum(axis=1)
        assert gaps.argmin() == slot
    right = regions[:, :-1] != regions[:, 1:]
    assert (drawn[:, :-1][right] == 255).all()
    assert (drawn[:, 1:][right] == 255).all()
    below = regions[:-1] != regions[1:]
    assert (drawn[:-1][below] == 255).all()
    assert not (drawn[core] == 255).all(axis=-1).any()


def test_slot_masks_let_the_image_through():
    attention = torch.ones(1, 4)
    dark, light = (np.full((20, 20, 3), value, dtype=np.uint8) for value in (20, 220))
    pictures = [draw_slot_masks(image, attention, (2, 2)).mean() for image in (dark, light)]
    assert 40 < pictures[1] - pictures[0] < 160


def test_scores_are_shown_by_their_ranks():
    image = np.full((20, 20, 3), 128, dtype=np.uint8)
    scores = torch.tensor([1.0, 3.0, 2.0, 900.0])
    picture = draw_scores(image, scores, (2, 2)).astype(int)
    brightness = picture.sum(-1)[::10, ::10].ravel()  # one pixel of each patch
    assert brightness.argsort().tolist() == [0, 2, 1, 3]
    np.testing.assert_array_equal(picture, draw_scores(image, scores.exp(), (2, 2)))
    with pytest.raises(ValueError, match=r"grid \(2, 3\); pass \[6\]"):
        draw_scores(image, scores, (2, 3))


@pytest.mark.parametrize(("slots", "gap"), [(8, 0.2), (16, 0.13), (64, 0.07), (128, 0.05)])
def test_palette_colours_are_distinct_vivid_and_always_the_same(slots, gap):
    palette = slot_palette(slots)
    assert palette.shape == (slots, 3)
    lab = _oklab(palette / 255)
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + np.eye(slots)
    assert distance.min() > gap
    assert np.hypot(lab[:, 1], lab[:, 2]).min() > 0.08
    assert np.array_equal(slot_palette(slots + 3)[:slots], palette)


def test_palette_of_any_length():
    many = slot_palette(3000)
    assert many.shape == (3000, 3)
    assert len(np.unique(many, axis=0)) > 500
    assert slot_palette(1).shape == (1, 3)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (1, 0, 0)),
        ((1, 0, 0), (0.628, 0.225, 0.126)),
        ((0, 1, 0), (0.866, -0.234, 0.179)),
        ((0, 0, 1), (0.452, -0.032, -0.312)),
    ],
)
def test_oklab_has_the_published_values(rgb, lab):
    np.testing.assert_allclose(_oklab(np.array(rgb, dtype=float)), lab, atol=2e-3)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.tensor([0, 20]), r"grid \(4, 5\); pass indices \[K\] in 0..19"),
        (torch.tensor([-1]), "in 0..19"),
        (torch.ones(19, dtype=torch.bool), r"torch.bool \[19\]"),
        (torch.tensor([0.0, 1.0]), "torch.float32"),
        (torch.tensor([[0, 1]]), r"\[1, 2\]"),
    ],
)
def test_kept_tokens_must_fit_the_grid(keep, message):
    with pytest.raises(ValueError, match=message):
        draw_kept_tokens(photo(), keep, (4, 5))


@pytest.mark.parametrize("shape", [(3, 21), (20,), (1, 3, 20)])
def test_slot_masks_must_fit_the_grid(shape):
    with pytest.raises(ValueError, match=r"grid \(4, 5\); pass \[S, 20\]"):
        draw_slot_masks(photo(), torch.rand(shape), (4, 5))


@pytest.mark.parametrize(
    "image", [np.zeros((4, 5, 3)), photo()[..., 0], photo()[..., :2], photo()[:0]]
)
def test_images_must_be_rgb_bytes(image):
    with pytest.raises(ValueError, match=r"pass uint8 \[H, W, 3\]"):
        draw_kept_tokens(image, torch.tensor([0]), (4, 5))
    with pytest.raises(ValueError, match=r"pass uint8 \[H, W, 3\]"):
        figure(image, [])


def panels():
    torch.manual_seed(0)
    return [
        Panel("fastervlm", torch.tensor([1, 5, 9]), None, (4, 5)),
        Panel("oc_vtp", torch.rand(20) < 0.5, torch.rand(6, 20), (4, 5)),
        Panel("slots", None, torch.rand(3, 24), (4, 6)),
    ]


def test_figure_shows_the_image_then_each_pruner_in_order():
    image = photo()
    drawn = figure(image, panels())
    kept = int(panels()[1].keep.sum())
    assert texts(drawn) == [
        "input",
        "fastervlm  3 of 20 tokens",
        f"oc_vtp  {kept} of 20 tokens",
        "oc_vtp  6 slots",
        "slots  3 slots",
    ]
    pictures = [axis.images[0].get_array() for axis in drawn.axes if axis.images]
    _, mixed, slots = panels()
    assert np.array_equal(pictures[0], image)
    assert np.array_equal(pictures[2], draw_kept_tokens(image, mixed.keep, (4, 5)))
    assert np.array_equal(pictures[3], draw_slot_masks(image, mixed.attention, (4, 5)))
    assert np.array_equal(pictures[4], draw_slot_masks(image, slots.attention, (4, 6)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("count", "columns", "grid"),
    [(0, 5, (1, 1)), (4, 5, (1, 5)), (5, 5, (2, 3)), (6, 5, (2, 4)), (2, 1, (3, 1))],
)
def test_figures_wrap_into_rows_of_equal_length(count, columns, grid):
    drawn = figure(photo(), panels()[:1] * count, max_columns=columns)
    assert drawn.axes[0].get_gridspec().get_geometry() == grid
    assert len(texts(drawn)) == count + 1
    assert not any(axis.axison for axis in drawn.axes)
    with pytest.raises(ValueError, match="max_columns=0"):
        figure(photo(), panels(), max_columns=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("size", [(40, 40), (100, 30), (30, 100), (427, 640)])
@pytest.mark.sampled(2)
def test_titles_neither_overlap_nor_leave_the_figure(size):
    long = Panel("a_method_with_quite_a_long_name", torch.arange(20), None, (4, 5))
    drawn = figure(photo(*size), [*panels(), long, long])
    drawn.canvas.draw()
    renderer = drawn.canvas.get_renderer()
    boxes = [axis.title.get_window_extent(renderer) for axis in drawn.axes if axis.get_title()]
    width, height = drawn.canvas.get_width_height()
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.overlaps(axis.get_window_extent(renderer)) for axis in drawn.axes)


def test_several_images_have_a_row_each():
    images = [photo(40, 60), photo(60, 60, seed=1), photo(50, 30, seed=2)]
    shown = [panels(), panels()[:1], panels()[1:2]]
    drawn = figure_of_images(list(zip(images, shown, strict=True)))
    assert drawn.axes[0].get_gridspec().get_geometry() == (3, 5)
    pictures = [axis.images[0].get_array() if axis.images else None for axis in drawn.axes]
    for row, (image, own) in enumerate(zip(images, shown, strict=True)):
        first = figure(image, own)
        alone = [axis.images[0].get_array() for axis in first.axes if axis.images]
        here = pictures[5 * row : 5 * row + 5]
        assert len([one for one in here if one is not None]) == len(alone)
        assert all(np.array_equal(*pair) for pair in zip(here, alone, strict=False))
    assert drawn.get_figheight() > 3 * drawn.get_figwidth() / 5


def test_a_hidden_image_leaves_its_panels_on_grey():
    image, own = photo(), panels()
    grey = np.full_like(image, 190)
    _, *expected = (axis.images[0].get_array() for axis in figure(grey, own).axes if axis.images)
    for drawn in (
        figure(image, own, hide_image=True),
        figure_of_images([(image, own)], hide_image=True),
    ):
        assert texts(drawn) == texts(figure(image, own))[1:]
        found = [axis.images[0].get_array() for axis in drawn.axes if axis.images]
        assert len(found) == len(expected) == 4
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="nothing to draw of an image without panels; pass one"):
        figure(image, [], hide_image=True)


def test_an_empty_panel_is_refused():
    with pytest.raises(ValueError, match="'nothing' is empty; pass keep, attention or both"):
        Panel("nothing", None, None, (4, 5))


def test_figures_leave_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    figure(photo(), panels()).canvas.draw()
    assert dict(mpl.rcParams) == before
    assert not _pylab_helpers.Gcf.get_all_fig_managers()


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("b.PDF", b"%PDF")])
@pytest.mark.sampled(1)
def test_figures_are_saved_by_suffix_and_reproducibly(tmp_path, name, magic):
    first = save_figure(figure(photo(), panels()), tmp_path / "new" / name, dpi=40)
    second = save_figure(figure(photo(), panels()), str(tmp_path / name), dpi=40)
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()
    assert [p.name for p in first.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}'; end it in .png or .pdf"):
        save_figure(figure(photo(), []), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = save_figure(figure(photo(), []), tmp_path / "a.png", dpi=40)
    old = path.read_bytes()
    drawn = figure(photo(seed=1), [])

    def broken(target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(drawn, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        save_figure(drawn, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slot_picture_puts_slots_below_images(dtype):
    torch.manual_seed(0)
    pixels, attention = torch.rand(3, 3, 20, 30).to(dtype), torch.rand(3, 4, 6).to(dtype)
    picture = slot_picture(pixels, attention, (2, 3), max_images=2)
    assert picture.shape == (2 * 20 + 3 * 4, 2 * 30 + 3 * 4, 3)
    assert picture.dtype == np.uint8
    for column in range(2):
        left = 4 + column * 34
        image = (pixels[column].float() * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(picture[4:24, left : left + 30], image)
        slots = draw_slot_masks(image, attention[column], (2, 3))
        assert np.array_equal(picture[28:48, left : left + 30], slots)


def test_slot_picture_takes_one_image_and_values_out_of_range():
    pixels = torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8).requires_grad_()
    picture = slot_picture(pixels, torch.rand(1, 2, 4, requires_grad=True), (2, 2))
    assert picture.shape == (2 * 8 + 12, 8 + 8, 3)
    assert picture[5, 5].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("pixels", "attention", "limit", "message"),
    [
        ((2, 1, 8, 8), (2, 3, 4), 8, r"\[2, 1, 8, 8\].*pass \[B, 3, H, W\]"),
        ((3, 8, 8), (2, 3, 4), 8, r"\[3, 8, 8\]"),
        ((2, 3, 8, 8), (1, 3, 4), 8, r"\[1, 3, 4\]"),
        ((2, 3, 8, 8), (3, 4), 8, r"\[3, 4\]"),
        ((2, 3, 8, 8), (2, 3, 5), 8, r"pass \[S, 4\]"),
        ((2, 3, 8, 8), (2, 3, 4), 0, "max_images=0"),
    ],
)
def test_slot_picture_says_what_fits(pixels, attention, limit, message):
    with pytest.raises(ValueError, match=message):
        slot_picture(torch.rand(pixels), torch.rand(attention), (2, 2), limit)
