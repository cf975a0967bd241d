"""Mean-shift filtering of a picture over two pyramid levels, as a compiled kernel (METHOD §6, item 6).

The same pixels as `cv2.pyrMeanShiftFiltering(image, spatial, color)` with its defaults (maxLevel 1, at most five
iterations, stop at a change of 1), on one thread. It is faster because its inner loop has no branch, so that the
compiler turns it into vector instructions on 16-bit numbers, and because windows that several pixels come to are
summed once: one slot per pixel remembers the last colour seen there and where the window led.

Compiled at the first use (numba is imported only then; four seconds) and kept beside the bytecode of this module.
"""

import functools

import cv2
import numpy as np

ITERATIONS = 5
WIDEST = 63  # px: the grey levels of one row of a window add up to less than 2**15
REMEMBERED = 8  # per window position: the colour that came (3), the position (2) and the colour (3) that it led to


def mean_shift_filter(image: np.ndarray, spatial: int, color: int) -> np.ndarray:
    """Filter uint8 (H, W, 3) with radii `spatial` (px) and `color` (0 to 100 grey levels); uint8 (H, W, 3)."""
    if spatial > WIDEST:
        return cv2.pyrMeanShiftFiltering(image, spatial, color)
    level = _compiled()
    small = cv2.pyrDown(image)
    found = np.empty_like(small)
    everywhere = np.ones(small.shape[:2], np.uint8)
    level(_planes(small), everywhere, max(spatial / 2, 1.0), color**2, _memory(small), found)
    out = cv2.pyrUp(found, dstsize=image.shape[1::-1])
    changing = _changing(found, image.shape[:2], max(color**2, 16))
    level(_planes(image), changing, max(float(spatial), 1.0), color**2, _memory(image), out)
    return out


def _planes(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.int16)


def _memory(image: np.ndarray) -> np.ndarray:
    return np.full((*image.shape[:2], REMEMBERED), -1, np.int32)


def _changing(small: np.ndarray, shape: tuple[int, int], limit: int) -> np.ndarray:
    """uint8 mask of the pixels of the large picture whose small pixel differs from one of its eight neighbours."""
    mask = np.zeros(shape, np.uint8)
    height, width = small.shape[:2]
    if min(height, width) >= 3:
        colors = small.astype(np.int32)
        middle = colors[1:-1, 1:-1]
        hit = np.zeros(middle.shape[:2], bool)
        for y in range(3):
            for x in range(3):
                near = colors[y : y + height - 2, x : x + width - 2]
                hit |= ((middle - near) ** 2).sum(2) >= limit  # the middle itself differs by 0
        rows, columns = 3 + 2 * np.arange(height - 2), 1 + 2 * np.arange(width - 2)
        mask[np.ix_(rows, columns)] = hit
    return cv2.dilate(mask, None)


def _level(planes, mask, spatial, limit, memory, out):
    height, width = mask.shape
    cap = 1
    while cap * cap <= limit:
        cap += 1  # a difference of `cap` is too much by itself, and three squares of it fit in 16 bits
    cap16, limit16 = np.int16(cap), np.int16(limit)
    for i in range(height):
        for j in range(width):
            if mask[i, j] == 0:
                continue
            x0, y0 = j, i
            c0, c1, c2 = np.int32(planes[0, i, j]), np.int32(planes[1, i, j]), np.int32(planes[2, i, j])
            for _ in range(ITERATIONS):
                slot = memory[y0, x0]
                if slot[0] != c0 or slot[1] != c1 or slot[2] != c2:
                    left, right = max(int(np.rint(x0 - spatial)), 0), min(int(np.rint(x0 + spatial)), width - 1)
                    top, bottom = max(int(np.rint(y0 - spatial)), 0), min(int(np.rint(y0 + spatial)), height - 1)
                    n = s0 = s1 = s2 = sx = sy = 0
                    k0, k1, k2 = np.int16(c0), np.int16(c1), np.int16(c2)
                    for y in range(top, bottom + 1):
                        a, b, c = (
                            planes[0, y, left : right + 1],
                            planes[1, y, left : right + 1],
                            planes[2, y, left : right + 1],
                        )
                        m, q0, q1, q2, qx = np.int16(0), np.int16(0), np.int16(0), np.int16(0), np.int16(0)
                        for x in range(right + 1 - left):
                            d0 = min(np.int16(abs(np.int16(a[x] - k0))), cap16)
                            d1 = min(np.int16(abs(np.int16(b[x] - k1))), cap16)
                            d2 = min(np.int16(abs(np.int16(c[x] - k2))), cap16)
                            inside = np.int16(np.int16(d0 * d0) + np.int16(d1 * d1) + np.int16(d2 * d2)) <= limit16
                            keep = np.int16(-1) if inside else np.int16(0)
                            m = np.int16(m - keep)
                            q0, q1, q2 = (
                                np.int16(q0 + (a[x] & keep)),
                                np.int16(q1 + (b[x] & keep)),
                                np.int16(q2 + (c[x] & keep)),
                            )
                            qx = np.int16(qx + (np.int16(x) & keep))
                        n += m
                        s0, s1, s2 = s0 + q0, s1 + q1, s2 + q2
                        sx, sy = sx + qx + left * m, sy + y * m
                    if n == 0:
                        break
                    part = 1.0 / n
                    slot[0], slot[1], slot[2] = c0, c1, c2
                    slot[3], slot[4] = int(np.rint(sx * part)), int(np.rint(sy * part))
                    slot[5], slot[6], slot[7] = (
                        int(np.rint(s0 * part)),
                        int(np.rint(s1 * part)),
                        int(np.rint(s2 * part)),
                    )
                x1, y1, t0, t1, t2 = slot[3], slot[4], slot[5], slot[6], slot[7]
                change = abs(x1 - x0) + abs(y1 - y0) + (t0 - c0) ** 2 + (t1 - c1) ** 2 + (t2 - c2) ** 2
                still = (x1 == x0 and y1 == y0) or change <= 1
                x0, y0, c0, c1, c2 = x1, y1, t0, t1, t2
                if still:
                    break
            out[i, j, 0], out[i, j, 1], out[i, j, 2] = c0, c1, c2


@functools.cache
def _compiled():
    import numba

    return numba.njit(cache=True, boundscheck=False)(_level)
