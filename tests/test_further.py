"""Degradations beyond the sixteen: plugins are checked call by call, presets get worse with severity."""

import json
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from clear import config as configuration
from clear.data.images import decode_image
from clear.data.records import EXTRA, read_samples, write_samples
from clear.degradation import registry
from clear.degradation.build import degraded_samples
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.plugin import degradation
from clear.degradation.presets import FIELDS, PRESETS, select
from clear.degradation.protocol import SEVERITIES, draw, seed_of, training_weights
from clear.degradation.registry import Chosen, apply, chosen, extras
from clear.errors import ClearError
from clear.sources.scenes.render import scenes
from clear.stages import degrade, mmd_bench, validate
from clear.validation.bands import PRESET_CELLS, SCALE, photographs, quality_by_cell
from clear.validation.frames import PRESET_BANDS, load_bands
from tests.bench import unseen

HEAD = "import numpy as np\nfrom clear.degradation.plugin import degradation\nL = dict(low=0.2, mid=0.5, high=0.9)\n"
GOOD = """
@degradation("drizzle", severities=L)
def drizzle(image, intensity, rng, scale=1.0):
    noise = rng.normal(0, 60 * intensity, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Function: write plugins/<name>.py in a fresh working directory and return its path."""
    monkeypatch.chdir(tmp_path)
    Path("plugins").mkdir()
    extras.cache_clear()

    def write(body: str, name: str = "mine") -> str:
        file = Path("plugins") / f"{name}.py"
        file.write_text(HEAD + textwrap.dedent(body))
        return file.as_posix()

    return write


def one(body_file: str):
    (entry,) = extras(chosen([body_file], [])).values()
    return entry


IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_a_plugin_is_found_by_its_decorator(plugin):
    entry = one(plugin(GOOD))
    assert (entry.label, entry.origin) == ("+drizzle", "plugins/mine.py:drizzle")
    first = apply(entry, IMAGE, "high", 5, 1.0, "s1")
    assert (first == apply(entry, IMAGE, "high", 5, 1.0, "s1")).all()
    assert (first != apply(entry, IMAGE, "high", 6, 1.0, "s1")).any()


