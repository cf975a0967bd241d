"""Reading and checking parameters: the types and bounds of clear/schema.py, and the rules between values.

The YAML files under `clear/conf` state the values (Hydra groups, composed by `clear params` or `dvc exp run -S`). A
stage reads the composed `params.yaml`, however it was edited, and every value passes the same checks: an unknown key, a
wrong type or a value out of range is rejected with its full name.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from clear.errors import ClearError, one_line, printable
from clear.schema import PROFILES, Config, Degrade, Endpoint, Grpo, Lora, ModelSize, Runtime, Sampling, Source, Traces

CONF_DIR = Path(__file__).parent / "conf"
PARAMS = Path("params.yaml")
MOST_BYTES, MOST_VALUES, DEEPEST = 2**18, 10**4, 100
"""Of a YAML file: twenty times what this project's have. OmegaConf takes 0.2 ms for a value."""
_SHOWN = 50
"""Unknown keys that one message names, each with what it may have meant: a file from elsewhere can have thousands."""
T = TypeVar("T")
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:[^}]*")


def check(value: Any, name: str = "", origin: str = "params") -> None:
    """Raise ClearError naming the first value of a (nested) config dataclass that is out of range."""
    for item in fields(value):
        full = f"{name}.{item.name}".lstrip(".")
        found, rule = getattr(value, item.name), item.metadata
        if is_dataclass(found):
            check(found, full, origin)
        elif isinstance(found, dict):
            for key, one in found.items():
                check(one, f"{full}.{key}", origin)
        elif "values" in rule:
            for one in found if isinstance(found, list) else [found]:
                if one not in rule["values"]:
                    raise ClearError(f"{origin}: {full} = {one!r} is not one of {', '.join(rule['values'])}.")
        elif "low" in rule:
            for number in found if isinstance(found, list) else [found]:
                if not rule["low"] <= number <= rule["high"]:
                    raise ClearError(f"{origin}: {full} = {number} is outside [{rule['low']}, {rule['high']}].")
    if isinstance(value, ModelSize):
        _check_shapes(value)
    if isinstance(value, Sampling):
        _check_guidance(value, name)
    if isinstance(value, Traces) and value.kind == "oracle" and (value.restore_when == "teacher" or value.judge):
        raise ClearError(f"params: {name}.restore_when = teacher and {name}.judge need {name}.kind = teacher.")
    if isinstance(value, Source):
        _check_source(value, name)
    if isinstance(value, Degrade) and (len(value.severity_weights) != 3 or not sum(value.severity_weights)):
        raise ClearError(f"params: {name}.severity_weights must be three, of low, mid and high, and not all 0.")
    if isinstance(value, Grpo):
        _check_grpo(value, name)
    if isinstance(value, Endpoint) and value.key and not value.key.startswith("$"):
        raise ClearError(f"params: {name}.key must name an environment variable as $NAME: this file is in git.")
    if isinstance(value, Lora) and value.rank and not value.targets:
        raise ClearError(f"params: {name}.targets is empty; name linear layers, or set {name}.rank = 0.")
    if isinstance(value, Config) and value.lora.rank and {value.lora.experts, value.grpo.experts} == {"und", "gen"}:
        raise ClearError(
            f"params: grpo.experts = {value.grpo.experts} trains adapters that lora.experts = {value.lora.experts} "
            "does not add; make them the same, or one of them both."
        )
    if isinstance(value, Config) and value.grpo.restore == "always" and not value.sampling.max_restorations:
        raise ClearError("params: grpo.restore = always needs sampling.max_restorations of 1 or more.")
    if isinstance(value, Config) and value.lora.rank and (value.sft.train_vit or value.sft.robust_vit.steps):
        raise ClearError(
            "params: sft.train_vit and sft.robust_vit train the vision tower, which no adapter holds; set "
            "lora.rank = 0."
        )
    if isinstance(value, Runtime) and value.weights == "bfloat16" and value.precision != "bfloat16":
        raise ClearError(f"params: {name}.weights = bfloat16 runs under autocast; set {name}.precision = bfloat16.")
    if isinstance(value, Runtime) and value.checkpoint_every % value.log_every:
        # A log line that averages over a checkpoint would lose its first half on resume.
        raise ClearError(f"params: {name}.checkpoint_every must be a multiple of {name}.log_every = {value.log_every}.")


