"""The api's metrics: bounded labels, error codes, and what database and blob store hold."""

from prometheus_client.parser import text_string_to_metric_families

from deltadock.storage.tables import Scope
from tests.api.support import Api, bearer, issue_key

Samples = dict[tuple[str, ...], float]


def scrape(api: Api) -> Samples:
    """Samples by name and label values, labels in alphabetical order."""
    answer = api.client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_requests_refusals_and_contents(api: Api) -> None:
    delta = api.delta(priority="high")
    api.open_upload()
    for name in ("a", "b"):
        assert api.client.get(f"/v1/deltas/{name}").status_code == 404
        assert api.client.get(f"/nothing/{name}").status_code == 404
    assert api.client.request("PROPFIND", "/").status_code == 405
    assert api.client.get("/v1/models/nothing").status_code == 404
    assert api.client.get("/v1/jobs", headers=bearer("no key")).status_code == 401
    assert api.client.get(f"/v1/deltas/{delta['id']}/artifact").status_code == 409
    found = scrape(api)
    requests = "deltadock_api_requests_total"
    assert found[requests, "GET", "/v1/deltas/{delta_id}", "404"] == 2
    assert found[requests, "GET", "other", "404"] == 2
    assert found[requests, "other", "other", "405"] == 1
    assert found[requests, "GET", "/v1/jobs", "401"] == 1
    refusals = "deltadock_api_refusals_total"
    assert {code: found[refusals, code] for code in ("unauthorized", "not_ready")} == {
        "unauthorized": 1,
        "not_ready": 1,
    }
    assert found["deltadock_jobs", "queued"] == 1
    assert found["deltadock_jobs", "ready"] == 0
    assert found["deltadock_queue_depth", "high"] == 1
    assert found["deltadock_uploads", "open"] == 1
    assert found["deltadock_storage_bytes", "checkpoints"] > 0


def test_metrics_need_an_admin_of_the_operator(api: Api) -> None:
    key = issue_key(api.resources.settings, scopes=[Scope.READ])
    assert api.client.get("/metrics", headers=bearer(key)).status_code == 403
    assert api.client.get("/metrics", headers={"Authorization": ""}).status_code == 401
