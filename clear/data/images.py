"""Encoded pictures to pixels and back: what can be read, how a viewer would show it, and when a file is not whole.

Decoders fill what is missing with grey and report success, so a file is examined before its pixels are taken:

- JPEG has no checksum. libjpeg-turbo (through simplejpeg, at an eighth of the size) reports every place where the
  Huffman codes and the markers do not match; a pass over the scans finds coefficients that never reach full precision,
  the sign of an image that was truncated between two scans. Data after the end marker (a video, a second image,
  padding) is ignored.
- PNG chunks are compared with their checksums; texts and colour profiles, on which no pixel depends, are dropped.
- WebP, GIF, TIFF and the others are decoded twice, by Pillow and by OpenCV. Damage that leaves their structure intact
  cannot be detected.
"""

import hashlib
import re
import struct
import zlib
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from clear.errors import ClearError

if TYPE_CHECKING:
    from PIL import Image

READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read, by Pillow's names. An MPO file (a JPEG with further ones behind it) is opened as a JPEG."""

EXIF_ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is turned."""

_FOREIGN = [
    (rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", "a HEIC picture"),
    (rb"....ftypcrx |II\*\0....CR|IIRO|IIRS|IIU\0|FUJIFILMCCD-RAW|FOVb|\0MRM", "a camera's raw file"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a film"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (rb"%PDF", "a PDF document"),
    (rb"\s*(<\?xml[^>]*>\s*|<!--.*?-->\s*|<!DOCTYPE svg[^>]*>\s*)*<svg", "an SVG drawing"),
    (rb"\s*<(!DOCTYPE html|html)", "a web page"),
    (rb"v/1\x01", "an OpenEXR picture"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture (`git lfs pull` fetches it)"),
]
"""Beginnings of files that Pillow does not know, most of them whole."""

_TAG_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value by the type of a TIFF tag, where it is more than one."""

_RAW_TAGS = 50706, 254, 330
"""TIFF tags DNGVersion, NewSubfileType and SubIFDs: the first picture of a raw file is a reduced one."""

_HARMLESS = re.compile(
    "Corrupt JPEG data: ([1-8] extraneous bytes before marker 0xd9|bad ICC)|Unknown Adobe|Warning: unknown JFIF|"
    "Invalid SOS parameters|Could not determine subsampling|Unsupported color conversion"
)
"""What libjpeg-turbo says of whole files: bytes that some encoders leave before the end mark, odd headers."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A JPEG marker; 0xff00 is data and 0xffd0 to 0xffd7 (restart) stand inside a scan."""

MOST_SCANS = 100
"""Scans of a JPEG, each of which takes the time of the whole picture: encoders write ten, at most forty."""

MOST_MARKERS = 2**18
"""Bytes of the markers of a JPEG and of the padding before them, which are gone through one by one."""

MOST_CHUNKS = 100
"""Chunks of a PNG beside those of its pixels; there is one of each kind."""

