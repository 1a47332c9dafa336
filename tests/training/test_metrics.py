import numpy as np
import pytest
import torch
from scipy.linalg import lstsq
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.functional.clustering import adjusted_rand_score

from ocvtp.training.metrics import (
    ForegroundARI,
    MeanBestOverlap,
    nearest_kept_distance,
    reconstruction_residual,
    slot_labels,
)


def tokens_and_kept(images=3, tokens=20, kept=5, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, tokens, width, generator=generator)
    order = torch.rand(images, tokens, generator=generator).argsort(dim=1)
    return features, order[:, :kept].sort(dim=1).values


def naive_distance(tokens: Tensor, kept: Tensor) -> float:
    tokens, kept = tokens.numpy().astype(np.float64), kept.numpy().astype(np.float64)
    total = 0.0
    for x in tokens:
        total += min(1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for y in kept)
    return total / len(tokens)


def naive_residual(tokens: Tensor, kept: Tensor) -> float:
    """scipy's SVD least squares, token by token."""
    tokens, kept = tokens.numpy().astype(np.float64), kept.numpy().astype(np.float64)
    error = sum(np.sum((x - kept.T @ lstsq(kept.T, x, cond=1e-7)[0]) ** 2) for x in tokens)
    return error / np.sum(tokens**2)


COVERAGE = [
    pytest.param(nearest_kept_distance, naive_distance, id="nearest"),
    pytest.param(reconstruction_residual, naive_residual, id="residual"),
]


@pytest.mark.parametrize(("metric", "naive"), COVERAGE)
@pytest.mark.parametrize("kept", [1, 5, 11])
def test_coverage_is_that_of_a_loop_over_tokens(metric, naive, kept):
    features, keep = tokens_and_kept(kept=kept)
    expected = [naive(x, x[k]) for x, k in zip(features, keep, strict=True)]
    result = metric(features, keep)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(("metric", "naive"), COVERAGE)
@pytest.mark.parametrize("filler", [0, 19, -1, 10**6])
def test_coverage_ignores_padding_whatever_its_index(metric, naive, filler):
    features, keep = tokens_and_kept()
    counts = torch.tensor([5, 2, 1])
    valid = torch.arange(5) < counts[:, None]
    expected = [naive(x, x[k[:n]]) for x, k, n in zip(features, keep, counts, strict=True)]
    result = metric(features, keep.masked_fill(~valid, filler), valid)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(("metric", "naive"), COVERAGE)
