"""The kernels beneath corruptions: as exact as OpenCV's, or within a grey level where they are reduced."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.degradation.kernels.filters import gaussian_blur, sparse_filter
from clear.degradation.kernels.inpaint import inpaint
from clear.degradation.kernels.mean_shift import mean_shift_filter
from tests.helpers.pictures import KINDS, hard_picture


@settings(max_examples=80, deadline=None)
@given(kind=KINDS, shape=st.tuples(st.integers(1, 200), st.integers(1, 200)), seed=st.integers(0, 999), data=st.data())
def test_a_reduced_blur_is_within_one_grey_level(kind, shape, seed, data):
    image = hard_picture(kind, *shape, seed)
    sigma = data.draw(st.floats(0.5, 40))
    size = 2 * data.draw(st.integers(1, int(4 * sigma) + 1)) + 1
    kernel = cv2.getGaussianKernel(size, sigma)
    expected = cv2.sepFilter2D(image.astype(float), -1, kernel, kernel)
    assert np.abs(gaussian_blur(image, size, sigma) - expected).max() <= 1.5  # a level, and the rounding
    assert np.abs(gaussian_blur(image[:, :, 0], size, sigma, gain=0.5) - expected[:, :, 0] / 2).max() <= 1.25


def test_a_kernel_in_tiles_is_the_same_kernel():
    rng = np.random.default_rng(0)
    for size in (1, 3, 10, 11, 12, 19, 20, 21, 27, 40):
        kernel = (rng.random((size, size)) * (rng.random((size, size)) < 0.1) + np.eye(size)).astype(np.float32)
        kernel /= kernel.sum()
        for shape in ((1, 1), (7, 300), (90, 33)):
            image = rng.integers(0, 256, (*shape, 3), np.uint8)
            expected = cv2.filter2D(image.astype(float), -1, kernel.astype(float))
            assert np.abs(sparse_filter(image, kernel) - expected).max() <= 0.51


LARGE = [pytest.param(*size, marks=pytest.mark.slow) for size in ((129, 96), (200, 131))]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 40), (65, 48), (100, 67), *LARGE])
@pytest.mark.parametrize(("spatial", "color"), [(1, 3), (7, 18), (36, 36), (70, 20)])  # windows within and beyond both
def test_the_mean_shift_kernel_has_the_pixels_of_opencv(height, width, spatial, color):
    rng = np.random.default_rng(height + spatial)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    for image in (noise, smooth, cv2.convertScaleAbs(smooth, alpha=3, beta=-250)):
        assert np.array_equal(
            mean_shift_filter(image, spatial, color), cv2.pyrMeanShiftFiltering(image, spatial, color)
        )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (9, 40), (129, 96), (200, 131)])
@pytest.mark.parametrize("radius", [1.0, 1.2, 3.0, 7.4])
def test_the_filling_kernel_has_the_pixels_of_opencv(height, width, radius):
    rng = np.random.default_rng(height + int(10 * radius))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    for image in (noise, smooth, cv2.convertScaleAbs(smooth, alpha=3, beta=-250)):
        for number in (0, 1, 3, 12):
            mask = np.zeros((height, width), np.uint8)
            for _ in range(number):  # often over an edge, often over one another
                (y, x), size = rng.integers([height, width]), rng.integers(1, [height // 2 + 2, width // 2 + 2])
                mask[y : y + size[0], x : x + size[1]] = 255
            assert np.array_equal(inpaint(image, mask, radius), cv2.inpaint(image, mask, radius, cv2.INPAINT_TELEA))
    everything = np.ones((height, width), np.uint8)
    assert np.array_equal(inpaint(noise, everything, radius), noise), "nothing is known, so nothing is filled"
