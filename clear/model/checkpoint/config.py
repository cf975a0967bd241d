"""What a model folder says of its model: the JSON files and the tokenizer, read, compared with each other, written."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clear.errors import ClearError, quoted
from clear.model.bagel import BagelConfig
from clear.model.checkpoint.format import BRIDGE, WORDS, Places, places, refuse
from clear.model.mot import LlmConfig
from clear.model.quantised import KINDS, description
from clear.model.sequence import SpecialTokens
from clear.model.tokenizer import MARKERS, SETTINGS, TOKENIZER, read_text, read_tokenizer
from clear.model.vae import VaeConfig
from clear.model.vit import VitConfig

_SPECIAL = dict(zip(("bos_token_id", "eos_token_id", "start_of_image", "end_of_image"), MARKERS, strict=True))
SOURCES = WORDS[1:]
"""Tokenizer files beside tokenizer.json; the published code reads them, so they are kept when a model is saved."""

_ONLY = {
    "llm_config.json": {
        "hidden_act": "silu",
        "qk_norm": True,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "vit_config.json": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
"""Keys of published configs that would change what a model computes, and the one value that is implemented here, which
an absent key means. config.json is not among them: the reference does not read it, and it need not agree with it."""
_SCALES = ("scale_factor", "shift_factor")


def config_files(config: BagelConfig) -> dict[str, dict]:
    llm, vit, special = config.llm, config.vit, config.special
    markers = dict(zip(_SPECIAL, (special.bos, special.eos, special.image_start, special.image_end), strict=True))
    return {
        "llm_config.json": {
            "model_type": "qwen2",
            "vocab_size": llm.vocab,
            "hidden_size": llm.hidden,
            "num_hidden_layers": llm.layers,
            "num_attention_heads": llm.heads,
            "num_key_value_heads": llm.kv_heads,
            "intermediate_size": llm.mlp,
            "rms_norm_eps": llm.rms_eps,
            "rope_theta": llm.rope_theta,
            **({"max_position_embeddings": llm.positions} if llm.positions else {}),
        },
        # One layer more than is used and stored: the published file counts a last layer that is dropped.
        "vit_config.json": {
            "model_type": "siglip_vision_model",
            "hidden_size": vit.hidden,
            "num_hidden_layers": vit.layers + 1,
            "num_attention_heads": vit.heads,
            "intermediate_size": vit.mlp,
            "patch_size": vit.patch,
            "image_size": vit.patch * vit.side,
        },
        "vae_config.json": asdict(config.vae) | {"ch_mult": list(config.vae.ch_mult)},
        "config.json": {
            "model_type": "bagel",
            "latent_patch_size": config.latent_patch,
            "max_latent_size": config.max_latent_size,
            "vit_max_num_patch_per_side": vit.side,
            "bridge": config.bridge,
            "special_tokens": markers,
            **({"quantisation": description(config.quantised)} if config.quantised else {}),
        },
    }


def read_config(folder: Path | str, tokenizer=None, base: Path | str | None = None) -> BagelConfig:
    """The configuration of a model folder (or weight file). Markers come from its tokenizer, else config.json.

    `tokenizer` is the model's own if it has been loaded already; `base` completes weights alone (see `places`). Raises
    ClearError where the files disagree.
    """
    parts = places(folder, base)
    tokenizer, folder = tokenizer or load_tokenizer(parts.tokenizer), parts.shapes
    try:
        config = _config_of(folder, None if tokenizer is None else special_tokens(tokenizer))
    except KeyError as error:
        raise ClearError(f"{folder}: key {error} is missing in the config files; fetch them again.") from error
    _check_bridge(parts, config.bridge)
    if tokenizer is not None:
        _check_tokenizer(folder, tokenizer, config)
    return config


def _check_bridge(parts: Places, bridge: str) -> None:
    """Raise ClearError where a trained bridge lies beside the weights, and no config.json says that it is used.

    A whole folder whose config.json says "direct" is its own witness: there the file is a leftover.
    """
    file, own = parts.weights / BRIDGE, parts.shapes / "config.json"
    stated = read_json(parts.shapes, own.name, False).get("bridge")
    if bridge == "direct" and file.is_file() and not (parts.whole and stated == "direct"):
        said = "key bridge is missing" if stated is None else "bridge = direct"
        raise ClearError(
            f'{own}: {said}, so that {file} would not be used; write "bridge": "mlp" there, or move {BRIDGE} away for '
            "the model without it."
        )


class _Stated:
    """The values of a JSON file of a model folder, each checked as it is read; ClearError names what it is not."""

    def __init__(self, path: Path, content: dict) -> None:
        self.path, self.content = path, content

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = 10**6) -> int:
        """A whole number. Raises KeyError for one that is missing and has no default."""
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self._refused(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, positive: bool = True) -> float:
        """A finite number. Raises KeyError as `whole`."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or (positive and value <= 0):
            raise self._refused(key, value, "a number above 0" if positive else "a number")
        return float(value)

    def _value(self, key: str, default: float | None) -> object:
        return self.content[key] if default is None else self.content.get(key, default)

    def _refused(self, key: str, value: object, expected: str) -> ClearError:
        return ClearError(f"{self.path}: {key} = {quoted(value)}, expected {expected}; fetch it again.")


