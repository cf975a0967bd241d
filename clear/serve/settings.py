"""What the operator of a server decides: who may ask, how much, and how it is answered."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """`name` is the model's for clients; `key` "" asks for none. The rest bounds what one request, or all, may take.

    rows: answered at once; queue: rows that wait; body: bytes of a request (and of a fetched picture); pixels: of a
    picture; prompt: tokens read; tokens: written; seconds: from the first byte to the answer. `fetch` allows pictures
    by http(s) URL. `restore` and `feedback` hold where a request names none.
    """

    name: str
    key: str = ""
    rows: int = 32
    queue: int = 256
    body: int = 20 * 2**20
    pixels: int = 50_000_000
    prompt: int = 8192
    tokens: int = 1024
    seconds: float = 300.0
    fetch: bool = False
    restore: str = "auto"
    feedback: str = "bridge"
