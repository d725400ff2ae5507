"""Models: names on every route, aliases and their history, cards, lineage, deletion."""

import json
from typing import Any

import pytest

from tests.api.support import Api

CARD = "/v1/registry/maths/skills"


@pytest.fixture
def versions(api: Api) -> list[str]:
    """The artifacts of two ready versions of `maths/skills`."""
    return [api.make_ready(api.delta(seed=seed), bytes([seed])) for seed in (1, 2)]


def move(api: Api, alias: str, version: int, **more: Any) -> Any:
    return api.client.put(f"{CARD}/aliases/{alias}", json={"version": version, **more})


def test_names_work_on_every_route_that_takes_an_id(api: Api, versions: list[str]) -> None:
    assert move(api, "prod", 2, reason="evaluated").status_code == 200
    expected = {
        "maths/skills": 1,
        "maths/skills:2": 2,
        "maths/skills@v2": 2,
        "maths/skills@prod": 2,
        "maths%2Fskills%3A1": 1,
    }
    for name, version in expected.items():
        delta = api.client.get(f"/v1/deltas/{name}").json()
        assert delta["version"] == version
        assert delta["default_version"] == 1
        assert delta["aliases"] == (["default"] if version == 1 else ["prod"])
        artifact = api.client.get(f"/v1/deltas/{name}/artifact")
        assert artifact.headers["etag"] == f'"{versions[version - 1]}"'
        assert api.client.get(f"/v1/deltas/{name}/report").json()["kl"] == 0.01
        assert api.client.get(f"/deltas/{name}").status_code == 200
        resolved = api.client.get(f"/v1/resolve/{name}").json()
        assert resolved["name"] == f"maths/skills:{version}"
        assert resolved["digest"] == versions[version - 1]
        assert resolved["base_digest"] == delta["base"]["checkpoint"]
        assert api.client.get(f"/v1/resolve/{resolved['digest']}").json() == resolved
        assert api.client.get(resolved["artifact"]).headers["etag"] == artifact.headers["etag"]
        (job,) = api.client.get("/v1/jobs", params={"delta": delta["id"]}).json()["data"]
        assert job["delta"] == delta["id"]
    for name in (
        "maths/skills@none",
        "maths/skills:3",
        "maths/none",
        "no",
        "maths/skills:0",
        "0" * 64,
    ):
        assert api.client.get(f"/v1/deltas/{name}").json()["code"] == "not_found", name
        assert api.client.get(f"/v1/resolve/{name}").status_code == 404, name


def test_a_name_that_ends_like_a_route_is_a_name(api: Api) -> None:
    api.make_ready(api.delta(name="finance/report"))
    assert api.client.get("/v1/deltas/finance/report").json()["name"] == "finance/report"
    assert api.client.get("/v1/deltas/finance/report/report").json()["ratio"] == 12.5


def test_a_bare_name_without_a_ready_version_says_which_it_waits_for(api: Api) -> None:
    delta = api.delta()
    assert (delta["default_version"], delta["aliases"]) == (None, [])
    answer = api.client.get("/v1/deltas/maths/skills")
    assert (answer.status_code, answer.json()["job"]) == (409, delta["job"])


def test_moves_are_recorded_and_checked(api: Api, versions: list[str]) -> None:
    assert move(api, "default", 2, reason="better").status_code == 200
    stale = move(api, "default", 1, expected=1)
    assert (stale.status_code, stale.json()["version"]) == (409, 2)
    assert move(api, "prod", 1, expected=0).status_code == 200
    assert move(api, "v7", 1).status_code == 422
    assert move(api, "prod", 9).status_code == 404
    assert move(api, "prod", api.delta(seed=3)["version"]).json()["code"] == "not_ready"
    assert api.client.delete(f"{CARD}/aliases/default").status_code == 409
    assert api.client.delete(f"{CARD}/aliases/prod").status_code == 204
    assert api.client.delete(f"{CARD}/aliases/prod").status_code == 404
    first = api.client.get(f"{CARD}/history", params={"limit": 3}).json()
    rest = api.client.get(f"{CARD}/history", params={"after": first["next"]}).json()
    moves = [
        (m["alias"], m["from_version"], m["to_version"], m["reason"])
        for m in first["data"] + rest["data"]
    ]
    assert moves == [
        ("prod", 1, None, "Removed."),
        ("prod", None, 1, ""),
        ("default", 1, 2, "better"),
        ("default", None, 1, "The first ready version."),
    ]
    key = first["data"][0]["moved_by"]
    assert key.startswith("key_")
    assert rest["data"][0]["moved_by"] is None
    assert first["data"][0]["moved_by_name"] == "tests"
    assert rest["data"][0]["moved_by_name"] is None


def detail(api: Api, path: str) -> str:
    """What is said of a path that names nothing."""
    answer = api.client.get(f"/v1/{path}")
    assert answer.status_code == 404
    said: str = answer.json()["detail"]
    return said