_STRIP = 2**18
"""Pixels that are laid over white at once."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}


def pixel_sha256(image: np.ndarray) -> str:
    """Hex digest of the pixels of an image, whatever its encoding."""
    pixels = np.array(image.shape, np.int64).tobytes() + np.ascontiguousarray(image).tobytes()
    return hashlib.sha256(pixels).hexdigest()


def decode_image(data: bytes, name: str = "image") -> np.ndarray:
    """Encoded bytes to uint8 RGB (H, W, 3), as a viewer on a white page would show them.

    - Grey and palette images become RGB, CMYK too (without a colour profile).
    - 16 bits per value are scaled to 8, rounded, not cut off.
    - Transparent pixels are laid over white, whether by an alpha channel or by a transparent colour.
    - Of an animation the first frame counts.
    - The orientation noted in EXIF is applied.

    Raises ClearError naming `name` for a file that is damaged or cut off, in a format that is not in READ, of more
    pixels than Pillow allows (from its header, before anything is decoded), of more parts than any encoder writes, or
    with pixels of any other depth.
    """
    import cv2
    from PIL import Image

    damaged = ClearError(f"{name}: {len(data)} bytes are not a complete image; replace or remove it.")
    try:
        if data.startswith(_PNG):
            data = _png_pixels(data, name)
        elif data.startswith(b"\xff\xd8"):
            _check_parts(data, name)
        elif data.startswith((b"II", b"MM")):
            _check_tags(data, name)
        with Image.open(BytesIO(data), formats=READ) as picture:
            if _is_raw(picture, data):
                raise ClearError(f"{name}: a camera's raw file, which cannot be read; convert it to PNG or JPEG.")
            if picture.format in ("JPEG", "MPO"):
                _check_jpeg(data)
            if picture.format == "PPM" and picture.mode in ("1", "L", "RGB", "I"):
                return _of_ppm(picture)
            deep = picture.mode in ("I", "F") or picture.mode.startswith("I;") or _has_two_bytes(picture)
            by_pillow = picture.has_transparency_data and not deep
            clear = _clear_grey(picture, data)
            if picture.format not in ("JPEG", "MPO", "PNG") or by_pillow:
                picture.load()
            # Pillow turns TIFF files itself; OpenCV the others, except AVIF, films and what it decodes unconverted.
            film = picture.format == "AVIF" or (picture.format == "WEBP" and picture.is_animated)
            turned = picture.format != "TIFF" and (deep or by_pillow or film)
            orientation = picture.getexif().get(EXIF_ORIENTATION, 1) if turned else 1
            if by_pillow:
                return np.ascontiguousarray(_turned(_over_white(np.asarray(picture.convert("RGBA"))), orientation))
    except Image.DecompressionBombError as error:
        raise ClearError(f"{name}: {error}; make it smaller or remove it.") from error
    except ClearError:
        raise
    except Exception as error:  # decoders raise anything at damaged bytes: IndexError and TypeError for some TIFF files
        if kind := _foreign(data):
            raise ClearError(f"{name}: {kind}, which cannot be read; convert it to PNG or JPEG.") from error
        raise damaged from error
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED if deep else cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise damaged from error
    if array is None:
        raise damaged
    if deep:
        if array.dtype != np.uint16:
            raise ClearError(f"{name}: pixels are {array.dtype}, expected 8 or 16 bits; convert it, or remove it.")
        if array.ndim == 2:
            opaque = () if clear is None else (array, array, (array != clear) * np.uint16(2**16 - 1))
            array = np.stack([array, *opaque], axis=2)
        else:
            array = array[:, :, [2, 1, 0, 3][: array.shape[2]]]
        array = _over_white(array)
    return np.ascontiguousarray(_turned(array, orientation))


def _of_ppm(picture: "Image.Image") -> np.ndarray:
    """Of a PBM, PGM or PPM, whose white is what its header says (4,095 of a camera's twelve bits): OpenCV takes every
    value for one of 255, Pillow scales it to 255 or, in mode I, to 65,535."""
    if picture.mode != "I":
        return np.array(picture.convert("RGB"))
    return _over_white(np.asarray(picture).astype(np.uint16)[:, :, None])


def encode_image(array: np.ndarray, kind: str = "png") -> bytes:
    """uint8 RGB (H, W, 3) to bytes: `png` (lossless) or `jpeg` (quality 95, as the published benchmark)."""
    import cv2

    # No row filter: on flat pictures it halves the time and the file is no larger.
    png = [cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    flags = png if kind == "png" else [cv2.IMWRITE_JPEG_QUALITY, 95]
    done, buffer = cv2.imencode(f".{kind}", cv2.cvtColor(array, cv2.COLOR_RGB2BGR), flags)
    if not done:
        raise ClearError(f"An image of shape {array.shape} could not be encoded as {kind}.")
    return buffer.tobytes()


def stored(data: bytes, array: np.ndarray) -> bytes:
    """A file as samples keep it: a PNG or JPEG as it is, any other as a JPEG of its pixels."""
    return data if data.startswith((_PNG, b"\xff\xd8\xff")) else encode_image(array, "jpeg")


def _foreign(data: bytes) -> str:
    """What kind of file this is, if it is one that is not read; "" if it is, or is unknown."""
    from PIL import Image

    head = bytes(data[:1024])
    if named := next((kind for start, kind in _FOREIGN if re.match(start, head, re.DOTALL | re.IGNORECASE)), ""):
        # AVIF begins as a film does, and damaged it is still AVIF.
        return "" if re.match(rb"....ftypavi[fs]", head, re.DOTALL) else named
    try:
        with Image.open(BytesIO(data)) as picture:
            return "" if picture.format in READ else f"a picture in the format {picture.format}"
    except Exception:  # Pillow's readers of rare formats raise whatever occurs to them; the file is refused anyway
        return ""


def _is_raw(picture, data: bytes) -> bool:
    """Whether what Pillow opens as TIFF is the preview in a camera's raw file (DNG, NEF, ARW, CR2, …)."""
    if picture.format != "TIFF":
        return False
    version, kind, parts = (picture.tag_v2.get(tag) for tag in _RAW_TAGS)
    return bool(version) or (kind == 1 and parts is not None) or data[8:10] == b"CR"


def _check_jpeg(data: bytes) -> None:
    """Raise ValueError for a JPEG with damage inside."""
    import simplejpeg

    try:
        space = simplejpeg.decode_jpeg_header(data)[2]
        space = "CMYK" if space in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, space, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        if not _HARMLESS.match(str(error)):
            raise
    if not _all_scans(data):
        raise ValueError("the last scans are missing")


def _check_parts(data: bytes, name: str) -> None:
    """Raise ClearError for a JPEG of so many scans, or segments or padding, that decoding it would take minutes."""
    place, markers, scans = 2, 0, 0
    while (marker := _MARKER.search(data, place)) and marker[1] != b"\xd9":
        place, markers = marker.end(), markers + marker.end() - marker.start()
        if markers > MOST_MARKERS:
            raise ClearError(f"{name}: more than {MOST_MARKERS:,} bytes of JPEG markers; save it again, or remove it.")
        if marker[1] == b"\x01":  # a marker without a segment
            continue
        place += int.from_bytes(data[place : place + 2], "big")
        if marker[1] == b"\xda":
            scans += 1
            if scans > MOST_SCANS:
                raise ClearError(f"{name}: more than {MOST_SCANS} scans in a JPEG; save it again, or remove it.")
            if scans == 1 and data.count(b"\xff\xda", place) < MOST_SCANS:  # of a scan's data there may be megabytes
                return


def _check_tags(data: bytes, name: str) -> None:
    """Raise ClearError for a TIFF whose tags share their bytes so often that they would fill the memory."""
    order = "<" if data[:1] == b"I" else ">"
    try:
        if big := data[2:4] in (b"\x2b\0", b"\0\x2b"):
            (start,) = struct.unpack_from(f"{order}Q", data, 8)
            (count,) = struct.unpack_from(f"{order}Q", data, start)
        else:
            (start,) = struct.unpack_from(f"{order}I", data, 4)
            (count,) = struct.unpack_from(f"{order}H", data, start)
        start, step, entry = (start + 8, 20, f"{order}HQ") if big else (start + 2, 12, f"{order}HI")
        total = 0
        for place in range(start, min(start + count * step, len(data) - step + 1), step):
            kind, values = struct.unpack_from(entry, data, place + 2)
            size = values * _TAG_BYTES.get(kind, 1)
            total += size if size <= len(data) else 0  # such a tag is passed over
    except (struct.error, OverflowError):  # damaged, or of another format: Pillow says so
        return
    if total > 4 * len(data):
        raise ClearError(f"{name}: the tags of this TIFF state {total:,} bytes of {len(data):,}; save it as PNG.")


def _all_scans(data: bytes) -> bool:
    """Whether the scans before the end mark bring all 64 coefficients of every component to full precision."""
    place, missing, progressive = 2, {}, False
    while (marker := _MARKER.search(data, place)) and marker[1] != b"\xd9":
        kind, start = marker[1][0], marker.end()
        place = start + int.from_bytes(data[start : start + 2], "big")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # SOF; the others are DHT, JPG and DAC
            progressive = kind & 3 == 2
            missing = {component: set(range(64)) for component in data[start + 8 : place : 3]}
        elif kind == 0xDA:  # SOS: components with their tables, first and last coefficient, successive approximation
            *components, first, last, precision = data[start + 3 : place]
            for component in components[::2]:
                if not progressive:
                    missing.pop(component, None)
                elif precision & 15 == 0:
                    missing.get(component, set()).difference_update(range(first, last + 1))
            if not any(missing.values()):
                return True
    return False


def _png_pixels(data: bytes, name: str) -> bytes:
    """A PNG file with nothing but the chunks that pixels depend on. Raises ValueError where one is damaged, ClearError
    where there are so many that their warnings would take minutes."""
    kept, others, place, kind = [_PNG], 0, len(_PNG), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(data):
            raise ValueError("the file ends before its end mark")
        if kind in _PNG_PIXELS:
            others += kind != b"IDAT"
            if others > MOST_CHUNKS:
                raise ClearError(f"{name}: more than {MOST_CHUNKS} chunks beside the pixels; save it again.")
            if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError(f"a chunk {kind!r} differs from its checksum")
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _clear_grey(picture, data: bytes) -> int | None:
    """The grey of a PNG that is transparent, if there is one.

    Pillow compares it, which is written in the file's own depth, with pixels that it has scaled to 8 bits, and OpenCV
    leaves it out for 16: for the former it is scaled here, too.
    """
    value = picture.info.get("transparency")
    if picture.format != "PNG" or data[25] != 0 or not isinstance(value, int):  # its colour type
        return None
    depth = data[24]
    if 1 < depth < 8:
        picture.info["transparency"] = value * 255 // (2**depth - 1)
    return value


def _has_two_bytes(picture) -> bool:
    """Whether a Pillow image of an 8-bit mode is kept in 16 bits in its file: Pillow itself drops the lower ones."""
    if picture.format == "PNG":
        return picture.tile[0][3].endswith(";16B")  # the raw mode, as "RGB;16B"
    return picture.format == "TIFF" and 16 in picture.tag_v2.get(258, ())  # BitsPerSample


def _over_white(array: np.ndarray) -> np.ndarray:
    """uint8 or uint16 (H, W, 1, 3 or 4), grey, RGB or RGBA, to uint8 RGB with what is transparent over white.

    A strip at a time: a pixel takes a hundred bytes on the way, a picture of the most that are read a tenth of a
    gigabyte per million.
    """
    top, made = np.iinfo(array.dtype).max, np.empty((*array.shape[:2], 3), np.uint8)
    height = max(1, _STRIP // max(1, array.shape[1]))
    for start in range(0, len(array), height):
        strip = array[start : start + height]
        values = strip[:, :, :3] / top
        if array.shape[2] == 4:
            opacity = strip[:, :, 3:] / top
            values = values * opacity + (1 - opacity)
        made[start : start + height] = np.rint(values * 255)  # one value of a grey pixel becomes three
    return made


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; anything else counts as 1)."""
    quarters, mirrored = {2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}.get(
        orientation, (0, 0)
    )
    array = np.rot90(array, quarters)
    return array[:, ::-1] if mirrored else array
