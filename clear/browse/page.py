"""The page of `clear browse`, a Streamlit script that is run anew on every change of a widget.

Everything is reachable by keyboard: only native widgets are used. On a narrow screen the choices fold into a drawer and
columns stack.
"""

from pathlib import Path

import numpy as np
import streamlit as st

from clear.browse import data
from clear.browse.data import ALL, FILTERS, GAINED, LOST, Models
from clear.data.images import decode_image, encode_image
from clear.data.records import CLEAN, Question
from clear.degradation.corruptions import CORRUPTIONS, corrupt
from clear.errors import ClearError
from clear.report.claims import LEVELS, NAMES
from clear.report.markdown import without_markup

ROOT = Path()
BENCHMARK, OWN = "Benchmark", "Your picture"
DECIDES = "as it decides"
SIDE = 320
"""Pixels; pictures whose longer side has fewer are enlarged without smoothing."""


@st.cache_data(show_spinner="reading predictions …", max_entries=1)
def frames(stamp: tuple) -> tuple[dict, list[str]]:
    """Predictions as of `stamp`, and what was left out of them."""
    return data.load(ROOT)


@st.cache_data(show_spinner="looking for the picture …", max_entries=512)
def sample_of(key: tuple, stamp: tuple):
    """The benchmark's sample as of `stamp`."""
    return data.sample_of(ROOT, key)


@st.cache_resource(max_entries=1)
def models(stamp: tuple) -> Models:
    """The models of this folder, shared by all sessions."""
    return Models(ROOT)