def _check_grpo(grpo: Grpo, name: str) -> None:
    """What would train nothing, or not what was asked for."""
    if len(grpo.sde_range) != 2 or grpo.sde_range[0] > grpo.sde_range[1]:
        raise ClearError(f"params: {name}.sde_range = {list(grpo.sde_range)} must be two shares, the lower one first.")
    image = grpo.image_weight or grpo.velocity_weight
    if image and not grpo.sigma:
        raise ClearError(
            f"params: {name}.sigma = 0 makes rollouts without noise, which image_weight and velocity_weight score; "
            "raise it, or set both to 0."
        )
    apart = grpo.reward_answer, grpo.reward_latent_quality
    others = grpo.reward_accuracy, grpo.reward_format, grpo.reward_decision, grpo.reward_direct
    if not any((*apart, *others)):
        raise ClearError(f"params: {name}: every reward_… is 0, so nothing is learned; raise one.")
    if grpo.separate_advantages and grpo.image_weight and not any(apart):
        raise ClearError(
            f"params: {name}.separate_advantages leaves the image term nothing to judge by; raise {name}.reward_answer "
            f"or {name}.reward_latent_quality."
        )
    if grpo.stop_after and not grpo.holdout_every:
        raise ClearError(f"params: {name}.stop_after = {grpo.stop_after} needs measurements; raise holdout_every.")


def _check_source(source: Source, name: str) -> None:
    if len(source.shares) not in (5, 6) or sum(source.shares) > 1 + 1e-9:
        raise ClearError(
            f"params: {name}.shares = {list(source.shares)} must be six shares, of pretrain, sft, rl, validation, "
            "bench and development, that add up to at most 1; without the last one nothing goes to development."
        )
    if (source.kind == "scenes") != (source.path == "") or (source.kind == "scenes" and source.bench_path):
        raise ClearError(
            f"params: {name}.kind = {source.kind} with {name}.path = {source.path!r} and {name}.bench_path = "
            f"{source.bench_path!r}: scenes read no path, every other kind needs {name}.path."
        )


def _check_guidance(sampling: Sampling, name: str) -> None:
    if sampling.image_guidance > 1 >= sampling.text_guidance:
        raise ClearError(
            f"params: {name}.image_guidance = {sampling.image_guidance} does nothing at {name}.text_guidance = "
            f"{sampling.text_guidance}: it acts on top of it. Raise text_guidance above 1, or set image_guidance to 1."
        )
    if sampling.guidance_from >= sampling.guidance_to:
        raise ClearError(
            f"params: {name}.guidance_from = {sampling.guidance_from} must be below {name}.guidance_to = "
            f"{sampling.guidance_to}."
        )


def _check_shapes(model: ModelSize) -> None:
    if model.hidden % model.heads or model.heads % model.kv_heads:
        raise ClearError("params: model.hidden must divide by model.heads and model.heads by model.kv_heads.")
    if model.vit_hidden % model.vit_heads or model.vae_channels % model.vae_groups:
        raise ClearError("params: model.vit_hidden must divide by model.vit_heads, model.vae_channels by vae_groups.")
    stride = 2 ** (len(model.vae_mult) - 1) * model.latent_patch
    if model.vae_size % stride:
        raise ClearError(
            f"params: model.vae_size = {model.vae_size} must be a multiple of {stride} px per latent token."
        )
    if model.vae_size // stride > model.max_latent_size:
        raise ClearError(f"params: model.max_latent_size = {model.max_latent_size} is too small for model.vae_size.")
    if model.vit_size // model.vit_patch > model.vit_side:
        raise ClearError(f"params: model.vit_side = {model.vit_side} is too small for model.vit_size.")
    if model.vit_size % model.vit_patch:
        raise ClearError(
            f"params: model.vit_size = {model.vit_size} must be a multiple of model.vit_patch = {model.vit_patch}."
        )


def from_dict(raw: Any, origin: str = "params", usual: Callable[[Mapping], dict] | None = None) -> Config:
    """Plain nested dictionaries (or OmegaConf) to a checked Config. Raises ClearError with the full key.

    `usual` gives the values that are named for keys which `raw` lacks.
    """
    config = typed(Config, raw, origin, "clear/schema.py", usual)
    check(config)
    return config


