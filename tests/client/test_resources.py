"""The client's typed views are those of the OpenAPI description."""

from typing import Any

import pytest

from deltadock.api.deltas.schemas import MetricsOut
from deltadock.api.main import app
from deltadock.client import resources
from deltadock.client.resources import Delta, Report, Resource
from deltadock.client.routes import Sampling
from deltadock.openai.fields import AnswerFields
from deltadock.storage.repositories.deltas import FIGURES
from deltadock.storage.repositories.shown import ShownDelta
from deltadock.storage.tables import DeltaRow

SCHEMAS: dict[str, type[Resource]] = {
    "CheckpointOut": resources.Checkpoint,
    "BaseOut": resources.Base,
    "MethodOut": resources.Method,
    "JobError": resources.JobError,
    "JobOut": resources.Job,
    "LogLine": resources.LogLine,
    "BaseRefOut": resources.BaseRef,
    "ArtifactOut": resources.Artifact,
    "MetricsOut": resources.Metrics,
    "GoalOut": resources.Goal,
    "LineageOut": resources.Lineage,
    "DeltaDetail": resources.Delta,
    "AliasOut": resources.Alias,
    "AliasMoveOut": resources.AliasMove,
    "ModelCardOut": resources.Model,
    "Resolved": resources.Resolved,
    "HeldDeltaOut": resources.HeldDelta,
    "NodeOut": resources.Node,
    "NewKeyOut": resources.Key,
    "Limits": resources.Limits,
    "TenantDetailOut": resources.Tenant,
    "deltadock__api__tenants__UsageOut": resources.TenantUsage,
    "PreviewOut": resources.Preview,
    "Readiness": resources.Readiness,
    "Usage": resources.Usage,
    "DeltaAccepted": resources.Accepted,
}


def kinds(schema: dict[str, Any]) -> set[str]:
    """The JSON types that a property may have; of a reference, `object` or those of its enum."""
    options = schema.get("anyOf", [schema])
    return {option.get("type", "reference") for option in options}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_view_has_fields_of_the_description(name: str) -> None:
    described = app.openapi()["components"]["schemas"][name]["properties"]
    view = SCHEMAS[name].model_json_schema(mode="serialization")["properties"]
    assert view.keys() <= described.keys()
    for field, schema in view.items():
        found, wanted = kinds(schema) - {"reference"}, kinds(described[field])
        assert "reference" in wanted or found <= wanted | {"null"}, field


def test_a_deltas_figures_are_the_same_wherever_they_are_listed() -> None:
    assert tuple(resources.Metrics.model_fields) == tuple(MetricsOut.model_fields) == FIGURES
    assert set(FIGURES) <= set(ShownDelta._fields) & set(DeltaRow.__table__.c.keys())


def test_the_clients_sampling_is_what_every_request_takes() -> None:
    assert Sampling.__annotations__.keys() == AnswerFields.model_fields.keys() | {"max_tokens"}


def test_an_unknown_field_of_a_newer_server_is_ignored() -> None:
    usage = resources.Usage.model_validate(
        {"prompt_tokens": 1, "completion_tokens": 2, "reasoning_tokens": 3}
    )
    assert usage.completion_tokens == 2


def test_a_delta_is_a_table_in_a_notebook() -> None:
    example = {
        "id": "dlt_1", "name": "maths/skills", "version": 3, "aliases": ["prod"],
        "default_version": 3, "base": {"id": "b", "name": "<tiny>", "checkpoint": "0"},
        "checkpoint": "1", "method": "optimix", "bits": 1.0, "goal": {"kind": "bits", "value": 1},
        "seed": 0, "solver": "exact", "state": "ready", "percent": 100.0, "job": "job_1",
        "created_by": None, "artifact": {"digest": "d" * 64, "bytes": 416_992},
        "metrics": {"kl": 0.00123, "ratio": 13.3}, "created_at": "2026-11-22T12:00:00Z",
    }  # fmt: skip
    html = Delta.model_validate(example)._repr_html_()
    for text in ("maths/skills:3", "prod", "&lt;tiny&gt;", "417 kB", "0.00123 nats per token"):
        assert text in html
    report = {"method": "low-rank", "true_bits": 1.4961463459, "matrices": [], "other_tensors": [],
              "notes": []}  # fmt: skip
    assert ">1.50<" in Report.model_validate(report)._repr_html_()