def enlarged(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) in whole multiples, its longer side at least SIDE."""
    times = max(1, -(-SIDE // max(image.shape[:2])))
    return image.repeat(times, 0).repeat(times, 1)


def picture(place, title: str, image: np.ndarray | None, otherwise: str) -> None:
    """A titled image, or a note why it is missing."""
    with place:
        if image is None:
            st.info(without_markup(f"{title}: {otherwise}"))
        else:
            st.image(enlarged(image), caption=without_markup(title), width="stretch")


def level(name: str) -> str:
    """What the report calls a severity."""
    return LEVELS.get(name, name)


def benchmark(stamp: tuple) -> None:
    """Answers of the evaluation, one question at a time."""
    found, notes = frames(stamp)
    for note in notes:
        st.warning(note)
    names = list(found)
    any_frame = found[names[0]]
    corruptions = [ALL, *sorted(any_frame.index.get_level_values("corruption").unique())]
    severities = [ALL, *(s for s in LEVELS if s in any_frame.index.get_level_values("severity"))]
    severities += sorted(set(any_frame.index.get_level_values("severity")) - set(severities))
    with st.sidebar:
        corruption = st.selectbox("Corruption", corruptions)
        severity = st.selectbox("Severity", severities, format_func=level, index=len(severities) - 1)
        task = st.selectbox("Task", [ALL, *sorted(any_frame.task.unique())])
        model = st.selectbox("Model", names, format_func=NAMES.get, index=len(names) - 1)
        show = st.selectbox("Show", FILTERS)
        other = names[0]
        if show in (GAINED, LOST):
            other = st.selectbox("There", [n for n in names if n != model] or names, format_func=NAMES.get)
    keys = data.select(found, model, other, corruption, severity, task, show)
    if not keys:
        st.warning("No answer is like that. Choose another corruption, severity or filter.")
        return
    right = sum(found[model].correct.loc[keys])
    number = st.number_input(
        f"Question (1 to {len(keys)}; {NAMES[model]} is right in {right})", 1, len(keys), key=f"question {len(keys)}"
    )
    one_question(found, model, keys[number - 1], stamp)


def one_question(found: dict, model: str, key: tuple, stamp: tuple) -> None:
    """Pictures, answers and traces of one question."""
    row, sample = found[model].loc[key], sample_of(key, stamp)
    name, corruption, severity, question = key
    st.subheader(without_markup(row.text))
    where = without_markup(f"{row.task} · {name} · {corruption} · {level(severity)} · {question}")
    st.caption(f"right answer: **{without_markup(row.answer)}** · {where}")
    left, middle, right = st.columns(3)
    missing = "data/bench is not on this machine (`dvc pull data/bench`)."
    clean = decode_image(sample.image) if sample and sample.paired else None
    picture(left, "clean", clean, missing if sample is None else "this picture is naturally degraded.")
    seen = decode_image(sample.degraded) if sample and sample.degraded else None
    if corruption != CLEAN:
        picture(middle, with_psnr(f"{corruption}, {level(severity)}", row.psnr_degraded), seen, missing)
    restored = decode_image(row.restored_png) if row.restored_png is not None else None
    if restored is None and row.restored and sample:
        restored = restored_again(model, key, int(row.number), stamp)
    title = with_psnr(f"restored by {NAMES[model]}", row.psnr_restored)
    lacking = "its weights or the question's picture are not here."
    picture(right, title, restored, lacking if row.restored else "it answered without restoring.")
    table = [
        {
            "model": NAMES[name],
            "answer": without_markup(frame.prediction.loc[key] or "(none)"),
            "": "right" if frame.correct.loc[key] else "wrong",
            "restored": "yes" if frame.restored.loc[key] else "no",
        }
        for name, frame in found.items()
    ]
    st.table(table)
    for name, frame in found.items():
        with st.expander(f"trace of {NAMES[name]}", expanded=name == model):
            st.code(frame.output.loc[key], language=None, wrap_lines=True)


def with_psnr(title: str, psnr: float) -> str:
    """A title with its PSNR, where there is one."""
    return title if np.isnan(psnr) else f"{title} ({psnr:.1f} dB)"


@st.cache_data(show_spinner="restoring …", max_entries=512)
def restored_again(model: str, key: tuple, number: int, stamp: tuple) -> np.ndarray | None:
    """The picture that the evaluation did not keep, made again from the same noise; None without weights, or where the
    benchmark here does not have the question."""
    asked, sample = models(stamp), sample_of(key, stamp)
    if model not in asked.here() or sample is None:
        return None
    question = next((q for q in sample.questions if q.id == key[3]), None)
    return None if question is None else asked.ask(model, sample.seen, question, number=number).picture


def own(stamp: tuple) -> None:
    """A picture of the visitor: degrade it, ask about it."""
    asked = models(stamp)
    here = asked.here()
    if not here:
        st.warning("No weights are on this machine: run `make repro`, or `dvc pull data/models`.")
        return
    file = st.file_uploader("Picture", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"])
    first, second = st.columns(2)
    corruption = first.selectbox("Degrade it by", [CLEAN, *CORRUPTIONS])
    intensity = second.slider("Intensity", 0.0, 1.0, 0.9, 0.05, disabled=corruption == CLEAN)
    if file is None:
        st.info("Choose a picture to degrade and to ask about.")
        return
    clean = decode_image(file.getvalue(), file.name)
    shown = clean if corruption == CLEAN else corrupt(corruption, clean, intensity, np.random.default_rng(0))
    with st.form("ask"):
        question = st.text_input("Question", placeholder="which colour is the circle ?")
        first, second = st.columns(2)
        model = first.selectbox("Model", here, format_func=NAMES.get, index=len(here) - 1)
        restore = second.selectbox("Restore", [DECIDES, "always", "never"])
        sent = st.form_submit_button("Ask")
    reply = None
    if sent and not question.strip():
        st.error("Type a question first.")
    elif sent:
        mode = "" if restore == DECIDES else restore
        reply = asked.ask(model, encode_image(shown), Question("own", "own", question.strip(), ""), mode)
    left, middle, right = st.columns(3)
    picture(left, "clean", clean, "")
    if corruption != CLEAN:
        picture(middle, f"{corruption}, {intensity:.2f}", shown, "")
    if reply is not None:
        picture(right, f"restored by {NAMES[model]}", reply.picture, "it answered without restoring.")
        st.subheader(without_markup(f"Answer: {reply.answer or '(none)'}"))
        st.code(reply.trace, language=None, wrap_lines=True)


def main() -> None:
    """Draw the page."""
    st.set_page_config("CLEAR", layout="wide")
    st.sidebar.title("CLEAR")
    view = st.sidebar.radio("View", [BENCHMARK, OWN])
    try:
        stamp = data.stamp(ROOT)
        if view == BENCHMARK:
            benchmark(stamp)
        else:
            own(stamp)
    except ClearError as error:
        st.error(without_markup(str(error)))


main()