def test_cards_tags_and_rules(api: Api, versions: list[str]) -> None:
    rule = {"max_kl": 0.05, "max_increase": 0.0}
    change = {"description": "# Skills\nDoes *sums*.", "tags": ["maths", "maths"], "rule": rule}
    card = api.client.patch(CARD, json=change).json()
    assert (card["tags"], card["rule"], card["last_version"]) == (["maths"], rule, 2)
    # Of equal KL, the rule prefers the newer version.
    assert [(a["alias"], a["version"]) for a in card["aliases"]] == [("default", 2)]
    assert (
        api.client.patch(CARD, json={"tags": ["other"]}).json()["description"]
        == "# Skills\nDoes *sums*."
    )
    assert api.client.patch(CARD, json={"tags": ["No Tag"]}).status_code == 422
    for query in ("tag=other", "text=sum", "text=skill"):
        found = api.client.get(f"/v1/registry?{query}").json()["data"]
        assert [model["name"] for model in found] == ["maths/skills"], query
        assert len(api.client.get(f"/v1/deltas?{query}").json()["data"]) == 2, query
    assert api.client.get("/v1/registry?tag=maths").json()["data"] == []
    assert api.client.patch(CARD, json={"rule": None}).json()["rule"] is None


def test_a_version_that_an_alias_means_is_not_deleted(api: Api, versions: list[str]) -> None:
    refused = api.client.delete("/v1/deltas/maths/skills")
    assert (refused.status_code, refused.json()["aliases"]) == (409, ["default"])
    assert api.client.delete("/v1/deltas/maths/skills:2").status_code == 204
    gone = "maths/skills:2 was deleted; POST /v1/deltas/maths/skills:2/restore brings it back."
    assert detail(api, "deltas/maths/skills:2") == gone
    assert detail(api, "deltas/maths/skills:9") == "maths/skills has no version 9; its newest is 1."
    assert detail(api, "deltas/maths/skills@nope") == (
        "maths/skills has no alias @nope. It has: @default."
    )
    assert api.client.delete("/v1/deltas/maths/skills").status_code == 204
    assert "skills:1 was deleted" in detail(api, "deltas/maths/skills")
    restored = api.client.post("/v1/deltas/maths/skills:2/restore").json()
    assert (restored["version"], restored["default_version"]) == (2, 2)


def test_a_deleted_models_name_is_its_own_if_it_is_restored(api: Api, versions: list[str]) -> None:
    described = {"description": "# Sums", "tags": ["maths"]}
    api.client.patch(CARD, json=described)
    assert api.client.delete(CARD).status_code == 204
    for path in ("deltas/maths/skills:1", "registry/maths/skills"):
        assert "was deleted; POST /v1/deltas/maths/skills" in detail(api, path)
    assert api.client.get("/v1/models/maths/skills").status_code == 404
    again = api.client.post("/v1/deltas", json=api.delta_body(seed=4))
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    assert api.client.post("/v1/deltas/maths/skills@prod/restore").status_code == 404
    restored = api.client.post("/v1/deltas/maths/skills/restore").json()
    assert (restored["version"], restored["default_version"]) == (2, 2), "the newest one"
    card = api.client.get(CARD).json()
    assert {name: card[name] for name in described} == described
    assert [model["name"] for model in api.client.get("/v1/registry?text=sum").json()["data"]]
    assert api.client.post("/v1/deltas/maths/skills/restore").json()["version"] == 1
    assert api.client.post("/v1/deltas/maths/skills/restore").status_code == 404


def test_lineage(api: Api) -> None:
    parent = api.delta()
    api.make_ready(parent)
    recipe = {"learning_rate": 1e-4, "data": ["a", "b"]}
    more = {"parent": "maths/skills", "recipe": recipe, "commit": "0a1b2c3"}
    delta = api.delta(seed=2, **more)
    lineage = api.client.get(f"/v1/deltas/{delta['id']}").json()["lineage"]
    assert lineage["parent"] == parent["id"]
    assert lineage["recipe"] == recipe
    assert lineage["commit"] == "0a1b2c3"
    assert lineage["base"] == delta["base"]["checkpoint"]
    assert lineage["calibration"] == [delta["calibration"]["sources"][0]["digest"]]
    assert lineage["deltadock"]
    body = api.delta_body(seed=3, parent="no/such")
    assert api.client.post("/v1/deltas", json=body).status_code == 404


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"x": "y" * 20_000}, "at most 16384 are stored"),
        ({"x": "\ud800"}, "half surrogate pairs"),
        ({"\ud800": 1}, "half surrogate pairs"),
        ({"x": json.loads("[" * 128 + "]" * 128)}, "nested more than 128 levels deep"),
    ],
)
def test_a_recipe_is_small_plain_json(api: Api, recipe: dict[str, Any], message: str) -> None:
    body = json.dumps(api.delta_body(recipe=recipe))  # httpx would not send half a pair
    headers = {"Content-Type": "application/json"}
    answer = api.client.post("/v1/deltas", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
    assert message in answer.json()["detail"]


def test_a_recipe_may_be_nested_as_deep_as_that(api: Api) -> None:
    recipe = {"x": json.loads("[" * 127 + "]" * 127)}
    delta = api.delta(recipe=recipe)
    assert api.client.get(f"/v1/deltas/{delta['id']}").json()["lineage"]["recipe"] == recipe
