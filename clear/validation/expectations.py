"""What a dataset must satisfy, checked by Great Expectations: the only module that imports it.

A `Check` is one rule on one column of a validation frame; clear/validation/suites.py has those for samples,
clear/traces/checks.py those for demonstrations. Great Expectations gives the verdict and the Data Docs;
the rows that break a rule are read from the frame itself, as its own listing stops at twenty values. One validation
per dataset, SUMMARY results: more detail costs minutes and hangs the Data Docs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

SHOWN = 20
"""Rows listed per failed check."""


@dataclass(frozen=True)
class Check:
    """One rule: values in `allowed`, or in [low, high] (above `low` if `strict`), or without repetition if neither.

    Missing values pass; `decodable` names those rows. With `whole`, the value describes the dataset, not the row.
    """

    name: str
    column: str
    means: str
    allowed: tuple = ()
    low: float | None = None
    high: float | None = None
    strict: bool = False
    whole: bool = False

    def failing(self, frame: pd.DataFrame) -> pd.Series:
        """Boolean mask of the rows that break the rule."""
        values = frame[self.column]
        if self.allowed:
            wrong = ~values.isin(self.allowed)
        elif self.low is None and self.high is None:
            wrong = values.duplicated(keep=False)
        else:
            wrong = values.gt(float("inf") if self.high is None else self.high)
            if self.low is not None:
                wrong |= values.le(self.low) if self.strict else values.lt(self.low)
        return wrong & values.notna()


@dataclass(frozen=True)
class Failure:
    """A check that failed on a dataset; `keys` are the first rows that broke it, `count` is how many did."""

    check: Check
    count: int
    keys: tuple[str, ...]


def run_checks(
    frames: Mapping[str, pd.DataFrame], checks: Mapping[str, list[Check]], docs: Path
) -> dict[str, list[Failure]]:
    """Validate every frame with its checks, write Data Docs (HTML) to `docs` and return the failures per dataset."""
    # Read when the library is first imported: nothing is reported to its makers.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("samples")
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
    }
    context.add_data_docs_site("data_docs", site)
    failures = {}
    for name, frame in frames.items():
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=[_expectation(c) for c in checks[name]]))
        definition = gx.ValidationDefinition(name=name, data=batch, suite=suite)
        checkpoint = gx.Checkpoint(
            name=name,
            validation_definitions=[context.validation_definitions.add(definition)],
            result_format={"result_format": "SUMMARY", "unexpected_index_column_names": ["key"]},
        )
        columns = sorted({"key", *(check.column for check in checks[name])})
        shown = frame[columns].apply(lambda values: values if is_numeric_dtype(values) else values.map(_as_html))
        result = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": shown})
        (validation,) = result.run_results.values()
        failures[name] = _failures(validation, checks[name], frame)
    context.build_data_docs(site_names=["data_docs"])
    (docs / "index.html").write_text(_front_page(docs, frames, checks, failures))
    return failures


def _as_html(value: Any) -> Any:
    """A value as the library may put it into a page, where it writes text as it finds it; unequal ones stay unequal."""
    return escape(value) if isinstance(value, str) else value


def _front_page(
    docs: Path,
    frames: Mapping[str, pd.DataFrame],
    checks: Mapping[str, list[Check]],
    failures: Mapping[str, list[Failure]],
) -> str:
    """The list of datasets in HTML, in place of the library's own, which is empty without a network."""
    rows = []
    for name, frame in frames.items():
        newest = max((docs / "validations" / name).rglob("*.html"), key=lambda file: file.parent.name)
        failed = ", ".join(f"{one.check.name} ({one.count:,})" for one in failures[name])
        cells = (
            f'<a href="{newest.relative_to(docs).as_posix()}">{escape(name)}</a>',
            f"{len(frame):,}",
            str(len(checks[name])),
            f"✗ {escape(failed)}" if failed else "✓ every one holds",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("dataset", "rows", "expectations", "what fails (rows)"))
    style = "body{font:16px sans-serif;margin:2rem}td,th{padding:.3rem 1.2rem .3rem 0;text-align:left}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Data Docs</title>'
        f"<style>{style}</style></head>\n<body><h1>Data Docs</h1>\n<table><tr>{head}</tr>\n"
        + "\n".join(rows)
        + "\n</table></body></html>\n"
    )


def listed(failures: Mapping[str, list[Failure]], rows: str = "samples") -> str:
    """The failures in words: every dataset and check, at most four, with the first of its rows; "" if there is none."""
    parts = [
        f"{name} fails '{f.check.name}' ({f.check.means}) for {f.count} {rows}: {', '.join(f.keys[:3])}"
        for name, found in failures.items()
        for f in found
    ]
    return "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more" if len(parts) > 4 else "")


def as_json(failures: list[Failure]) -> list[dict]:
    """The failures of a dataset as metrics files list them."""
    return [{"expectation": f.check.name, "count": f.count, "ids": list(f.keys)} for f in failures]


def _expectation(check: Check):
    """The Great Expectations form of a check."""
    from great_expectations import expectations as gxe

    about = {"meta": {"check": check.name}, "notes": check.means}
    if check.allowed:
        return gxe.ExpectColumnValuesToBeInSet(
            column=check.column, value_set=[_as_html(value) for value in check.allowed], **about
        )
    if check.low is None and check.high is None:
        return gxe.ExpectColumnValuesToBeUnique(column=check.column, **about)
    return gxe.ExpectColumnValuesToBeBetween(
        column=check.column, min_value=check.low, max_value=check.high, strict_min=check.strict, **about
    )


def _failures(validation, checks: list[Check], frame: pd.DataFrame) -> list[Failure]:
    by_name = {check.name: check for check in checks}
    found = []
    for result in validation.results:
        name = result.expectation_config.meta["check"]
        if result.exception_info.get("raised_exception"):
            raise RuntimeError(f"Great Expectations could not run '{name}': {result.exception_info}")
        if not result.success:
            rows = frame[by_name[name].failing(frame)]
            found.append(Failure(by_name[name], len(rows), tuple(rows["key"].head(SHOWN))))
    return found
