"""From params.yaml back into clear/conf: the values of an edit, or of an applied experiment, become those of a profile.

`dvc exp apply` and a person's edit change params.yaml alone, which is composed from clear/conf. `clear params --adopt`
writes every value that differs into the files it is composed from: where the profile's own file states the key, there;
else into config.yaml for the default profile, and into the profile's file for another one, which then becomes the
default. Only the text of the values changes, so that comments stay.
"""

from pathlib import Path
from typing import Any

import yaml

from clear.config import CONF_DIR, PARAMS, compose, load, read_yaml
from clear.data.io import write_text
from clear.errors import ClearError
from clear.project.check import differences
from clear.project.scratch import write_params

DEFAULT = "tiny"
"""The profile that config.yaml has the values of."""


def adopt(workspace: Path) -> list[str]:
    """Make clear/conf compose to the params.yaml of `workspace`; returns a line per changed key, and writes params.yaml
    in its own form again.

    Raises ClearError for a value that is not valid, before anything is written.
    """
    from omegaconf import OmegaConf

    config = load(workspace / PARAMS)
    wanted = OmegaConf.to_container(read_yaml(workspace / PARAMS), resolve=True)
    changed = []
    own = f"profile/{config.profile}.yaml"
    texts = {name: (CONF_DIR / name).read_text() for name in ("config.yaml", own)}
    elsewhere = "config.yaml" if config.profile == DEFAULT else own
    if compose()["profile"] != config.profile:
        texts["config.yaml"] = _with_default(texts["config.yaml"], config.profile)
        changed.append(f"config.yaml: the default profile is {config.profile}")
    for key, here, there in differences(wanted, compose([f"profile={config.profile}"])):
        name = own if _find(texts[own], key.split(".")) else elsewhere
        texts[name] = with_value(texts[name], key.split("."), here)
        changed.append(f"{name}: {key} = {here!r} (was {there!r})")
    for name, text in texts.items():
        if text != (CONF_DIR / name).read_text():
            write_text(CONF_DIR / name, text)
    if left := [key for key, _, _ in differences(wanted, compose())]:
        raise ClearError(f"{', '.join(left)}: clear/conf composes to another value still; edit it by hand.")
    write_params(workspace / PARAMS)
    return changed


def with_value(text: str, path: list[str], value: Any) -> str:
    """The text of a YAML file with another value, or one more, for the key at `path`; all else stays as it is."""
    shown = _flow(value)
    if node := _find(text, path):
        return text[: node.start_mark.index] + shown + text[node.end_mark.index :]
    depth = len(path) - 1
    while depth and not isinstance(_find(text, path[:depth]), yaml.MappingNode):
        depth -= 1
    for key in reversed(path[depth + 1 :]):
        shown = f"{{{key}: {shown}}}"
    entry = f"{path[depth]}: {shown}"
    if not depth:
        return f"{text.rstrip()}\n\n{entry}\n"
    section = _find(text, path[:depth])
    if section.flow_style:
        end = section.end_mark.index - 1
        return f"{text[:end].rstrip()}{', ' if section.value else ''}{entry}{text[end:]}"
    first = section.value[0][0].start_mark
    return f"{text[: first.index]}{entry}\n{' ' * first.column}{text[first.index :]}"


def _find(text: str, path: list[str]) -> yaml.Node | None:
    """The node of the value at `path`, or None."""
    node = yaml.compose(text)
    for key in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for name, value in node.value if name.value == key), None)
    return node


def _flow(value: Any) -> str:
    shown = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
    return shown.removesuffix("\n...").strip()


def _with_default(text: str, profile: str) -> str:
    """config.yaml with another profile in its defaults."""
    entries = _find(text, ["defaults"])
    for entry in entries.value if isinstance(entries, yaml.SequenceNode) else ():
        if isinstance(entry, yaml.MappingNode):
            node = next((value for name, value in entry.value if name.value == "profile"), None)
            if node:
                return text[: node.start_mark.index] + profile + text[node.end_mark.index :]
    raise ClearError("clear/conf/config.yaml: its defaults name no profile.")
