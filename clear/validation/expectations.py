"""What a dataset must satisfy, checked by Great Expectations: the only module that imports it.

A `Check` is one rule on one column of a validation frame. Great Expectations gives the verdict and the Data Docs;
which rows break a rule is read from the frame itself, because its own listing stops at twenty values. One validation
per dataset, SUMMARY results: more detail costs minutes and hangs the Data Docs.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import SEVERITIES
from clear.records import CLEAN, INCOMING

ANSWER_SHARE = 0.7
"""No answer may hold a larger share of the questions of its task."""

LEAST_LIKENESS = 0.15
"""Between a picture and its clean partner: the sixteen corruptions at high leave 0.2 and more, other pictures mostly
less."""

SHOWN = 20
"""Sample ids listed per failed check."""


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
    """A check that failed on a dataset; `keys` are the first samples that broke it, `count` is how many did."""

    check: Check
    count: int
    keys: tuple[str, ...]


def clean_checks(duplicate_limit: int | None = None) -> list[Check]:
    """Rules for clean samples; with `duplicate_limit`, also for images shared with training."""
    return [
        *_common(duplicate_limit),
        Check("labelled_clean", "corruption", "the sample is labelled clean", allowed=(CLEAN,)),
    ]


def degraded_checks(
    copies: int, alpha: float, psnr_slack: float, duplicate_limit: int | None = None, further: tuple[str, ...] = ()
) -> list[Check]:
    """Rules for degraded samples, of which every image has `copies`; `further` are types beyond the sixteen."""
    known = (*CORRUPTIONS, *further)
    return [
        *_common(duplicate_limit),
        Check(
            "corruption_known", "corruption", "the corruption is one of the sixteen or named in params", allowed=known
        ),
        Check("severity_known", "severity", "the severity is low, mid or high", allowed=tuple(SEVERITIES)),
        Check("copies", "copies", f"every image has {copies} degraded copies", allowed=(copies,)),
        Check("as_labelled", "as_labelled", "intensity and seed belong to id, corruption, severity", allowed=(True,)),
        Check("same_size", "same_size", "the degraded image has the size of the clean one", allowed=(True,)),
        Check("changed", "difference", "the degraded image is not the clean one", low=0, strict=True),
        Check("psnr_band", "psnr_outside", "PSNR lies in the band of its cell", low=0, high=psnr_slack),
        Check("mean_psnr_band", "mean_psnr_outside", "mean PSNR of the cell lies in its band", low=0, high=psnr_slack),
        Check("severity_histogram", "severity_p", "severities follow the protocol", low=alpha, whole=True),
        Check("corruption_histogram", "corruption_p", "corruptions follow the protocol", low=alpha, whole=True),
    ]


MONOTONE = Check("monotone", "monotone", "mean PSNR and SSIM of the type fall from low to high", allowed=(True,))
"""Rule for a benchmark with every image at all levels."""


def incoming_checks(duplicate_limit: int) -> list[Check]:
    """Rules for a set of pictures that came degraded, over all its slices."""
    return [
        *_common(duplicate_limit),
        Check("labelled_incoming", "severity", "the severity is incoming", allowed=(INCOMING,)),
        Check("same_size", "same_size", "the degraded image has the size of the clean one", allowed=(True,)),
        Check("changed", "difference", "the degraded image is not the clean one", low=0, strict=True),
        Check("partner", "likeness", "the clean partner shows the same scene", low=LEAST_LIKENESS),
    ]


def _common(duplicate_limit: int | None) -> list[Check]:
    checks = [
        Check("unique", "key", "no copy occurs twice"),
        Check("decodable", "decodable", "both images can be read completely", allowed=(True,)),
        Check("hash", "hash_true", "image_sha256 is the digest of the clean image", allowed=(True,)),
        Check("has_questions", "questions", "the sample has a question", low=1),
        Check("answers_balanced", "answer_share", "no answer dominates its task", high=ANSWER_SHARE),
    ]
    if duplicate_limit is not None:
        text = "no image is shared with a training split"
        checks.append(Check("shared_images", "shared_images", text, low=0, high=duplicate_limit))
    return checks


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
        result = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame[columns]})
        (validation,) = result.run_results.values()
        failures[name] = _failures(validation, checks[name], frame)
    context.build_data_docs(site_names=["data_docs"])
    return failures


def _expectation(check: Check):
    """The Great Expectations form of a check."""
    from great_expectations import expectations as gxe

    about = {"meta": {"check": check.name}, "notes": check.means}
    if check.allowed:
        return gxe.ExpectColumnValuesToBeInSet(column=check.column, value_set=list(check.allowed), **about)
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
