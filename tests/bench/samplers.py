"""How many forwards a restoration needs: `python tests/bench/samplers.py` prints a Markdown table.

One model restores with every sampler below, on the degraded part of data/development, and each is paired with
`sampling.flow_steps` Euler steps on the same questions, and with as many forwards of Euler's. With --restore always
every answer reads a restored picture, so that what the sampler costs is not diluted by answers that restored nothing.

- Euler: the project's own. To predict a velocity once and to reuse it for the next step, as TeaCache does with the
  residual of a diffusion transformer, is an Euler step of twice the size: the network's output *is* the velocity.
  `reuse` therefore places the steps as it goes: a velocity is predicted anew once the states have moved by more than a
  threshold (mean |Δx| / mean |x|, summed over the steps, the rows of a batch together).
- Adams–Bashforth: second order, one forward a step: v + (v − v_before) · h / 2h_before.
- Heun and midpoint: second order, two forwards a step (Heun's last step is Euler's, so one fewer).

The rows of a sampler are kept in --out, so a killed run goes on behind the last one.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pandas as pd
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clear.bench.answers import development
from clear.bench.models import MODELS, under_test
from clear.bench.predictions import KEY
from clear.config import load
from clear.model import flow
from clear.model.runtime import apply_runtime
from clear.schema import Config
from tests.bench.paired import difference, rows_of, shown

COLUMNS = [*KEY, "pair", "correct", "restored", "psnr_restored"]
Integrator = Callable[[flow.Velocity, Tensor, Sequence[float]], Iterator[Tensor]]


def euler(velocity: flow.Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    for t, t_next in itertools.pairwise(times):
        x = flow.euler_step(x, velocity(x, t), t, t_next)
        yield x


def adams_bashforth(velocity: flow.Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    before = None
    for t, t_next in itertools.pairwise(times):
        v, h = velocity(x, t), t - t_next
        x = x - h * (v if before is None else v + (v - before[0]) * (h / (2 * before[1])))
        before = v, h
        yield x


def heun(velocity: flow.Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    for t, t_next in itertools.pairwise(times):
        v = velocity(x, t)
        ahead = flow.euler_step(x, v, t, t_next)
        x = ahead if t_next == 0 else flow.euler_step(x, (v + velocity(ahead, t_next)) / 2, t, t_next)
        yield x


def midpoint(velocity: flow.Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    for t, t_next in itertools.pairwise(times):
        middle = (t + t_next) / 2
        x = flow.euler_step(x, velocity(flow.euler_step(x, velocity(x, t), t, middle), middle), t, t_next)
        yield x


def reuse(threshold: float) -> Integrator:
    def integrate(velocity: flow.Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
        v, before, moved = None, x, 0.0
        for t, t_next in itertools.pairwise(times):
            moved += float((x - before).abs().mean() / before.abs().mean())
            if v is None or moved >= threshold:
                v, moved = velocity(x, t), 0.0
            before, x = x, flow.euler_step(x, v, t, t_next)
            yield x

    return integrate


@dataclass(frozen=True)
class Sampler:
    """A row of the table; shift None: the profile's."""

    name: str
    integrate: Integrator
    steps: int
    shift: float | None = None


SAMPLERS = [
    *(Sampler(f"Euler, {n}", euler, n) for n in (1, 2, 3, 4, 5, 6, 16, 32)),
    *(Sampler(f"Euler, 4, shift {s}", euler, 4, s) for s in (0.5, 2.0, 3.0)),
    *(Sampler(f"Adams–Bashforth, {n}", adams_bashforth, n) for n in (2, 3, 4)),
    *(Sampler(f"Heun, {n}", heun, n) for n in (2, 3)),
    *(Sampler(f"midpoint, {n}", midpoint, n) for n in (1, 2)),
    *(Sampler(f"8 steps, reuse below {t}", reuse(t), 8) for t in (0.05, 0.1, 0.2)),
]


def measured(sampler: Sampler, arguments: argparse.Namespace, config: Config, samples: list) -> pd.DataFrame:
    """What the model answers with this sampler; `attrs` has the forwards of a restoration, where it restored."""
    s = config.sampling
    own = replace(s, flow_steps=sampler.steps, shift=s.shift if sampler.shift is None else sampler.shift)
    tested = under_test(arguments.model, replace(config, sampling=own))
    tested = replace(tested, restore=arguments.restore or tested.restore)
    count = 0

    def sample(velocity: flow.Velocity, x: Tensor, times: Sequence[float], step: flow.Step) -> Iterator[tuple]:
        def counted(x: Tensor, t: float) -> Tensor:
            nonlocal count
            count += len(x)
            return velocity(x, t)

        return ((state, None) for state in sampler.integrate(counted, x, times))

    name = f"{arguments.model} {tested.restore} {sampler.name}"
    file = arguments.out / f"{name.replace(' ', '_').replace(',', '')}.json"
    with mock.patch.object(flow, "sample", sample):
        frame = rows_of(name, tested, samples, file, COLUMNS)
    counted = file.with_suffix(".forwards")
    if count:
        counted.write_text(str(count / max(1, int(frame["restored"].sum()))))
    frame.attrs["forwards"] = float(counted.read_text())
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="grpo", choices=[*MODELS])
    parser.add_argument("--restore", choices=("auto", "always"), help="default: as the model is evaluated")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of rows; default all")
    parser.add_argument("--out", type=Path, default=Path(".clear/samplers"))
    arguments = parser.parse_args()
    config = load()
    apply_runtime(config)
    samples = [sample for sample in development() if sample.severity != "clean"]
    plain = Sampler(f"Euler, {config.sampling.flow_steps}", euler, config.sampling.flow_steps)
    wanted = [one for one in SAMPLERS if not arguments.only or one.name in arguments.only]
    done = {plain.name: measured(plain, arguments, config, samples)}
    for sampler in wanted:
        done[sampler.name] = measured(sampler, arguments, config, samples)
    against = done[plain.name]
    print(f"{arguments.model}, {len(against):,} questions, paired with {plain.name}; points and dB [95 % interval]\n")
    print("| sampler | forwards | accuracy | difference | against Euler with as many | PSNR | difference |")
    print("|---|---|---|---|---|---|---|")
    for name, frame in done.items():
        forwards, psnr = frame.attrs["forwards"], frame["psnr_restored"]
        equal = done.get(f"Euler, {forwards:.0f}")
        twin = "" if equal is None or equal is frame else shown(difference(frame, equal, "correct", config))
        both = frame["restored"] & against["restored"]
        change = difference(frame[both].reset_index(), against[both].reset_index(), "psnr_restored", config)
        cells = [name, f"{forwards:.1f}", f"{100 * frame['correct'].mean():.2f} %"]
        cells += [shown(difference(frame, against, "correct", config)), twin, f"{psnr.mean():.2f}", shown(change, 1)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
