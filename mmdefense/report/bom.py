"""The record of a purification as a bill of materials of the purified model (CycloneDX ML-BOM)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdefense.checkpoints.outputs import BOM, BOM_MARK, CARD, PAGE, RECORD, check_replaceable_file
from mmdefense.checkpoints.runs import write_atomically
from mmdefense.errors import BadInputError, one_line
from mmdefense.libraries import needed
from mmdefense.report.compare import purification_record
from mmdefense.report.evaluation import Evaluation, Proportion
from mmdefense.report.record import PurificationRecord
from mmdefense.report.statement import materials, subjects
from mmdefense.report.verdict import limits, verdict

if TYPE_CHECKING:
    from cyclonedx.model import ExternalReference, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

__all__ = ["bom_of", "write_bom"]


def write_bom(out: Path, path: Path | None = None) -> Path:
    """Write the bill of materials of an output.

    Args:
        out: The folder that a purification made.
        path: Where to write it; by default into that folder.

    Returns:
        Where it was written.

    Raises:
        BadInputError: If there is no record, or it would take the place of another file.
        UnsupportedError: If the library for it is not installed.
    """
    target = out / BOM if path is None else path
    check_replaceable_file(target, BOM_MARK)
    text = bom_of(out)
    write_atomically(target, lambda file: file.write(text.encode()))
    return target


def bom_of(out: Path) -> str:
    """Return the bill of materials of an output as CycloneDX 1.6 JSON, checked by the schema.

    The same record gives the same text.

    Args:
        out: The folder that a purification made.

    Raises:
        BadInputError: If there is no record, or it does not fit the schema.
        UnsupportedError: If the library for it is not installed.

    References:
        OWASP. *CycloneDX Specification 1.6* (ECMA-424). 2024.
    """
    record = purification_record(out)
    with needed("a CycloneDX bill of materials", "cyclonedx-python-lib"):
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        try:
            held = json.loads(JsonV1Dot6(_bom(record, out)).output_as_string())
        except ValueError as error:
            raise _unfit(out, error) from error
        # The library has no classes for model cards, but its schema does.
        held["metadata"]["component"]["modelCard"] = _model_card(record)
        metadata = {"tools": held["metadata"].pop("tools"), **held.pop("metadata")}  # the mark
        head = {name: held.pop(name) for name in ("bomFormat", "specVersion")}
        text = json.dumps({**head, "metadata": metadata, **held}, indent=2) + "\n"
        fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if fault is not None:
        raise _unfit(out, fault.data)
    return text


def _unfit(out: Path, error: Exception) -> BadInputError:
    return BadInputError(
        f"record {out / RECORD} does not fit the schema of CycloneDX: {one_line(error)}"
    )


def _bom(record: PurificationRecord, out: Path) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.model.tool import ToolRepository

    versions = record.provenance.versions
    tool = Component(
        name="mmdefense",
        type=ComponentType.APPLICATION,
        version=versions.get("mmdefense"),
        bom_ref="mmdefense",
    )
    given = Component(
        name=record.model.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="given",
        components=_files("given", materials(out)),
    )
    how = f"{given.name} was purified by {record.defense.name}. {verdict(record).headline}"
    purified = Component(
        name=out.absolute().name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="purified",
        components=_files("purified", subjects(out)),
        pedigree=Pedigree(ancestors=[given], notes=how),
        external_references=_references(),
        properties=_properties(record),
    )
    created = record.provenance.created
    return Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, (out / RECORD).read_text(encoding="utf-8")),
        metadata=BomMetaData(
            timestamp=datetime.fromisoformat(created) if created else None,
            tools=ToolRepository(components=[tool]),
            component=purified,
        ),
    )


def _files(whose: str, hashes: Mapping[str, str]) -> list[Component]:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"{whose}/{name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        )
        for name, digest in hashes.items()
    ]


def _references() -> list[ExternalReference]:
    """Return the evidence beside the model, by names in its folder."""
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

    kinds = {
        RECORD: ExternalReferenceType.ATTESTATION,
        CARD: ExternalReferenceType.MODEL_CARD,
        PAGE: ExternalReferenceType.EVIDENCE,
    }
    return [ExternalReference(type=kind, url=XsUri(name)) for name, kind in kinds.items()]


def _properties(record: PurificationRecord) -> list[Property]:
    from cyclonedx.model import Property

    settings = {f"setting:{name}": value for name, value in record.defense.settings.items()}
    told = {
        "defense": record.defense.name,
        "reference": record.defense.reference,
        **settings,
        "seed": record.provenance.seed,
        "utility-bound": record.guard.undecided or record.guard.verdict,
        "unchanged": record.unchanged,
        "accepted-findings": record.accepted_findings,
        "scan-of-the-given-model": record.scan.verdict.text if record.scan else "",
        **{f"version:{name}": value for name, value in record.provenance.versions.items()},
    }
    return [
        Property(name=f"mmdefense:{name}", value=_text(value))
        for name, value in told.items()
        if value != ""
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _model_card(record: PurificationRecord) -> dict[str, Any]:
    data = record.data
    clean = f"{data.samples} clean samples, given for the purification"
    held = [{"name": "fingerprint", "value": data.fingerprint}]
    return {
        "modelParameters": {
            "task": record.task,
            "modelArchitecture": record.model.architecture,
            "datasets": [
                {
                    "type": "dataset",
                    "name": data.name,
                    "description": clean,
                    "contents": {"properties": held},
                }
            ],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(record))},
        "considerations": {"technicalLimitations": limits(record)},
    }


def _metrics(record: PurificationRecord) -> Iterator[dict[str, Any]]:
    guard = record.guard
    held = f"held-out clean samples, n = {guard.samples}"
    yield _metric(guard.metric, guard.before, f"{held}, given model")
    yield _metric(guard.metric, guard.after, held)
    interval = (guard.drop_low, guard.drop_high)
    yield _metric(f"drop of {guard.metric}", guard.drop, held, interval)
    for one in record.evaluations:
        yield from _evaluated(one)


def _evaluated(one: Evaluation) -> Iterator[dict[str, Any]]:
    roles = ", ".join(role for role in one.recorded_as if role != "purified model")
    data = ", ".join(filter(None, (one.data.name, one.data.split, roles)))
    yield _metric(one.metric, one.value, data)
    for name, rate in (("ASR", one.asr), ("RA", one.ra)):
        if isinstance(rate, Proportion):
            yield _metric(name, rate.value, f"{data}, {one.attack}", (rate.low, rate.high))


def _metric(
    name: str, value: float, slice_: str, interval: tuple[float, float] | None = None
) -> dict[str, Any]:
    told: dict[str, Any] = {"type": name, "value": f"{value:.6g}", "slice": slice_}
    if interval is not None:
        low, high = interval
        told["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
    return told
