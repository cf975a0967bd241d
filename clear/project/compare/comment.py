"""The one comment of a pull request that holds the comparison: made at the first run, replaced at every later one.

Run as `python -m clear.project.compare.comment` by the workflow that may write comments, on a bare interpreter: nothing
but the standard library is imported, so that nothing has to be installed where a token is available. It never runs what
it posts. If there is no report (the comparison stopped), the comment says so, since a stale verdict would be worse.
"""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from clear.data.ports import spare_loopback
from clear.errors import ClearError, fail, one_line, refusal, say

MARKER = "<!-- clear compare -->"
"""Found in the comment's last line, invisible to readers."""

LIMIT = 60_000
"""Bytes of a comment; GitHub refuses more than 65,536 characters."""

AUTHOR = "github-actions[bot]"
PER_PAGE = 100


def body(report: Path, commit: str, run_url: str) -> str:
    """The text to post: the report with the commit and run it is about, or that there is none.

    Raises ClearError if the report is too long or is not one of `clear compare`, and OSError if it cannot be read.
    """
    about = f"Commit {commit[:10]}, [run]({run_url})."
    if report.is_symlink():  # it comes from a job that ran code of the pull request
        raise ClearError(f"{report}: a link, expected a file; nothing was posted.")
    if not report.is_file():
        return f"**no comparison** – it did not finish for this commit; the run says why. {about}\n\n{MARKER}\n"
    try:
        text = report.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ClearError(f"{report}: byte {error.start} is not UTF-8; nothing was posted.") from error
    if MARKER not in text:
        raise ClearError(f"{report}: not written by `clear compare` (its marker is missing); nothing was posted.")
    # The last one: an answer quoted in the report may hold the marker, too.
    text = f"{text.rpartition(MARKER)[0]}{about}\n\n{MARKER}\n"
    if len(text.encode()) > LIMIT + 1_000:
        raise ClearError(f"{report}: {len(text.encode()):,} bytes, a comment holds {LIMIT:,}; nothing was posted.")
    return text


def post(api: str, repository: str, number: int, text: str, token: str, author: str = AUTHOR) -> str:
    """Replace the comment of `author` that holds the marker, or make one; returns its address.

    Raises ClearError with the server's answer if it refuses, and what went wrong if there is none that can be read.
    """
    base = f"{api}/repos/{repository}/issues"
    for comment in _comments(f"{base}/{number}/comments", token):
        # Anyone can quote the marker, so only our own comment counts.
        if MARKER in (comment.get("body") or "") and (comment.get("user") or {}).get("login") == author:
            return _call("PATCH", f"{base}/comments/{comment['id']}", token, {"body": text})["html_url"]
    return _call("POST", f"{base}/{number}/comments", token, {"body": text})["html_url"]


def _comments(url: str, token: str) -> list[dict]:
    comments, page = [], 1
    while True:
        part = _call("GET", f"{url}?per_page={PER_PAGE}&page={page}", token)
        comments += part
        if len(part) < PER_PAGE:
            return comments
        page += 1


def _call(method: str, url: str, token: str, sent: dict | None = None):
    """The server's answer: for GET a list of comments, else the comment that was made or changed."""
    posted = "nothing was posted" if method == "GET" else "it may not have been posted: run the job again"
    request = urllib.request.Request(
        url,
        data=None if sent is None else json.dumps(sent).encode(),
        method=method,
        headers={
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "User-Agent": "clear-compare",
        },
    )
    try:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            told = " ".join(error.read().decode(errors="replace").split())[:300]
            raise ClearError(
                f"{method} {url}: {error.code} {error.reason}: {told}; nothing was posted; may this job write comments "
                "(pull-requests: write)?"
            ) from error
    except (OSError, http.client.HTTPException) as error:  # no connection, or one that ends before the answer does
        said = getattr(error, "reason", "") or one_line(error) or type(error).__name__
        raise ClearError(f"{method} {url}: {said}; {posted}; check the address and the network.") from error
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ClearError(f"{method} {url}: the answer is not JSON ({one_line(error)}); {posted}.") from error
    comments = found if method == "GET" else [found]
    if not (isinstance(comments, list) and all(map(_is_comment, comments))):
        raise ClearError(f"{method} {url}: the answer is not one of GitHub's; {posted}; check the address.")
    return found


def _is_comment(value: object) -> bool:
    kinds = {"id": int, "html_url": str, "body": str | None, "user": dict | None}
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def main(arguments: list[str] | None = None) -> int:
    """Post the report named on the command line; token and server come from the environment of the workflow."""
    parser = argparse.ArgumentParser(
        prog="python -m clear.project.compare.comment", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repository", required=True, help="owner/name")
    parser.add_argument("--number", required=True, type=int, help="of the pull request")
    parser.add_argument("--commit", required=True, help="head of the pull request that was compared")
    parser.add_argument("--run-url", required=True, help="the run that made the report")
    parser.add_argument("--report", required=True, type=Path, help="compare.md; may be absent")
    given = parser.parse_args(arguments)
    token = os.environ.get("GITHUB_TOKEN", "").strip()
    api = os.environ.get("GITHUB_API_URL", "https://api.github.com")
    spare_loopback()
    try:
        if not token:
            raise ClearError("GITHUB_TOKEN is not set; the workflow must pass `github.token` to this step.")
        say(post(api, given.repository, given.number, body(given.report, given.commit, given.run_url), token))
    except (ClearError, OSError) as error:
        if (refused := refusal(error)) is None:
            raise
        return fail(refused)
    return 0


if __name__ == "__main__":
    sys.exit(main())