def test_coverage_is_the_same_image_by_image_and_leaves_its_inputs_alone(metric, naive):
    features, keep = tokens_and_kept()
    copies = features.clone(), keep.clone()
    together = metric(features, keep)
    alone = torch.cat([metric(features[i : i + 1], keep[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(features, copies[0])
    assert torch.equal(keep, copies[1])


@pytest.mark.parametrize(("metric", "naive"), COVERAGE)
def test_coverage_is_not_lowered_by_autocast(metric, naive):
    features, keep = tokens_and_kept()
    expected = metric(features, keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metric(features, keep), expected)


@pytest.mark.parametrize(("metric", "naive"), COVERAGE)
def test_coverage_of_half_precision_features_is_computed_in_full(metric, naive):
    features, keep = tokens_and_kept()
    half = features.half()
    assert torch.equal(metric(half, keep), metric(half.float(), keep))
    # Squares of these overflow fp16.
    torch.testing.assert_close(metric(half * 1000, keep), metric(half, keep), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("metric", "naive"), COVERAGE)
def test_keeping_everything_costs_nothing(metric, naive):
    features, _ = tokens_and_kept()
    result = metric(features, torch.arange(20).expand(3, 20))
    torch.testing.assert_close(result, torch.zeros(3), rtol=0, atol=1e-6)
    assert (result >= 0).all()


@pytest.mark.parametrize(
    ("metric", "worst"), [(nearest_kept_distance, 2), (reconstruction_residual, 1)]
)
def test_keeping_nothing_is_the_worst(metric, worst):
    features, keep = tokens_and_kept()
    valid = torch.zeros_like(keep, dtype=torch.bool)
    torch.testing.assert_close(metric(features, keep, valid), torch.full((3,), float(worst)))


def test_zero_tokens_give_no_nan():
    features, keep = tokens_and_kept(images=1)
    features[0, :10] = 0
    keep = torch.tensor([[0, 10, 11]])
    distance = nearest_kept_distance(features, keep)
    others = naive_distance(features[0, 10:], features[0, [10, 11]])
    # Cosines with the kept zero vector are 0: it caps the distance of every token at 1.
    assert 0.5 <= distance.item() <= 0.5 + others / 2
    expected = naive_residual(features[0], features[0, [10, 11]])
    torch.testing.assert_close(reconstruction_residual(features, keep).item(), expected)
    nothing = torch.zeros(1, 4, 3), torch.tensor([[0, 1]])
    assert nearest_kept_distance(*nothing).item() == 1
    assert reconstruction_residual(*nothing).item() == 0


def test_residual_of_rank_deficient_sets():
    features, _ = tokens_and_kept(images=1)
    features[0, 1] = features[0, 0] + 2 * features[0, 2]
    features[0, 3] = -5 * features[0, 0]
    dependent = reconstruction_residual(features, torch.tensor([[0, 0, 1, 2, 3]]))
    torch.testing.assert_close(dependent, reconstruction_residual(features, torch.tensor([[0, 2]])))
    torch.testing.assert_close(dependent.item(), naive_residual(features[0], features[0, [0, 2]]))


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4])
def test_residual_of_nearly_dependent_sets(gap):
    """A kept token close to another one adds the whole direction in which they differ."""
    features = tokens_and_kept(images=1)[0].double()
    features[0, 1] = features[0, 0] + gap * features[0, 1]
    expected = naive_residual(features[0], features[0, :2])
    result = reconstruction_residual(features, torch.tensor([[0, 1]])).item()
    assert result == pytest.approx(expected, abs=1e-6)
    assert expected < naive_residual(features[0], features[0, :1]) - 0.01


def test_residual_does_not_change_with_the_scale_of_kept_tokens():
    """Norms of 1e-6 to 100 side by side: plain normal equations lose the small ones."""
    features, keep = tokens_and_kept(images=1)
    base = reconstruction_residual(features, keep)
    scaled = torch.cat(
        [features, features[:, keep[0]] * 10.0 ** torch.arange(-6, 4, 2)[:, None]], 1
    )
    expected = naive_residual(scaled[0], features[0, keep[0]])
    result = reconstruction_residual(scaled, torch.arange(20, 25)[None])
    assert result.item() == pytest.approx(expected, abs=1e-6)
    assert result.item() < base.item()


def test_residual_with_more_kept_tokens_than_dimensions():
    features, keep = tokens_and_kept(width=4, kept=9)
    assert reconstruction_residual(features, keep).max() < 1e-6


@pytest.mark.parametrize(
    ("features", "keep", "valid", "message"),
    [
        ((20, 4), (1, 3), None, r"\[20, 4\].*pass \[B, N, D\]"),
        ((2, 20, 4), (3,), None, r"keep_indices \[3\]"),
        ((2, 20, 4), (1, 3), None, "of the same images"),
        ((2, 20, 4), (2, 0), None, "at least one column"),
        ((2, 20, 4), (2, 3), torch.ones(2, 2, dtype=torch.bool), r"pass torch.bool \[2, 3\]"),
        ((2, 20, 4), (2, 3), torch.ones(2, 3), "valid is torch.float32"),
    ],
)
@pytest.mark.parametrize("metric", [nearest_kept_distance, reconstruction_residual])
def test_coverage_says_which_shapes_fit(metric, features, keep, valid, message):
    with pytest.raises(ValueError, match=message):
        metric(torch.ones(features), torch.zeros(keep, dtype=torch.long), valid)


def naive_upsample(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with pixel centres at half-integers, clamped at the border."""
    (h, w), (height, width) = mask.shape, size
    out = np.zeros(size)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = mask[y0, x0] * (1 - x + x0) + mask[y0, x1] * (x - x0)
            low = mask[y1, x0] * (1 - x + x0) + mask[y1, x1] * (x - x0)
            out[i, j] = top * (1 - y + y0) + low * (y - y0)
    return out


@pytest.mark.parametrize("size", [(2, 3), (13, 17), (8, 12)])
def test_slot_labels_upsample_masks_before_the_argmax(size):
    torch.manual_seed(0)
    attention = torch.rand(2, 4, 6).softmax(dim=1)
    labels = slot_labels(attention, (2, 3), size)
    assert labels.shape == (2, *size)
    assert labels.dtype == torch.int64
    for masks, result in zip(attention.numpy(), labels.numpy(), strict=True):
        expected = np.stack([naive_upsample(m.reshape(2, 3), size) for m in masks]).argmax(axis=0)
        assert (expected == result).mean() == 1


def test_slot_labels_take_half_precision_and_strided_masks():
    attention = torch.rand(2, 6, 4).mT
    expected = slot_labels(attention.bfloat16().float(), (2, 3), (8, 12))
    assert torch.equal(slot_labels(attention.bfloat16(), (2, 3), (8, 12)), expected)


@pytest.mark.parametrize("shape", [(2, 4, 5), (4, 6)])
def test_slot_labels_say_which_grid_fits(shape):
    with pytest.raises(ValueError, match=r"grid \(2, 3\); pass \[B, S, 6\]"):
        slot_labels(torch.rand(shape), (2, 3), (8, 12))


def scene(images=6, size=(15, 11), slots=7, seed=0):
    """Blocky instances with large scattered ids, and noisy slot labels that partly follow them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([0, 1, 2, 255, 1_000_003])
    pick = torch.randint(0, 5, (images, 3, 4), generator=generator)
    pick = pick.repeat_interleave(5, dim=1).repeat_interleave(3, dim=2)[:, : size[0], : size[1]]
    noise = torch.randint(0, slots, pick.shape, generator=generator)
    labels = torch.where(torch.rand(pick.shape, generator=generator) < 0.6, pick, noise)
    return labels, ids[pick]


def naive_ari(labels: Tensor, instances: Tensor) -> float:
    inside = instances > 0
    return adjusted_rand_score(labels[inside], instances[inside]).item()


def naive_overlap(labels: Tensor, instances: Tensor) -> float:
    best = []
    for instance in set(instances.flatten().tolist()) - {0}:
        overlaps = []
        for slot in set(labels.flatten().tolist()):
            a, b = labels == slot, instances == instance
            overlaps.append((a & b).sum().item() / (a | b).sum().item())
        best.append(max(overlaps))
    return sum(best) / len(best)


SLOT_METRICS = [
    pytest.param(ForegroundARI, naive_ari, id="FG-ARI"),
    pytest.param(MeanBestOverlap, naive_overlap, id="mBO"),
]


@pytest.mark.parametrize(("metric", "naive"), SLOT_METRICS)
def test_slot_metrics_are_those_of_each_image_alone(metric, naive):
    labels, instances = scene()
    expected = [naive(x, y) for x, y in zip(labels, instances, strict=True)]
    assert len(set(expected)) == len(expected)
    for i, value in enumerate(expected):
        one = metric()
        one.update(labels[i : i + 1], instances[i : i + 1])
        assert one.compute().item() == pytest.approx(value, abs=1e-6)
    whole = metric()
    whole.update(labels, instances)
    assert whole.compute().item() == pytest.approx(np.mean(expected), abs=1e-6)
    assert whole.compute().dtype == torch.float32


@pytest.mark.parametrize(("metric", "naive"), SLOT_METRICS)
def test_slot_metrics_weigh_images_not_batches_nor_processes(metric, naive):
    labels, instances = scene()
    whole, first, second = metric(), metric(), metric()
    whole.update(labels, instances)
    first.update(labels[:1], instances[:1])
    first.update(labels[1:2], instances[1:2])
    second.update(labels[2:], instances[2:])
    second.merge_state(first)
    torch.testing.assert_close(second.compute(), whole.compute())
    whole.reset()
    whole.update(labels[:1], instances[:1])
    assert whole.compute().item() == pytest.approx(naive(labels[0], instances[0]), abs=1e-6)


@pytest.mark.parametrize(("metric", "naive"), SLOT_METRICS)
def test_images_without_instances_do_not_count(metric, naive):
    labels, instances = scene()
    instances[1:3] = 0
    score = metric()
    score.update(labels, instances)
    expected = np.mean([naive(labels[i], instances[i]) for i in (0, 3, 4, 5)])
    assert score.compute().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("metric", "naive"), SLOT_METRICS)
def test_slot_metrics_are_nan_only_when_nothing_counted(metric, naive):
    labels, instances = scene()
    score = metric()
    score.update(labels, torch.zeros_like(instances))
    score.update(labels, torch.full_like(instances, -1))
    assert score.compute().isnan()
    score.update(labels, instances)
    expected = np.mean([naive(x, y) for x, y in zip(labels, instances, strict=True)])
    assert score.compute().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("metric", "naive"), SLOT_METRICS)
def test_slot_metrics_do_not_depend_on_the_numbering_nor_on_the_integer_type(metric, naive):
    labels, instances = scene()
    expected, renamed, small = metric(), metric(), metric()
    expected.update(labels, instances)
    renamed.update(1000 - 3 * labels, torch.where(instances > 0, 2_000_000 - instances, 0))
    torch.testing.assert_close(renamed.compute(), expected.compute())
    small.update(labels.to(torch.uint8), torch.where(instances > 255, 7, instances).to(torch.uint8))
    torch.testing.assert_close(small.compute(), expected.compute())


@pytest.mark.parametrize("metric", [ForegroundARI, MeanBestOverlap])
def test_following_the_instances_exactly_scores_one(metric):
    _, instances = scene()
    score = metric()
    score.update(instances, instances)
    assert score.compute().item() == pytest.approx(1.0)


def test_only_mbo_sees_slots_that_spill_over_the_background():
    instances = torch.tensor([[[1, 1, 2, 2, 0, 0]]])
    labels = torch.tensor([[[0, 0, 1, 1, 0, 0]]])
    ari, overlap = ForegroundARI(), MeanBestOverlap()
    ari.update(labels, instances)
    overlap.update(labels, instances)
    assert ari.compute().item() == 1
    assert overlap.compute().item() == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize(
    ("labels", "instances"),
    [
        ([[3, 3, 0]], [[1, 1, 0]]),
        ([[3, 4, 0]], [[1, 1, 0]]),
        ([[3, 4, 0]], [[1, 2, 0]]),
        ([[3, 3, 0]], [[1, 2, 0]]),
        ([[3, 4, 0]], [[1, 0, 0]]),
    ],
)
def test_degenerate_partitions_score_as_in_the_library(labels, instances):
    labels, instances = torch.tensor([labels]), torch.tensor([instances])
    score = ForegroundARI()
    score.update(labels, instances)
    assert score.compute().item() == naive_ari(labels, instances)


def test_min_instances_leaves_out_images_of_one_instance():
    labels, instances = scene()
    instances[0] = (instances[0] > 0).long()
    score = ForegroundARI(min_instances=2)
    score.update(labels, instances)
    expected = np.mean([naive_ari(x, y) for x, y in zip(labels[1:], instances[1:], strict=True)])
    assert score.compute().item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="min_instances=0"):
        ForegroundARI(min_instances=0)


