"""Tracked files with something in them that looks like a secret: `make lint` runs it, and it needs no network.

Only forms that are nothing else are looked for, so a finding is one. It says file, line and kind, never the secret.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

FORMS = {
    "an AWS access key": (("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of GitHub": (("gh", "github_pat_"), r"\b(?:gh[pousr]_[0-9A-Za-z]{36,}|github_pat_[0-9A-Za-z_]{50,})"),
    "a token of GitLab": (("glpat-",), r"\bglpat-[0-9A-Za-z_-]{20,}"),
    "a key of OpenAI or Anthropic": (("sk-",), r"\bsk-(?:ant-|proj-)?[0-9A-Za-z_-]{32,}"),
    "a token of Hugging Face": (("hf_",), r"\bhf_[0-9A-Za-z]{30,}"),
    "a key of Prefect": (("pnu_", "pnb_"), r"\bpn[ub]_[0-9A-Za-z]{30,}"),
    "a webhook of Slack": (("hooks.slack.com",), r"hooks\.slack\.com/services/T\w+/B\w+/\w{20,}"),
    "a key of Google": (("AIza",), r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a private key": ((" PRIVATE KEY-",), r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"),
    "a password in an address": (("://",), r"https?://[^\s/:@{}<>$*\"']+:[^\s/@{}<>$*\"']{8,}@"),
}
"""Kind → (what every such text has, which is quickly looked for; its form)."""


def found(files: Iterable[Path]) -> Iterator[str]:
    """`<file>:<line>: <kind>` for each; what is not text is searched byte by byte."""
    for file in files:
        text = file.read_text(encoding="latin-1")
        for kind, (hints, form) in FORMS.items():
            for match in re.finditer(form, text) if any(hint in text for hint in hints) else ():
                yield f"{file}:{text.count(chr(10), 0, match.start()) + 1}: {kind}"


def main() -> int:
    """Search what git tracks in the working directory; 1 if there is anything."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout.split("\0")
    lines = list(found(file for file in map(Path, filter(None, listed)) if file.is_file()))
    for line in lines:
        print(f"{line}; take it out of the history, and make it invalid where it was issued", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