def typed(schema: type[T], raw: Any, origin: str, module: str, usual: Callable[[Mapping], dict] | None = None) -> T:
    """Plain nested dictionaries (or OmegaConf) to a dataclass of `module`; keys and types are checked, bounds are not.

    Raises ClearError with `origin` and the full key; all keys that are missing (with their values of `usual`) or
    unknown are in one message.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def refused(key: str, reason: str) -> ClearError:
        return ClearError(f"{origin}: key '{key}': {reason}. Allowed keys and types are in {module}.")

    plain = OmegaConf.to_container(raw) if OmegaConf.is_config(raw) else raw
    if wrong := _wrong_keys(schema, plain, usual):
        raise ClearError(f"{origin}: {wrong}. Allowed keys and types are in {module}.")
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), raw))
    except OmegaConfBaseException as error:
        raise refused(error.full_key or error.key or "?", str(error).splitlines()[0]) from error
    except OverflowError as error:  # OmegaConf does not say where
        raise refused(next(_beyond_floats(raw), "?"), str(error)) from error
    for key, listed in _lists(found):
        for one in listed:
            if not isinstance(one, (str, int, float)):  # OmegaConf lets mappings into any list
                raise refused(key, f"{one!r:.60} is not a value of a list")
    return found


def _wrong_keys(schema: type, raw: Any, usual: Callable[[Mapping], dict] | None) -> str:
    """All keys of `raw` that `schema` does not have, and all that it has in addition, with the remedy; "" if none.

    OmegaConf names one at a time, and says of a params.yaml from an older version neither the value nor what to do.
    """
    if not isinstance(raw, Mapping):
        return ""
    missing, unknown = _compared(schema, raw)
    said = []
    if unknown:
        known = _full_names(schema)
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        listed = ", ".join(map(printable, (_with_nearest(key, known) for key in unknown[:_SHOWN])))
        said.append(f"unknown keys {listed}{more}: correct them or take them out")
    if missing:
        values = usual(raw) if usual else {}
        listed = ", ".join(_with_value(key, values) for key in missing)
        profile = f" --set profile={values['profile']}" if values else ""
        anew = f"`clear params{profile}` writes the file anew without its own values"
        said.append(f"missing keys {listed}: add them in their sections{f'; or {anew}' if usual else ''}")
    return "; ".join(said)


def _compared(schema: type, raw: Mapping, name: str = "") -> tuple[list[str], list[str]]:
    """The full keys that a (nested) dataclass has and `raw` lacks, and those that only `raw` has."""
    known = {item.name: item.type for item in fields(schema)}
    missing = [f"{name}{key}" for key in known if raw.get(key, "???") == "???"]  # OmegaConf's word for a missing value
    unknown = [f"{name}{key}" for key in raw if key not in known]
    for key, kind in known.items():
        inner = raw.get(key)
        if not isinstance(inner, Mapping):
            continue  # of another type: OmegaConf says so
        if get_origin(kind) is dict:
            below = [(get_args(kind)[1], part, f"{name}{key}.{own}.") for own, part in inner.items()]
        else:
            below = [(kind, inner, f"{name}{key}.")]
        for section, part, prefix in below:
            if is_dataclass(section) and isinstance(part, Mapping):
                found = _compared(section, part, prefix)
                missing, unknown = missing + found[0], unknown + found[1]
    return missing, unknown


def _full_names(schema: type, name: str = "") -> list[str]:
    """The full names of all sections and keys of a (nested) dataclass."""
    found = []
    for item in fields(schema):
        found.append(f"{name}{item.name}")
        if is_dataclass(item.type):
            found += _full_names(item.type, f"{name}{item.name}.")
    return found


def _with_nearest(key: str, known: list[str]) -> str:
    """An unknown key, with the one that it may be a misspelling of."""
    if key in known:  # a name with dots, as --set takes it, is one key in YAML
        section, _, own = key.rpartition(".")
        return f"{key} (in YAML {own} below {section})"
    nearest = get_close_matches(key, known, 1, 0.8)
    return f"{key} ({nearest[0]}?)" if nearest else key


def _with_value(key: str, values: Any) -> str:
    """A missing key with its value in `values`, as YAML has it, or alone where it has none there."""
    import yaml

    if (value := value_at(values, key)) is None:
        return key
    written = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n")
    return f"{key} = {written.strip()}"


def value_at(values: Any, key: str) -> Any:
    """What nested dictionaries have under a full key with dots; None where they have no such key."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _beyond_floats(raw: Any, name: str = "") -> Iterator[str]:
    """The full keys of integers that no float holds."""
    if isinstance(raw, int) and abs(raw) > sys.float_info.max:
        yield name
    elif isinstance(raw, Mapping):
        for key in raw:
            yield from _beyond_floats(raw[key], f"{name}.{key}".lstrip("."))


