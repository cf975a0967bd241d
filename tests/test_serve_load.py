"""`clear serve` under load: many clients, some of which leave and some of which send nonsense."""

import asyncio
import random
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving import Server, asking, make_workspace, picture, serving

CLIENTS, REQUESTS = 64, 2000
BAD = (b"{", b"[]", b'{"messages": 1}', b"\xff", b'{"messages": [{"role": "user", "content": "which elephant ?"}]}')


def _bodies() -> list[dict]:
    """Twelve questions that have one right answer each."""
    return [
        asking(
            image=picture(n % 5),
            max_tokens=5 + n,
            clear={"restore": ("auto", "always", "never")[n % 3]},
        )
        for n in range(12)
    ]


async def _load(server: Server, right: list[str], requests: int) -> tuple[int, int]:
    """Send so many requests from CLIENTS at once; returns how many were answered and how many left or were refused."""
    drawn, left = random.Random(0), iter(range(requests))
    bodies, answered, other = _bodies(), 0, 0
    limits = httpx.Limits(max_connections=CLIENTS)

    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as http:

        async def client() -> None:
            nonlocal answered, other
            for _ in left:
                fate = drawn.random()
                number = drawn.randrange(len(bodies))
                if fate < 0.1:
                    headers = {"Content-Type": "application/json"}
                    response = await http.post("/v1/chat/completions", content=drawn.choice(BAD), headers=headers)
                    assert response.status_code == 400 and response.json()["error"]["message"]
                    other += 1
                elif fate < 0.2:
                    stream = bodies[number] | {"stream": drawn.random() < 0.5, "n": 4, "max_tokens": 60}
                    try:
                        post = http.post("/v1/chat/completions", json=stream)
                        await asyncio.wait_for(post, drawn.random() / 10)
                    except TimeoutError:
                        other += 1
                else:
                    response = await http.post("/v1/chat/completions", json=bodies[number])
                    assert response.status_code == 200, response.text
                    assert response.json()["choices"][0]["message"]["clear"]["trace"] == right[number]
                    answered += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client())
    return answered, other


@pytest.mark.slow
def test_every_good_request_is_answered_right_and_memory_stays_flat(tmp_path: Path):
    make_workspace(tmp_path, "sampling.max_think_tokens=60", endless=True)
    with serving(tmp_path, "--rows", "32", "--queue", "512") as server:
        right = [server.ask(body).json()["choices"][0]["message"]["clear"]["trace"] for body in _bodies()]
        process = psutil.Process(server.process.pid)
        asyncio.run(_load(server, right, REQUESTS // 4))
        warm = process.memory_info().rss
        answered, other = asyncio.run(_load(server, right, REQUESTS))
        assert answered > REQUESTS * 0.75 and other > REQUESTS * 0.1
        server.wait_for("clear_batch_rows", 0)
        server.wait_for("clear_queue_rows", 0)
        assert process.memory_info().rss - warm < 60 * 2**20
        assert process.num_threads() < 40
        assert "Traceback" not in server.log