BAD_FILES = {
    "missing": (None, "no such file"),
    "outside": ("../x.py", "lies outside plugins/"),
    "syntax": ("def broken(:", "SyntaxError"),
    "nothing": ("x = 1", "defines no degradation"),
    "sixteen": (GOOD.replace('"drizzle"', '"jpeg"'), "one of the sixteen corruptions has this name"),
    "twice": (GOOD + GOOD.replace("def drizzle", "def again"), "'drizzle' is defined twice"),
    "levels": (GOOD.replace("severities=L", "severities=dict(low=0.5, mid=0.4, high=1)"), "rising numbers"),
    "level": (GOOD.replace("severities=L", "severities=dict(low=0.5)"), "must map low, mid and high"),
    "name": (GOOD.replace('"drizzle"', '"my rain"'), "lower-case identifier"),
    "weight": (GOOD.replace("severities=L", "severities=L, weight=0"), "positive number"),
    "band": (GOOD.replace("severities=L", "severities=L, psnr=dict(low=(30, 20))"), "must be \\(low, high\\) in dB"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named(plugin, fault):
    body, message = BAD_FILES[fault]
    file = "plugins/absent.py" if body is None else body if body.startswith("..") else plugin(body)
    with pytest.raises(ClearError, match=message) as error:
        chosen([file], [])
    assert Path(file).name in str(error.value)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_plugins_whose_helpers_have_one_name_have_their_own(tmp_path, monkeypatch, order):
    monkeypatch.chdir(tmp_path)
    for name, grey in (("a", 10), ("b", 200)):
        folder = tmp_path / "plugins" / name
        folder.mkdir(parents=True)
        (folder / "common.py").write_text(f"GREY = {grey}\n")
        body = f'@degradation("flat_{name}", severities=L)\ndef flat(image, intensity, rng, scale=1.0):\n'
        (folder / "mine.py").write_text(f"{HEAD}import common\n{body}    return np.full_like(image, common.GREY)\n")
    found = extras(chosen([f"plugins/{name}/mine.py" for name in order], []))
    image = np.zeros((8, 8, 3), np.uint8)
    grey = {name: apply(entry, image, "low", 1, 1.0, "s").max() for name, entry in found.items()}
    assert {name[-1]: value for name, value in grey.items()} == {"a": 10, "b": 200}


def test_two_plugins_or_a_plugin_and_a_preset_may_not_share_a_name(plugin):
    first, second = plugin(GOOD), plugin(GOOD, "other")
    with pytest.raises(ClearError, match=r"twice, in plugins/mine.py:drizzle and plugins/other.py:drizzle"):
        chosen([first, second], [])
    with pytest.raises(ClearError, match=r"twice, in preset rain and plugins/wet.py:drizzle"):
        chosen([plugin(GOOD.replace('"drizzle"', '"rain"'), "wet")], ["driving"])


BAD_CALLS = {
    "raises": ("raise ValueError('no luck')", "ValueError: no luck"),
    "float": ("return image / 255", "returned float64"),
    "shape": ("return image[1:]", r"returned uint8 \(39, 50, 3\), expected uint8 \(40, 50, 3\)"),
    "nothing": ("return None", "returned NoneType"),
    "unseeded": ("return np.random.randint(0, 256, image.shape, dtype=np.uint8)", "the same seed gave other pixels"),
}


@pytest.mark.parametrize("fault", BAD_CALLS)
def test_what_goes_wrong_inside_names_file_function_and_sample(plugin, fault):
    body, message = BAD_CALLS[fault]
    entry = one(
        plugin(f"@degradation('drizzle', severities=L)\ndef fall(image, intensity, rng, scale=1.0):\n    {body}\n")
    )
    with pytest.raises(ClearError, match=message) as error:
        apply(entry, IMAGE, "mid", 1, 1.0, "scene-7")
    assert "plugins/mine.py:fall" in str(error.value) and "scene-7" in str(error.value)


def test_a_plugin_that_writes_into_its_input_harms_nobody(plugin):
    body = "@degradation('drizzle', severities=L)\ndef fall(image, intensity, rng, scale=1.0):\n"
    entry = one(plugin(body + "    image[:] = 255 - image\n    return image\n"))
    before = IMAGE.copy()
    assert (apply(entry, IMAGE, "mid", 1, 1.0, "s") == 255 - before).all()
    assert (before == IMAGE).all()


def test_the_bytes_do_not_depend_on_the_number_of_workers(plugin):
    names = chosen([plugin(GOOD)], ["stains"])
    samples = list(scenes("rl", 2, 3, 256, 4))
    variants = [(s, label, level) for s in samples for label in extras(names) for level in SEVERITIES]
    alone = list(degraded_samples(variants, 0.4, workers=1, names=names))
    assert alone == list(degraded_samples(variants, 0.4, workers=2, names=names))
    assert {(s.corruption, s.intensity) for s in alone} == {
        (label, entry.severities[level]) for label, entry in extras(names).items() for level in SEVERITIES
    }
    assert all(s.seed == seed_of(s.id, s.corruption, s.severity) for s in alone)


def test_the_decorator_is_found_where_plugin_files_may_import_it():
    assert registry.degradation is degradation


def test_presets_are_apart_and_named_by_field():
    assert not set(PRESETS) & set(CORRUPTIONS)
    assert sorted(name for names in FIELDS.values() for name in names) == sorted(PRESETS)
    assert [entry.name for entry in select(["medical", "rain", "low_dose"])] == ["low_dose", "low_contrast", "rain"]
    with pytest.raises(ClearError, match="'space' is not a preset; choose one of driving, medical"):
        select(["space"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_type_shape_input_and_seed_for_any_size(name):
    for shape, scale in (((32, 47, 3), 0.4), ((200, 120, 3), 1.0), ((64, 64, 3), 3.0)):
        image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        before = image.copy()
        for level in SEVERITIES:
            first, second = (apply(PRESETS[name], image, level, 4, scale, "s") for _ in range(2))
            assert first.dtype == np.uint8 and first.shape == shape and (first == second).all()
            assert (first != image).any()
        assert (image == before).all()


@pytest.mark.parametrize("kind", ["scenes", "photographs"])
def test_presets_get_strictly_worse_and_keep_their_bands(kind):
    samples = list(scenes("validation", 6, 11, 256, 4)) if kind == "scenes" else photographs()
    found, bands = quality_by_cell(samples, PRESET_CELLS), load_bands(PRESET_BANDS)
    for name in PRESETS:
        levels = np.stack([found[EXTRA + name, level] for level in SEVERITIES])  # (3, n, PSNR and SSIM)
        assert (np.diff(levels.mean(1), axis=0) < 0).all(), name
        for level, values in zip(SEVERITIES, levels, strict=True):
            band = bands[name][level]
            assert (values[:, 0] >= band["low"]).all() and (values[:, 0] <= band["high"]).all(), (name, level)
    assert SCALE == 0.4


def test_weights_add_to_the_sixteen_and_leave_draws_without_them_alone():
    weights = training_weights() | {"+drizzle": 100.0}
    drawn = Counter(draw(f"s{n}", weights, [0.2, 0.3, 0.5])[0] for n in range(4000))
    assert abs(drawn["+drizzle"] / 4000 - 0.2) < 0.02


@pytest.fixture
def inside(plugin):
    """A workspace with samples, a plugin and a preset in its parameters."""
    file = plugin(GOOD)
    plain = configuration.compose(
        ["profile=smoke", "degrade.workers=1", f"degrade.plugins=[{file}]", "degrade.presets=[fading]"]
    )
    OmegaConf.save(OmegaConf.create(plain), "params.yaml")
    for split, count in {"pretrain": 8, "sft": 160, "rl": 96, "validation": 16, "bench": 48, "development": 32}.items():
        write_samples(f"data/samples/{split}", scenes(split, count, 5, 256, 4))
    return configuration.from_dict(plain)


@pytest.mark.slow
def test_they_flow_through_the_stages_and_a_wrong_order_is_caught_by_name(inside, plugin):
    degrade.run(inside)
    mmd_bench.run(inside)
    validate.run(inside)
    counts = json.loads(degrade.METRICS.read_text())["images"]
    assert {"+drizzle", "+fading"} <= set(counts["sft"])
    assert not any(name.startswith(EXTRA) for name in counts["validation"])
    assert json.loads(mmd_bench.METRICS.read_text())["extra"] == {"+drizzle": 72, "+fading": 72}
    assert not any(s.corruption.startswith(EXTRA) for s in read_samples("data/bench/degraded"))
    found = json.loads(validate.METRICS.read_text())["datasets"]["bench_extra"]
    assert found["psnr"]["+drizzle"]["low"] > found["psnr"]["+drizzle"]["high"]
    assert all(decode_image(s.degraded).shape == (256, 256, 3) for s in read_samples("data/bench/extra"))

    plugin(GOOD.replace("60 * intensity", "60 * (1 - intensity)"))
    extras.cache_clear()
    mmd_bench.run(inside)
    with pytest.raises(ClearError, match="bench_extra fails 'monotone'"):
        validate.run(inside)


def test_chosen_names_are_small_enough_to_send():
    assert hash(Chosen(("a",), ("b",))) == hash(Chosen(("a",), ("b",)))


@pytest.mark.parametrize("way", unseen.WAYS)
def test_damage_that_no_training_has_seen_is_made_again_alone_and_is_no_cell_of_the_benchmark(way):
    samples = list(scenes("bench", 6, 1, 128, 3))
    copies = unseen.damaged(samples, way, 0.4, 2)
    assert copies[3:] == unseen.damaged(samples[3:], way, 0.4, 2)
    assert all(copy.corruption.startswith(EXTRA) and len(copy.questions) == 2 for copy in copies)
    assert len({copy.corruption for copy in copies}) > 2 and all(copy.degraded != copy.image for copy in copies)
    if way == "twice":
        names = [copy.corruption.removeprefix(EXTRA) for copy in copies]
        once = list(degraded_samples([(s, n, "high") for s, n in zip(samples, names, strict=True)], 0.4, workers=1))
        far = [[_distance(copy) for copy in made] for made in (copies, once)]
        assert np.mean(far[0]) > 1.05 * np.mean(far[1]), "worse than any level there is"


def _distance(copy) -> float:
    clean, seen = (decode_image(data).astype(float) for data in (copy.image, copy.degraded))
    return float(np.abs(clean - seen).mean())
