"""Inputs of the fuzz runs: valid files, mutations of them, and files made by hand to do harm.

Input n of a target depends on the seed, the target's name and n only, so a run can resume anywhere.
"""

import io
import json
import random
import struct
import zipfile
import zlib

import numpy as np

_WORDS = (
    *(
        b"\0",
        b"\xff",
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r\n",
        b"\t",
    ),
    *(
        b'"',
        b'""',
        b",",
        b"{",
        b"}",
        b"[",
        b"]",
        b"null",
        b"NaN",
        b"1e999",
        b"-1",
        b"9" * 400,
        b"../" * 8,
        b"/etc/passwd",
    ),
    *(
        b"${oc.env:HOME}",
        b"!!python/object/apply:os.system ['true']",
        b"&a [*a,*a]",
        b"<think>",
        b"</answer>",
        b"\x1b[2J",
    ),
    *(b"=HYPERLINK(1)", b"\\u0000", b"\\ud800", b"true", b"image", b"data:image/png;base64,", b"__class__"),
)


def mutated(seeds: list[bytes], key: str, most: int = 2**16) -> bytes:
    """One seed with one to eight changes: bits, bytes, words, pieces of it or of another seed, cut or repeated."""
    rng = random.Random(key)
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 256))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at:at] = rng.choice(_WORDS)
        elif kind == 3:
            word = rng.choice(_WORDS)
            data[at : at + len(word)] = word
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at:at] = other[start : start + length]
        else:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
    return bytes(data[:most])


def pictures() -> list[bytes]:
    """A small picture in each format that is read, in colour, grey, with a palette and with transparency."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), np.uint8)
    made = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"):
        for mode in ("RGB", "L", "P", "RGBA", "1", "I;16"):
            stream = io.BytesIO()
            try:
                picture = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else None
                (picture or Image.fromarray(pixels).convert(mode)).save(stream, kind)
            except (OSError, KeyError, ValueError):  # a format without this mode
                continue
            made.append(stream.getvalue())
    return made


def evil_pictures() -> list[bytes]:
    """Headers that state 10⁹ pixels, data that unpacks to far more than the picture, and texts that do."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, *more: bytes) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IEND", b"")

    bomb = zlib.compress(bytes(2**28), 9)
    return [
        png(40_000, 25_000, chunk(b"IDAT", zlib.compress(b"\0"))),
        png(8, 8, chunk(b"IDAT", bomb)),
        png(8, 8, chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"IDAT", zlib.compress(bytes(200)))),
        png(8, 8, chunk(b"iCCP", b"a\0\0" + bomb), chunk(b"IDAT", zlib.compress(bytes(200)))),
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        b"P6 40000 25000 255\n" + bytes(64),
        b"P6 " + b"9" * 5000 + b" 1 255\n",
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\x01\x22\0\x02\x11\x01\x03\x11\x01\xff\xd9",
        b"II*\0\x08\0\0\0\x02\0\0\x01\x04\0\x01\0\0\0\xff\xff\xff\x3f\x01\x01\x04\0\x01\0\0\0\xff\xff\xff\x3f\x08\0\0\0",
    ]


def sheet(rows: list[dict]) -> bytes:
    """Rows as an xlsx file."""
    import openpyxl

    book, stream = openpyxl.Workbook(), io.BytesIO()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(stream)
    return stream.getvalue()


def evil_sheets() -> list[bytes]:
    """Entities that multiply, a sheet that unpacks to a gigabyte, a sheet of 10¹⁰ cells, a far cell, climbing names."""
    plain = sheet([{"index": 1, "prediction": "=1+1"}])

    def changed(name: str, change, packed: int = zipfile.ZIP_DEFLATED) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(plain)) as old, zipfile.ZipFile(stream, "w", packed) as new:
            for item in old.namelist():
                new.writestr(item, change(old.read(item)) if item == name else old.read(item))
        return stream.getvalue()

    page = "xl/worksheets/sheet1.xml"
    entities = b"".join(b'<!ENTITY e%d "%s">' % (n + 1, b"&e%d;" % n * 10) for n in range(9))
    laughs = b'<?xml version="1.0"?><!DOCTYPE w [<!ENTITY e0 "ha">' + entities + b"]>"
    return [
        changed(page, lambda xml: laughs + xml.replace(b"</sheetData>", b"&e9;</sheetData>")),
        changed(page, lambda xml: xml + b" " * 2**29),
        changed(page, lambda xml: xml.replace(b'ref="A1:B2"', b'ref="A1:XFD1048576"')),
        changed(
            page, lambda xml: xml.replace(b'r="B2"', b'r="XFD1048576"').replace(b'<row r="2"', b'<row r="1048576"')
        ),
        changed("xl/workbook.xml", lambda xml: xml.replace(b"sheet1", b"../../../../etc/passwd")),
        changed("xl/workbook.xml", lambda xml: b"<a>" * 100_000),
    ]


def deep_json() -> list[bytes]:
    """Nesting beyond any stack, numbers beyond any conversion, and a name that occurs twice."""
    deep = 200_000
    return [
        *(b"[" * deep, b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep),
        *(b'{"index": ' + b"9" * 10_000 + b"}", b'[{"index": 1e999}]', b'{"a": 1, "a": 2}', b'"\\ud800"', b"[" * 5000),
    ]


def evil_yaml() -> list[bytes]:
    """Billion laughs, depth, tags that would build objects, interpolations that read the environment or each other."""
    laughs = "a0: &a0 [ha]\n" + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 10)}]\n" for n in range(9))
    return [
        *(laughs.encode(), b"[" * 20_000, b"a: " + b"{a: " * 5000, b"seed: !!python/object/apply:os.system ['true']"),
        *(
            b"a: &a [*a]",
            b"seed: ${seed}",
            b"seed: ${oc.env:HOME}",
            b"&a a: *a",
            b"? [a]\n: 1",
            b"seed: " + b"9" * 10_000,
        ),
    ]


def evil_headers() -> list[bytes]:
    """safetensors headers: lengths beyond the file, overlapping and negative offsets, shapes that overflow."""

    def file(header: object, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + bytes(8)

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return [
        *(file({}, 2**63), file({}, 2**64 - 1), file(b"[" * 100_000), file(b""), b"", b"\1", file([1]), file({"a": 1})),
        *(file({"a": entry | change}) for change in ({"shape": [2**62, 4]}, {"shape": [-2]}, {"data_offsets": [8, 0]})),
        *(
            file({"a": entry | change})
            for change in ({"shape": "2"}, {"dtype": 1}, {"data_offsets": [0]}, {"shape": [[2]]})
        ),
    ]
