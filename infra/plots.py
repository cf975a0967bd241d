"""`make plots`: DVC's own plots of two revisions as one page that needs no network.

`dvc plots diff` draws what dvc.yaml names with the templates of .dvc/plots, but its page loads Vega from the network.
Here the same command fills a page that has Vega inside (the bundle of vl-convert). Usage: plots.py FOLDER [REVISION …];
without a revision HEAD is compared with the workspace.
"""

import subprocess
import sys
from pathlib import Path

import yaml

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>CLEAR: plots of DVC</title>
<style>body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; } table { border-spacing: 15px; }</style>
<script>%s</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def page() -> str:
    """DVC's page template with Vega, Vega-Lite and Vega-Embed inside."""
    import vl_convert

    # vl-convert's newest Vega-Lite speaks the schema of the templates (v5) too, but warns on every plot.
    return PAGE % vl_convert.javascript_bundle(vl_version="5.20").replace("</script", "<\\/script")


def drawn() -> list[str]:
    """The plots that are meant to be looked at. The figures of trainings are plots for DVC's run cache alone."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values()
    outputs = [name for stage in stages for plot in stage.get("plots", []) for name in plot]
    named = [name for plot in yaml.safe_load(Path("data/dvc.yaml").read_text())["plots"] for name in plot]
    return [*named, *(name for name in outputs if name.endswith(".csv"))]


def main(arguments: list[str]) -> int:
    """Write FOLDER/index.html and return DVC's exit status."""
    if not arguments:
        print("usage: python infra/plots.py FOLDER [REVISION …]", file=sys.stderr)
        return 2
    folder, *revisions = arguments
    template = Path(folder) / "template.html"
    template.parent.mkdir(parents=True, exist_ok=True)
    template.write_text(page())
    command = [sys.executable, "-m", "dvc", "plots", "diff", "-q", "--html-template", str(template), "-o", folder]
    status = subprocess.run([*command, "--targets", *drawn(), "--", *revisions], check=False).returncode
    template.unlink()
    if status == 0:
        print(f"plots: {(Path(folder) / 'index.html').resolve()}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