def _lists(value: Any, name: str = "") -> Iterator[tuple[str, list]]:
    """The lists in a (nested) dataclass, with their full keys."""
    if isinstance(value, list):
        yield name, value
    elif is_dataclass(value):
        for item in fields(value):
            yield from _lists(getattr(value, item.name), f"{name}.{item.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _lists(one, f"{name}.{key}")


def load(path: Path | str = PARAMS) -> Config:
    """Read and check the composed parameters of a workspace."""
    if not Path(path).exists():
        raise ClearError(f"{path} is not here; run this from the project's folder, or `make params` to compose it.")
    return from_dict(read_yaml(path), str(path), _usual)


def _usual(raw: Mapping) -> dict:
    """What `clear/conf` composes for the profile of a params.yaml, or for the default one; {} if there is none such."""
    if "profile" not in raw:
        return compose()
    return compose([f"profile={raw['profile']}"]) if raw["profile"] in PROFILES else {}


def read_yaml(path: Path | str) -> Any:
    """The content of a YAML file, as OmegaConf. Raises ClearError where it is not valid YAML."""
    from omegaconf import OmegaConf

    try:
        if (size := Path(path).stat().st_size) > MOST_BYTES:
            raise ClearError(f"{path}: {size:,} bytes, and at most {MOST_BYTES:,} are read; shorten it.")
        check_yaml(Path(path).read_text(encoding="utf-8"), str(path))
        loaded = OmegaConf.load(path)
        _refuse_resolvers(loaded, str(path))
        return loaded
    except ClearError:
        raise
    except Exception as error:  # yaml's own error classes share no base with OmegaConf's
        raise ClearError(f"{path} is not valid YAML: {one_line(error)}") from error


def _refuse_resolvers(config: Any, origin: str) -> None:
    """Raise ClearError for a value such as ${oc.env:NAME}: composed, it would carry what it names, a secret of the
    environment or a file, into params.yaml, metrics and cards. References to other keys are no such values."""
    from omegaconf import OmegaConf

    if found := _RESOLVER.search(OmegaConf.to_yaml(config)):
        raise ClearError(
            f"{origin}: {found[0]}}} would copy something from outside into a tracked file; write the value itself, "
            "or $NAME where a key takes a variable's name."
        )


def check_yaml(text: str, origin: str, most: int = MOST_VALUES) -> None:
    """Refuse YAML of more than `most` values, those counted into which aliases multiply, or DEEPEST levels.

    What reads it may go through every one of them: nine lines of aliases can stand for a billion values. Raises
    ClearError, and yaml.YAMLError for what is none.
    """
    import yaml

    sizes: dict[str, int] = {}
    collections: list[tuple[str | None, int]] = []  # those that are open: anchor, and the total when it began
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
        if isinstance(event, yaml.CollectionStartEvent):
            collections.append((event.anchor, total - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = collections.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > most or len(collections) > DEEPEST:
            raise ClearError(
                f"{origin}: more than {most:,} values or {DEEPEST} levels, its aliases counted out; shorten it."
            )


def compose(overrides: tuple[str, ...] | list[str] = ()) -> dict:
    """Compose `clear/conf` with Hydra, as `dvc exp run -S` does, and return plain dictionaries.

    Hydra takes a third of a second, so what was asked for before is kept until a file of `clear/conf` changes.
    """
    stamps = tuple((str(file), file.stat().st_mtime_ns) for file in sorted(CONF_DIR.rglob("*.yaml")))
    return deepcopy(_composed(tuple(overrides), stamps))


@cache
def _composed(overrides: tuple[str, ...], stamps: tuple[tuple[str, int], ...]) -> dict:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONF_DIR.resolve()), version_base=None):
            composed = hydra_compose("config", overrides=list(overrides))
        _refuse_resolvers(composed, "clear/conf")
        plain = OmegaConf.to_container(composed, resolve=True)
    # Of a profile that is a number, or no name for a file; and of a value that names another, which is not there.
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        raise ClearError(f"clear/conf: {one_line(error)}") from error
    from_dict(plain, "clear/conf")
    return plain