def _config_of(folder: Path, special: SpecialTokens | None) -> BagelConfig:
    llm, vit, own = (
        _Stated(folder / name, read_json(folder, name, name != "config.json"))
        for name in ("llm_config.json", "vit_config.json", "config.json")
    )
    _check_implemented(llm)
    _check_implemented(vit)
    special = special or _stated_markers(folder)
    if special is None:
        raise ClearError(f"{folder}: neither a tokenizer nor special_tokens in config.json say which ids mark images.")
    bridge = own.content.get("bridge", "direct")
    if bridge not in ("direct", "mlp"):
        raise ClearError(f"{own.path}: bridge = {quoted(bridge)}, expected direct or mlp; fetch it again.")
    patch = vit.whole("patch_size")
    config = BagelConfig(
        llm=LlmConfig(
            vocab=llm.whole("vocab_size", most=10**7),
            hidden=llm.whole("hidden_size"),
            layers=llm.whole("num_hidden_layers", most=1000),
            heads=llm.whole("num_attention_heads"),
            kv_heads=llm.whole("num_key_value_heads"),
            mlp=llm.whole("intermediate_size"),
            rms_eps=llm.number("rms_norm_eps"),
            rope_theta=llm.number("rope_theta"),
            positions=llm.whole("max_position_embeddings", 0, least=0, most=10**9),
        ),
        vit=VitConfig(
            hidden=vit.whole("hidden_size"),
            layers=vit.whole("num_hidden_layers", least=2, most=1000) - 1,
            heads=vit.whole("num_attention_heads"),
            mlp=vit.whole("intermediate_size"),
            patch=patch,
            side=own.whole("vit_max_num_patch_per_side", vit.whole("image_size", least=patch) // patch),
        ),
        vae=_vae_of(folder, own),
        special=special,
        latent_patch=own.whole("latent_patch_size", 2, most=64),
        max_latent_size=own.whole("max_latent_size", 64),
        bridge=bridge,
        quantised=_quantisation(folder, own.content),
    )
    if config.llm.hidden % (2 * config.llm.heads) or config.llm.heads % config.llm.kv_heads:
        raise ClearError(  # twice: a head's width is rotated in pairs
            f"{llm.path}: hidden_size {config.llm.hidden} must divide by twice num_attention_heads {config.llm.heads}, "
            f"and that by num_key_value_heads {config.llm.kv_heads}; fetch the file again."
        )
    if config.vit.hidden % config.vit.heads:
        raise ClearError(
            f"{vit.path}: hidden_size {config.vit.hidden} must divide by num_attention_heads {config.vit.heads}; fetch "
            "the file again."
        )
    return config


def _check_implemented(stated: _Stated) -> None:
    """Raise ClearError for all keys of a file whose value this code does not implement: ignored, they would give other
    numbers than the model's own."""
    problems = [
        f"{key} = {json.dumps(value)}, and {'null' if only is None else json.dumps(only)} alone is implemented"
        for key, only in _ONLY[stated.path.name].items()
        if (value := stated.content.get(key)) not in (None, only) and not _unscaled(value)
    ]
    remedy = "Take a model of BAGEL-7B-MoT's kind, or correct the file if the weights were trained without it."
    refuse(stated.path, problems, [remedy])


def _unscaled(value: Any) -> bool:
    """Whether it is how newer versions of transformers write a rope that is not scaled."""
    return isinstance(value, dict) and value.get("rope_type", value.get("type")) == "default"


def _vae_of(folder: Path, own: _Stated) -> VaeConfig:
    """The autoencoder's shapes: of config.json, over them vae_config.json, and else the published ones."""
    within = own.content.get("vae_config", {})
    if not isinstance(within, dict):
        raise ClearError(f"{own.path}: vae_config = {quoted(within)}, expected an object; fetch it again.")
    usual, apart = VaeConfig(), read_json(folder, "vae_config.json", False)
    stated = _Stated(folder / "vae_config.json", within | apart)
    widths = stated.content.get("ch_mult", usual.ch_mult)
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= 10:
        raise ClearError(f"{stated.path}: ch_mult = {quoted(widths)}, expected a list of up to 10; fetch it again.")
    numbered = _Stated(stated.path, {f"ch_mult[{n}]": width for n, width in enumerate(widths)})
    config = VaeConfig(
        ch=stated.whole("ch", usual.ch),
        ch_mult=tuple(numbered.whole(key, most=1000) for key in numbered.content),
        num_res_blocks=stated.whole("num_res_blocks", usual.num_res_blocks, most=1000),
        z_channels=stated.whole("z_channels", usual.z_channels),
        groups=stated.whole("groups", usual.groups),
        scale_factor=stated.number("scale_factor", usual.scale_factor),
        shift_factor=stated.number("shift_factor", usual.shift_factor, positive=False),
    )
    if any(config.ch * width % config.groups for width in config.ch_mult):
        raise ClearError(
            f"{stated.path}: ch times each of ch_mult must divide by groups {config.groups}; fetch it again."
        )
    # The published factors are those of the published autoencoder: another one's latents would be off without an error.
    another = replace(config, **{key: getattr(usual, key) for key in _SCALES}) != usual
    lacking = [key for key in _SCALES if key not in stated.content]
    if lacking and another:
        raise ClearError(
            f"{stated.path}: {' and '.join(lacking)} missing beside the autoencoder's shapes; add what it was trained "
            f"with (FLUX's has {usual.scale_factor} and {usual.shift_factor})."
        )
    return config


def _quantisation(folder: Path, own: dict) -> str:
    """The type of the folder's quantised layers, "" if it has none."""
    stated = own.get("quantisation")
    if stated is None:
        return ""
    known = {kind: description(kind) for kind in KINDS}
    for kind, described in known.items():
        if stated == described:
            return kind
    raise ClearError(
        f"{folder / 'config.json'}: quantisation {json.dumps(stated)} is not one of this version's "
        f"({', '.join(known)}); make the folder again with `clear quantise`."
    )


def _stated_markers(folder: Path) -> SpecialTokens | None:
    stated = read_json(folder, "config.json", False).get("special_tokens")
    if stated is None:
        return None
    if not isinstance(stated, dict) or stated.keys() < _SPECIAL.keys():
        raise ClearError(f"{folder / 'config.json'}: special_tokens must name {', '.join(_SPECIAL)}; fetch it again.")
    within = _Stated(folder / "config.json", stated)
    return SpecialTokens(*(within.whole(name, least=0, most=10**7) for name in _SPECIAL))


def _check_tokenizer(folder: Path, tokenizer, config: BagelConfig) -> None:
    """The tokenizer belongs to the weights, as far as the configs tell: ids fit the embedding, markers agree."""
    last, token = max((number, text) for text, number in tokenizer.get_vocab(with_added_tokens=True).items())
    if last >= config.llm.vocab:
        raise ClearError(
            f"{folder}: the tokenizer ({TOKENIZER} or vocab.json) gives token {token} the id {last}, but the "
            f"embedding has {config.llm.vocab} rows (vocab_size in llm_config.json); take both from one checkpoint."
        )
    stated = _stated_markers(folder)
    if stated not in (None, config.special):
        raise ClearError(
            f"{folder}: the tokenizer gives the markers the ids {asdict(config.special)}, config.json says "
            f"{asdict(stated)}; the tokenizer belongs to another model, copy the one this model was trained with."
        )
    # A model whose embedding was grown for appended markers ends with them. One with rows to spare had them elsewhere.
    if stated is None and tokenizer.undefined and config.llm.vocab > last + 1:
        raise ClearError(
            f"{folder}: no file defines {', '.join(tokenizer.undefined)}, and with {config.llm.vocab} rows (vocab_size "
            f"in llm_config.json) the embedding does not end with them; copy {SETTINGS} or {TOKENIZER} from the model "
            "the weights came from."
        )


def special_tokens(tokenizer) -> SpecialTokens:
    """Look the four markers up in a `tokenizers.Tokenizer`. Raises ClearError for one that is missing."""
    ids = [tokenizer.token_to_id(marker) for marker in MARKERS]
    if None in ids:
        raise ClearError(
            f"{TOKENIZER}: marker {MARKERS[ids.index(None)]} is missing; use the tokenizer of the checkpoint."
        )
    return SpecialTokens(*ids)


def load_tokenizer(folder: Path | str):
    """The `tokenizers.Tokenizer` of a model folder, or None (see `clear.model.tokenizer.read_tokenizer`).

    Its attribute `sources` holds the folder's other tokenizer files, for `save_bagel`: the folder may be overwritten.
    """
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        files = [Path(folder) / name for name in SOURCES]
        tokenizer.sources = {file.name: file.read_bytes() for file in files if file.is_file()}
    return tokenizer


def read_json(folder: Path, name: str, required: bool = True) -> dict:
    path = folder / name
    if not path.exists():
        if required:
            raise ClearError(
                f"{path} is missing; a model folder has the files of BAGEL-7B-MoT (docs/BAGEL.md). "
                "A training checkpoint holds weights alone: name the folder of the model it came from, as --base or "
                "in params as model.base."
            )
        return {}
    return json_object(path, "fetch it again")


def json_object(path: Path, remedy: str) -> dict:
    """The object that a JSON file holds. Raises ClearError with the remedy for what is none, and for an absent file."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ClearError(f"{path} is missing; {remedy}.") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and nesting without end
        raise ClearError(f"{path} is not JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise ClearError(f"{path} holds a {type(content).__name__}, not a JSON object; {remedy}.")
    return content


def recorded(record: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """The files that a JSON record names under `files`, as `fingerprint` describes them. Raises ClearError with the
    remedy where it names none, or one without its hash."""
    files = json_object(record, remedy).get("files")
    entries = files.values() if isinstance(files, dict) else ()
    if not entries or not all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in entries):
        raise ClearError(f"{record}: 'files' cannot be {files!r:.60}; {remedy}.")
    return files
