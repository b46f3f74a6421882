"""Documents of validations: comparisons with other providers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fks_backfill_dagster.documents.common import Document, names
from fks_backfill_dagster.domain.timeframe import iso

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.patterns import Classification
    from fks_backfill_dagster.pipeline.validate import Validation
    from fks_backfill_dagster.pipeline.validation_report import (
        SourceTally,
        ValidationEstimate,
        ValidationReport,
    )


def validation(report: ValidationReport) -> Document:
    """`difference_pct` is a fraction of the other price, as `validation.tolerance_pct` is; `compared` counts candles
    at the timeframe `compared_at`."""
    patterns = report.classified()
    return {
        "valid": report.valid,
        "reason": report.reason,
        "compared": report.compared,
        "total_records": report.stored,
        "discrepancy_count": report.discrepancies,
        "discrepancies": [
            {
                "timestamp": iso(one.ts),
                "field": one.field,
                "stored": one.stored,
                "validation": one.other,
                "difference_pct": one.difference,
                "provider": name,
            }
            for name, one in report.worst
        ],
        "compared_at": report.compared_series.timeframe.value,
        "providers": list(report.providers),
        **names(report.series),
        "start": iso(report.window.start),
        "end": iso(report.window.end),
        "tolerance": report.tolerance,
        "classification": {name: _classification(one) for name, one in patterns.items()},
        "odd_one_out": report.odd_one_out,
        "sample": {
            "complete": report.complete,
            "ranges": report.ranges,
            "candles": report.sampled,
            "unverified": report.unverified,
            "incomplete": report.incomplete,
        },
        "sources": {name: _validation_source(one) for name, one in report.sources.items()},
        "errors": list(report.errors),
        "warnings": list(report.warnings),
    }


def _classification(found: Classification) -> Document:
    return {
        "pattern": found.pattern.value,
        "factor": found.factor,
        "bars": found.bars,
        "hours": found.hours,
        "text": str(found),
    }


def _validation_source(found: SourceTally) -> Document:
    from fks_backfill_dagster.domain.candles import FIELDS  # imports numpy

    return {
        "compared": found.compared,
        "differing": found.differing,
        "discrepancies": found.discrepancies,
        "not_comparable": {why.value: count for why, count in found.not_comparable.items()},
        "requests": found.requests,
        "fields": {
            name: {"max": found.spread.largest_of(name), "p99": found.spread.quantile(name, 0.99)}
            for name in FIELDS
        },
        "errors": list(found.errors),
    }


def validation_plan(found: Validation, estimates: Mapping[str, ValidationEstimate]) -> Document:
    """The plan of a validation that is not carried out. `reason`: why nothing can be compared."""
    return names(found.series) | {
        "start": iso(found.window.start),
        "end": iso(found.window.end),
        "total_records": found.stored,
        "compared_at": found.validators.series.timeframe.value,
        "sample": {"complete": found.complete, "ranges": len(found.sample)},
        "providers": {
            name: {"requests": one.requests, "candles": one.candles, "seconds": round(one.seconds, 3)}
            for name, one in estimates.items()
        },
        "reason": found.obstacle,
        "warnings": list(found.warnings),
    }
