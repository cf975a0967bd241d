"""Regions filled from their surroundings by fast marching (Telea 2004), as compiled kernels (METHOD §6, item 15).

The same pixels as `cv2.inpaint(image, mask, radius, cv2.INPAINT_TELEA)`. It is faster because the weight of a
neighbour is worked out once, not once per colour, and because the front is a heap instead of a sorted list. Equal
arrival times leave the heap as they came, and every sum is taken in float32 and in the same order: the pixels are the
same where the library's compiler does not fuse multiplications with additions, as on x86-64.

Importing this module imports numba, so do it where it is needed. The kernels are compiled at the first use (a few
seconds) and kept beside the bytecode.
"""

import heapq

import cv2
import numba
import numpy as np

FAR = 1e6  # px: arrival time where the front never comes
KNOWN, MISSING = 0, 1


def inpaint(image: np.ndarray, mask: np.ndarray, radius: float) -> np.ndarray:
    """Fill uint8 (H, W, 3) where uint8 `mask` (H, W) is not 0, from pixels within `radius` px; uint8 (H, W, 3)."""
    reach = min(max(round(radius), 1), 100)
    out = image.copy()
    missing = cv2.copyMakeBorder((mask != 0).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    band = _inner(cv2.dilate(missing, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) - missing)
    time = np.full(missing.shape, FAR, np.float32)
    time[band > 0] = 0
    front = np.flatnonzero(band)
    # First outwards, as far as a missing pixel sees; these times count as negative.
    near = cv2.dilate(missing, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    around = _inner(near - missing - band)
    state, none = around.copy(), np.zeros(0, np.int64)
    _march(state, time, time.view(np.int32), front, none, none, np.zeros(0, np.float32), out)
    time[(around == MISSING) & (state == KNOWN)] *= -1
    y, x = (axis.ravel() for axis in np.mgrid[-reach : reach + 1, -reach : reach + 1])
    seen = (y**2 + x**2 <= reach**2) & (y**2 + x**2 > 0)
    squares = (y**2 + x**2)[seen].astype(np.float64)
    weights = (1 / (squares * np.sqrt(squares))).astype(np.float32)
    _march(missing, time, time.view(np.int32), front, y[seen], x[seen], weights, out)
    return out


def _inner(values: np.ndarray) -> np.ndarray:
    values[[0, -1]] = 0
    values[:, [0, -1]] = 0
    return values


@numba.njit(cache=True, error_model="numpy")
def _beside(state, time, y1, x1, y2, x2):
    """Arrival time next to two neighbours, one above or below and one left or right."""
    a, b = np.float64(time[y1, x1]), np.float64(time[y2, x2])
    first, second = state[y1, x1] != MISSING, state[y2, x2] != MISSING
    if first and second:
        if abs(a - b) >= 1:
            return np.float32(1 + min(a, b))
        return np.float32((a + b + np.sqrt(2 - (a - b) * (a - b))) * 0.5)
    if first:
        return np.float32(1 + a)
    return np.float32(1 + b) if second else np.float32(1 + min(a, b))


@numba.njit(cache=True, error_model="numpy")
def _march(state, time, bits, front, down, across, weights, out):
    """Arrival times of a front that spreads from the places `front` over the missing pixels of `state`.

    All arrays have a border of one pixel but `out` (H, W, 3), in which a pixel is filled when the front comes, from
    the neighbours at the offsets (`down`, `across`); without offsets nothing is filled. `bits` are those of `time`:
    positive floats sort as these whole numbers do.
    """
    height, width = state.shape
    places = np.empty(state.size + len(front), np.int64)
    places[: len(front)] = front
    count = len(front)
    heap = [np.int64(n) for n in range(count)]  # time in the upper 32 bits, order of coming in the lower ones
    while len(heap) > 0:
        place = places[heapq.heappop(heap) & 0xFFFFFFFF]
        y, x = place // width, place % width
        state[y, x] = KNOWN
        for i, j in ((y - 1, x), (y, x - 1), (y + 1, x), (y, x + 1)):
            if i <= 0 or j <= 0 or i >= height - 1 or j >= width - 1 or state[i, j] != MISSING:
                continue
            time[i, j] = min(
                min(_beside(state, time, i - 1, j, i, j - 1), _beside(state, time, i + 1, j, i, j - 1)),
                min(_beside(state, time, i - 1, j, i, j + 1), _beside(state, time, i + 1, j, i, j + 1)),
            )
            if len(down) > 0:
                _fill(state, time, i, j, down, across, weights, out)
            state[i, j] = KNOWN
            places[count] = i * width + j
            heapq.heappush(heap, (np.int64(bits[i, j]) << 32) | count)
            count += 1


@numba.njit(cache=True, error_model="numpy")
def _slope(before, here, after, known_before, known_after):
    if known_after:
        return (after - before) * np.float32(0.5) if known_before else after - here
    return here - before if known_before else np.float32(0)


@numba.njit(cache=True, error_model="numpy")
def _fill(state, time, i, j, down, across, weights, out):
    """Fill pixel (i, j) from its known neighbours: those along the front's way and of its arrival time count most."""
    height, width = state.shape
    here = time[i, j]
    slope_x = _slope(time[i, j - 1], here, time[i, j + 1], state[i, j - 1] != MISSING, state[i, j + 1] != MISSING)
    slope_y = _slope(time[i - 1, j], here, time[i + 1, j], state[i - 1, j] != MISSING, state[i + 1, j] != MISSING)
    total = np.float32(1e-20)
    a0 = a1 = a2 = x0 = x1 = x2 = y0 = y1 = y2 = np.float32(0)
    for n in range(len(down)):
        k, m = i + down[n], j + across[n]
        if k <= 0 or m <= 0 or k >= height - 1 or m >= width - 1 or state[k, m] == MISSING:
            continue
        off_y, off_x = np.float32(-down[n]), np.float32(-across[n])
        level = np.float32(1.0 / (1.0 + np.float64(abs(time[k, m] - here))))
        along = off_x * slope_x + off_y * slope_y
        if abs(np.float64(along)) <= 0.01:
            along = np.float32(0.000001)
        weight = abs(weights[n] * level * along)
        # Places in `out`, which has no border. Slopes beside its edge are those one pixel further in.
        top, low = k - 1 + (k == 1), k - 1 - (k == height - 2)
        left, right = m - 1 + (m == 1), m - 1 - (m == width - 2)
        known_l, known_r = state[k, m - 1] != MISSING, state[k, m + 1] != MISSING
        known_t, known_b = state[k - 1, m] != MISSING, state[k + 1, m] != MISSING
        total += weight
        for color in range(3):
            middle = np.int32(out[top, left, color])
            gx = gy = np.float32(0)
            if known_r:
                if known_l:
                    gx = np.float32(np.int32(out[top, right + 1, color]) - out[top, left - 1, color]) * np.float32(2)
                else:
                    gx = np.float32(out[top, right + 1, color] - middle)
            elif known_l:
                gx = np.float32(np.int32(out[top, right, color]) - out[top, left - 1, color])
            if known_b:
                if known_t:
                    gy = np.float32(np.int32(out[low + 1, left, color]) - out[top - 1, left, color]) * np.float32(2)
                else:
                    gy = np.float32(out[low + 1, left, color] - middle)
            elif known_t:
                gy = np.float32(np.int32(out[low, left, color]) - out[top - 1, left, color])
            a, b, c = weight * np.float32(out[k - 1, m - 1, color]), weight * (gx * off_x), weight * (gy * off_y)
            if color == 0:
                a0, x0, y0 = a0 + a, x0 - b, y0 - c
            elif color == 1:
                a1, x1, y1 = a1 + a, x1 - b, y1 - c
            else:
                a2, x2, y2 = a2 + a, x2 - b, y2 - c
    out[i - 1, j - 1, 0] = _value(a0, x0, y0, total)
    out[i - 1, j - 1, 1] = _value(a1, x1, y1, total)
    out[i - 1, j - 1, 2] = _value(a2, x2, y2, total)


@numba.njit(cache=True, error_model="numpy")
def _value(mean, x, y, total):
    change = (x + y) / (np.sqrt(x * x + y * y) + np.float32(1e-20))
    return np.uint8(min(max(np.rint(mean / total + change + np.float32(0.5)), 0), 255))
