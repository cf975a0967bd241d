"""The sixteen corruptions: pure, shape-preserving, true to the published formulas, never silently clean."""

from itertools import islice

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from clear.degradation.corruptions import CORRUPTIONS, below, corrupt
from clear.degradation.kernels.filters import add_noise
from clear.errors import ClearError
from tests.bench.transcription import FORMULAS
from tests.helpers.pictures import KINDS, hard_picture, picture

LEVELS = (0.23, 0.45, 0.9)
RANDOM = ("motion_blur", "gaussian_noise", "block_exchange", "dirty_lens", "graffiti", "watermark_damage", "lens_flare")


def apply(name: str, image: np.ndarray, intensity: float, scale: float = 1.0, seed: int = 3) -> np.ndarray:
    return corrupt(name, image, intensity, np.random.default_rng(seed), scale)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(CORRUPTIONS)),
    height=st.integers(64, 90),  # two blocks of 32 px, the largest, fit; smaller pictures are refused
    width=st.integers(64, 90),
    intensity=st.floats(0, 1),
    scale=st.floats(0.1, 1),
)
def test_type_shape_and_bytes_hold_for_any_size_and_intensity(name, height, width, intensity, scale):
    image = picture(height, width)
    before = image.copy()
    first = apply(name, image, intensity, scale)
    assert first.dtype == np.uint8 and first.shape == image.shape
    assert (image == before).all()
    assert (first == apply(name, image, intensity, scale)).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_severity_changes_the_image(name):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    assert all((apply(name, image, level, 0.4) != image).any() for level in LEVELS)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_matters_only_where_the_formula_is_random(name):
    one, two = (apply(name, picture(), 0.9, seed=seed) for seed in (1, 2))
    assert (one != two).any() == (name in RANDOM)


def sat(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255)


def correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Plain two-dimensional correlation, mirrored at the border without repeating it."""
    r, c = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(image.astype(float), ((r, r), (c, c), (0, 0)), "reflect")
    height, width = image.shape[:2]
    out = np.zeros(image.shape)
    for i, j in np.ndindex(kernel.shape):
        out += kernel[i, j] * padded[i : i + height, j : j + width]
    return out


def gaussian(size: int, sigma: float) -> np.ndarray:
    one = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    return np.outer(one, one) / one.sum() ** 2


def plain_lens_blur(x, i):
    return sat((1 - 0.7 * i) * x + 0.9 * i * correlate(x, gaussian(min(101, int(3 + 300 * i)) | 1, 20 * i)))


def plain_color_diffusion(x, i):
    blurred = sat(correlate(x, gaussian(3 + 2 * int(20 * i), 50 * i) * i**2))
    return sat(max(0.1, 1 - 0.9 * i) * x + min(0.9, 0.9 * i) * blurred)


def plain_sharpness(x, i):
    kernel = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]])
    return sat(0.7 * x + 0.3 * sat(80 * i * correlate(x, kernel)))


def plain_dark(x, i):
    return sat(x * (1 - i * i))


def plain_hsv_saturation(x, i):
    hsv = cv2.cvtColor(np.ascontiguousarray(x[..., ::-1]), cv2.COLOR_BGR2HSV)
    hsv[..., 1] = hsv[..., 1] * (1 - i)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[..., ::-1]


def plain_jpeg(x, i):
    quality = int(np.clip(int(100 - 95 * i), 5, 100))
    data = cv2.imencode(".jpg", np.ascontiguousarray(x[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def plain_turbulence(x, i):
    height, width = x.shape[:2]
    out = np.zeros(x.shape)
    for row in range(height):
        delta = 40 * i * np.sin(row / 30 + 5 * i)
        v = np.clip(row + 0.7 * delta, 0, height - 1)
        for column in range(width):
            u = np.clip(column + delta, 0, width - 1)
            a, b = int(u), int(v)
            c, d = min(a + 1, width - 1), min(b + 1, height - 1)
            top = (1 - (u - a)) * x[b, a] + (u - a) * x[b, c]
            out[row, column] = (1 - (v - b)) * top + (v - b) * ((1 - (u - a)) * x[d, a] + (u - a) * x[d, c])
    return out


def plain_scan_lines(x, i):
    out = x.astype(float)
    for row in range(0, x.shape[0], max(3, int(20 / (i + 0.1)))):
        out[row : row + max(5, int(7 * i))] *= 0.01
    return out


def plain_mean_shift(x, i):
    return cv2.pyrMeanShiftFiltering(np.ascontiguousarray(x[..., ::-1]), int(40 * i), int(40 * i))[..., ::-1]


PLAIN = {
    "lens_blur": plain_lens_blur,
    "color_diffusion": plain_color_diffusion,
    "sharpness": plain_sharpness,
    "dark": plain_dark,
    "hsv_saturation": plain_hsv_saturation,
    "jpeg": plain_jpeg,
    "turbulence": plain_turbulence,
    "scan_lines": plain_scan_lines,
    "mean_shift": plain_mean_shift,
}


@pytest.mark.parametrize("intensity", LEVELS)
@pytest.mark.parametrize("name", PLAIN)
def test_deterministic_types_follow_the_published_formula(name, intensity):
    assert PLAIN.keys() == CORRUPTIONS.keys() - set(RANDOM)
    image = cv2.GaussianBlur(picture(160, 170), (0, 0), 4) if name == "turbulence" else picture(160, 170)
    difference = np.abs(apply(name, image, intensity).astype(float) - PLAIN[name](image, intensity))
    assert difference.max() <= 1


OTHER_DRAWS = ("gaussian_noise",)  # the same distribution, drawn in another way


SMALLEST = {"block_exchange": (32, 64), "watermark_damage": (50, 50)}  # px, height and width


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from([name for name in CORRUPTIONS if name not in OTHER_DRAWS]),
    kind=KINDS,
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    intensity=st.sampled_from(LEVELS) | st.floats(0.01, 0.9),
    seed=st.integers(0, 999),
)
def test_every_formula_is_followed_on_any_picture(name, kind, height, width, intensity, seed):
    if name == "mean_shift":
        height, width = min(height, 40), min(width, 40)
    if name in SMALLEST:  # smaller ones are refused
        height, width = max(height, SMALLEST[name][0]), max(width, SMALLEST[name][1])
    image = hard_picture(kind, height, width, seed)
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    expected = FORMULAS[name](bgr, intensity, np.random.default_rng(seed))[:, :, ::-1]
    if name in SMALLEST:  # swaps that cancel and a picture that is missing whole are tested below
        assume((expected != image).any())
    found = apply(name, image, intensity, seed=seed)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("deviation", [0.2, 3.0, 33.75, 75.0])
def test_noise_has_the_published_distribution(deviation):
    from math import erfc

    grey = np.full((400, 400, 3), 128, np.uint8)
    noise = add_noise(grey, deviation, np.random.default_rng(5)).astype(int).reshape(-1) - 128
    edges = np.arange(-128.5, 128)
    below = np.array([0.5 * erfc(-e / (deviation * 2**0.5)) for e in edges])
    share = np.diff([0, *below[1:-1], 1])  # the two ends take what saturates
    expected, found = noise.size * share, np.bincount(noise + 128, minlength=256)
    # Results expected fewer than 30 times are counted together, for a statistic that follows chi-square.
    often = expected >= 30
    pooled = np.append(expected[often], expected[~often].sum()), np.append(found[often], found[~often].sum())
    statistic = ((pooled[1] - pooled[0]) ** 2 / np.maximum(pooled[0], 1)).sum()
    freedom = often.sum()
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8
    assert abs(found - expected)[~often].max(initial=0) < 30 + 5 * 30**0.5


def test_neighbouring_noise_is_independent():
    grey = np.full((300, 300, 3), 128, np.uint8)
    noise = apply("gaussian_noise", grey, 0.3).astype(float) - 128
    for one, two in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        assert abs((one * two).mean() / noise.var()) < 5 / one.size**0.5


@pytest.mark.parametrize("intensity", LEVELS)
@pytest.mark.parametrize("name", OTHER_DRAWS)
def test_other_draws_damage_as_much_as_the_plain_formula(name, intensity):
    image, ours, plain = picture(128, 128), [], []
    for seed in range(40):
        ours.append(cv2.PSNR(image, apply(name, image, intensity, seed=seed)))
        plain.append(cv2.PSNR(image, FORMULAS[name](image, intensity, np.random.default_rng(1000 + seed))))
    error = ((np.var(ours, ddof=1) + np.var(plain, ddof=1)) / 40) ** 0.5
    assert error < 0.6, "dB, the standard error of the difference of the two means"
    assert abs(np.mean(ours) - np.mean(plain)) < 4 * error + 1e-3


@settings(max_examples=200, deadline=None)
@given(
    end=st.integers(1, 2**62) | st.integers(1, 2**33) | st.integers(1, 5000),
    count=st.integers(1, 40),
    more=st.integers(0, 40),
    seed=st.integers(0, 2**64 - 1),
)
@example(end=3 * 2**30, count=40, more=40, seed=0)  # a quarter of the numbers is rejected
@example(end=2**32, count=3, more=1, seed=1)
@example(end=2**32 + 1, count=3, more=1, seed=1)
@example(end=3 * 2**61, count=9, more=9, seed=2)
def test_whole_numbers_are_those_of_numpy(end, count, more, seed):
    """More are taken than were announced, and one part after the other, as after swaps that cancel."""
    rng = np.random.default_rng(seed)
    expected = [*rng.integers(end, size=count).tolist(), *rng.integers(end, size=more).tolist()]
    assert list(islice(below(end, count, np.random.default_rng(seed)), count + more)) == expected


def test_all_pairs_of_blocks_are_exchanged_equally_often():
    image = np.repeat(np.arange(4, dtype=np.uint8) * 60, 5)[None, :, None].repeat(5, 0).repeat(3, 2)  # four blocks
    counts = {}
    for seed in range(600):
        out = corrupt("block_exchange", image, 0.03, np.random.default_rng(seed))  # one swap of 5 px blocks
        places = tuple(np.flatnonzero(out[0, ::5, 0] != image[0, ::5, 0]).tolist())
        counts[places] = counts.get(places, 0) + 1
    assert len(counts) == 6 and all(len(places) == 2 for places in counts)
    assert max(abs(n - 100) for n in counts.values()) < 4.5 * (100 * 5 / 6) ** 0.5


def test_graffiti_writes_the_published_words_equally_often():
    def letters(image: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero((image == (255, 0, 0)).all(-1))
        word = np.zeros((70, 520), bool)
        word[rows - rows.min(), columns - columns.min()] = True
        return word

    words = ("X", "FAKE", "COPY", "VOID", "COPYRIGHT", *(str(n) for n in range(1, 101)))
    black, font = np.zeros((120, 900, 3), np.uint8), cv2.FONT_HERSHEY_SIMPLEX
    forms = np.stack([letters(cv2.putText(black.copy(), word, (9, 90), font, 3.0, (255, 0, 0), 3)) for word in words])
    widths = forms.any(1).sum(1)

    def close(word: np.ndarray) -> np.ndarray:
        return abs(widths - word.any(0).sum()) <= 3

    # The word comes last, so no line covers it. Its letters can be off by a pixel: the most similar word is taken.
    seen = (letters(apply("graffiti", black, 0.6, seed=seed)) for seed in range(360))
    drawn = [words[min(np.flatnonzero(close(word)), key=lambda n: (forms[n] ^ word).sum())] for word in seen]
    counts = [drawn.count(word) for word in words[:5]]
    numbers = [word for word in drawn if word.isdigit()]
    assert all(abs(n - 60) < 4.5 * (60 * 5 / 6) ** 0.5 for n in (*counts, len(numbers))), counts
    assert len(set(numbers)) > 35 and all(any(n.startswith(digit) for n in numbers) for digit in "123456789")


def test_damage_runs_over_the_border_as_often_as_published():
    height, width, seeds = 140, 260, 250
    image = hard_picture("black and white", height, width, 1)
    boxes = []
    for seed in range(seeds):  # one rectangle, and inside it nearly every pixel changes
        rows, columns = np.nonzero((apply("watermark_damage", image, 0.06, seed=seed) != image).any(-1))
        boxes.append((columns.min(), columns.max(), rows.min(), rows.max()))
    left, right, top, bottom = np.array(boxes).T
    for first, last, side, shortest, longest in ((left, right, width, 50, 200), (top, bottom, height, 20, 80)):
        corner, length = np.mgrid[0 : side - 50 + 1, shortest : longest + 1]
        beyond = (corner + length >= side - 1).mean()
        error = (beyond * (1 - beyond) / seeds) ** 0.5
        assert abs((last == side - 1).mean() - beyond) < 4 * error, "share of rectangles cut off at the far border"
        assert abs(first.mean() - (side - 50) / 2) < 4 * (side - 50) / (12 * seeds) ** 0.5, "the corner is uniform"
        whole = (last - first)[last < side - 1]
        assert shortest <= whole.min() < shortest + 5 and whole.max() <= longest, "px from corner to corner"


UNTOUCHED_AT_ZERO = (
    *("lens_blur", "gaussian_noise", "color_diffusion", "dark", "hsv_saturation"),
    *("turbulence", "dirty_lens", "graffiti", "watermark_damage", "lens_flare"),
)


@pytest.mark.parametrize("name", UNTOUCHED_AT_ZERO)
def test_intensity_zero_is_the_identity_where_the_formula_says_so(name):
    image = hard_picture("noise", 90, 210, 4)
    difference = np.abs(apply(name, image, 0.0).astype(int) - image)
    # Through HSV, in whole degrees of hue, a colour cannot come back exactly.
    assert difference.max() <= (6 if name == "hsv_saturation" else 0)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["dark", "gaussian_noise", "hsv_saturation"]), seed=st.integers(0, 99), data=st.data())
def test_more_intensity_is_more_damage_where_the_formula_says_so(name, seed, data):
    image = hard_picture("smooth", 64, 64, seed)
    less = data.draw(st.floats(0.1, 0.8))
    more = data.draw(st.floats(less + 0.1, 0.9))
    error = [((apply(name, image, i, seed=seed) - image.astype(float)) ** 2).mean() for i in (less, more)]
    assert error[0] < error[1]


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(list(CORRUPTIONS)), height=st.integers(1, 12), width=st.integers(1, 12), data=st.data())
def test_the_smallest_images_work_or_are_refused_by_name(name, height, width, data):
    intensity, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 99))
    image = hard_picture("noise", height, width, seed)
    if name == "watermark_damage" or (name == "block_exchange" and width * height < 50):
        with pytest.raises(ClearError, match=rf"{name} needs .* px; the image has {width}x{height} px"):
            apply(name, image, intensity, seed=seed)
    elif name != "block_exchange":
        out = apply(name, image, intensity, seed=seed)
        assert out.shape == image.shape and out.dtype == np.uint8


def test_colours_are_rgb():
    black = np.zeros((200, 300, 3), np.uint8)
    assert (apply("graffiti", black, 0.9) == (255, 0, 0)).all(-1).any()
    flare = apply("lens_flare", black, 0.9).reshape(-1, 3).max(0)
    assert flare[0] < flare[1] == flare[2]


def test_scale_is_a_length():
    white = np.full((100, 100, 3), 255, np.uint8)
    rows = (apply("scan_lines", white, 0.9, 0.4)[:, 0, 0] < 10).nonzero()[0]
    assert rows[:6].tolist() == [0, 1, 8, 9, 16, 17]  # 20 and 6 px, times 0.4
    small, large = picture(120, 160), cv2.resize(picture(120, 160), None, fx=2, fy=2)
    same = cv2.resize(apply("turbulence", small, 0.45, 1.0), None, fx=2, fy=2)
    assert cv2.PSNR(same, apply("turbulence", large, 0.45, 2.0)) > 28


def test_block_exchange_only_moves_blocks():
    image = picture(64, 64)
    out = apply("block_exchange", image, 0.9, 1.0)
    before = sorted(b.tobytes() for r in np.split(image, 2) for b in np.split(r, 2, 1))
    assert before == sorted(b.tobytes() for r in np.split(out, 2) for b in np.split(r, 2, 1))


def test_two_blocks_swapped_an_even_number_of_times_still_differ():
    image = picture(11, 22)  # block of 11 px at low, eight swaps
    assert all((apply("block_exchange", image, 0.23, seed=s) != image).any() for s in range(20))


def test_damage_that_covers_everything_is_not_clean():
    image = np.random.default_rng(1).integers(0, 256, (50, 50, 3), np.uint8)
    assert all((apply("watermark_damage", image, 0.9, seed=s) != image).mean() > 0.2 for s in range(10))


@pytest.mark.parametrize(("name", "side"), [("watermark_damage", 49), ("block_exchange", 24), ("block_exchange", 40)])
def test_too_small_images_are_refused_with_the_smallest_size(name, side):
    with pytest.raises(ClearError, match=rf"{name} needs .* (50|32)x\d+ px; the image has {side}x{side}"):
        apply(name, picture(side, side), 0.9)


def test_unknown_names_and_wrong_input_are_refused():
    with pytest.raises(ClearError, match="'fog' is not a corruption; choose one of motion_blur, "):
        apply("fog", picture(), 0.5)
    with pytest.raises(ClearError, match="expected uint8 RGB"):
        apply("dark", picture().astype(float), 0.5)
    with pytest.raises(ClearError, match="expected uint8 RGB"):
        apply("dark", picture()[..., 0], 0.5)
    for intensity, scale in ((1.5, 1), (float("nan"), 1), (0.5, 0)):
        with pytest.raises(ClearError, match="must lie in"):
            apply("dark", picture(), intensity, scale)