def test_ari_of_a_large_image_does_not_overflow():
    """Products of pair counts of a megapixel exceed int64; the partition is a 2 x 2 table."""
    labels = torch.zeros(1, 1000, 1000, dtype=torch.long)
    instances = torch.ones_like(labels)
    labels[:, :500], instances[:, 100:600] = 1, 2
    score = ForegroundARI()
    score.update(labels, instances)
    pairs = [n * (n - 1) // 2 for n in (100_000, 400_000, 100_000, 400_000, 500_000, 1_000_000)]
    expected = 2 * pairs[4] * 2 * pairs[4] / pairs[5]
    ari = (sum(pairs[:4]) - expected) / (2 * pairs[4] - expected)
    assert score.compute().item() == pytest.approx(ari, abs=1e-6)


def test_a_collection_keeps_the_two_metrics_apart():
    """Both score 1 on the first batch; equal states would be merged into one metric."""
    labels, instances = scene()
    together = MetricCollection({"ari": ForegroundARI(), "mbo": MeanBestOverlap()})
    together.update(instances, instances)
    together.update(labels, instances)
    result = together.compute()
    pairs = list(zip(labels, instances, strict=True))
    for name, naive in (("ari", naive_ari), ("mbo", naive_overlap)):
        expected = (1 + np.mean([naive(x, y) for x, y in pairs])) / 2
        assert result[name].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", [ForegroundARI, MeanBestOverlap])
def test_slot_metrics_say_which_shapes_fit(metric):
    labels, instances = scene()
    with pytest.raises(ValueError, match=r"\[6, 15, 10\].*pass \[B, H, W\]"):
        metric().update(labels[..., 1:], instances)
    with pytest.raises(ValueError, match=r"\[15, 11\]"):
        metric().update(labels[0], instances[0])
