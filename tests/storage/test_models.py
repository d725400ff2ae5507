"""What names mean, over pushes, moves and deletions, on both databases."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import select
from sqlalchemy.orm import Session

from deltadock.errors import Cancelled, Conflict
from deltadock.storage.database import Database
from deltadock.storage.repositories import (
    DeltaRepository,
    JobRepository,
    ModelRepository,
    TotalsRepository,
)
from deltadock.storage.repositories.listing import DeltaFilter
from deltadock.storage.tables import AliasMoveRow, DeltaRow, JobState
from deltadock.storage.tenancy import LOCAL_TENANT
from tests import seed

NAME = "p/m"


def push(session: Session, name: str = NAME) -> DeltaRow:
    return seed.add_delta(session, seed.add_base(session, "base", 100), name, 1.0)


def finish(session: Session, delta: DeltaRow, kl: float | None, *, is_far: bool = False) -> None:
    jobs, job_id = JobRepository(session, LOCAL_TENANT), delta.job.id
    assert jobs.acquire(job_id, "worker", 60)
    DeltaRepository(session, LOCAL_TENANT).set_result(
        delta, artifact_digest=seed.digest_of(delta.id), artifact_bytes=10,
        report={"kl": kl, "is_far": is_far},
    )  # fmt: skip
    assert jobs.finish(job_id, "worker", JobState.READY)


def meaning(session: Session, reference: str = NAME) -> int | None:
    delta = DeltaRepository(session, LOCAL_TENANT).resolve(reference)
    return None if delta is None else delta.version


def test_a_poorer_push_does_not_change_what_the_name_means(database: Database) -> None:
    with database.session_scope() as session:
        finish(session, push(session), 0.01)
        finish(session, push(session), 5.0)
        assert meaning(session) == 1
        assert [meaning(session, f"{NAME}{suffix}") for suffix in (":2", "@v2", "@default")] == [
            2, 2, 1,
        ]  # fmt: skip
        assert meaning(session, f"{NAME}@prod") is meaning(session, "p/none") is None


def test_the_names_before_and_after_a_name(database: Database) -> None:
    with database.session_scope() as session:
        models = ModelRepository(session, LOCAL_TENANT)
        for name in ("a/a", "a/c", "b/a", "c/a"):
            models.open(name)
        session.flush()
        assert models.names_near("a/b", limit=1) == ["a/a", "a/c"]
        assert models.names_near("b/a", limit=2) == ["a/c", "a/a", "b/a", "c/a"]


def test_the_best_of_what_was_pushed_at_once_becomes_the_default(database: Database) -> None:
    """Whichever is ready first; a later push, or one without a figure, of another fine-tune or
    measured on another text, changes nothing.
    """
    with database.session_scope() as session:
        poor, good, unmeasured, other, foreign, fair = (push(session) for _ in range(6))
        other.checkpoint_digest = seed.add_base(session, "other", 100).checkpoint_digest
        foreign.options = {**foreign.options, "calibration": {"sources": [], "tokens": 1}}
        meant = []
        for delta, kl in (
            (poor, 0.3), (good, 0.01), (unmeasured, None), (other, 0.0), (foreign, 0.0)
        ):  # fmt: skip
            finish(session, delta, kl)
            meant.append(meaning(session))
        finish(session, push(session), 0.001)
        assert [*meant, meaning(session)] == [1, 2, 2, 2, 2, 2]
        models = ModelRepository(session, LOCAL_TENANT)
        model = models.find(NAME, lock=True)
        assert model is not None
        assert models.history(model, limit=1)[0].reason == (
            "Pushed before version 1 was ready, and closer to its fine-tune: "
            "KL 0.01 instead of 0.3."
        )
        assert not models.move(model, "default", good, reason="Evaluated.", moved_by="key")
        finish(session, fair, 0.002)
        assert meaning(session) == 2, "a person has decided"


def test_a_default_far_from_its_fine_tune_gives_way_to_a_later_version(database: Database) -> None:
    """On whatever text it is measured, but of the same fine-tune; unless a person chose it."""
    with database.session_scope() as session:
        finish(session, push(session), 3.0, is_far=True)
        finish(session, push(session), 2.0, is_far=True)
        foreign = push(session)
        foreign.checkpoint_digest = seed.add_base(session, "other", 100).checkpoint_digest
        finish(session, foreign, 0.01)
        assert meaning(session) == 1
        other_text = push(session)
        other_text.options = {**other_text.options, "calibration": {"sources": [], "tokens": 1}}
        finish(session, other_text, 0.01)
        assert meaning(session) == 4
        models = ModelRepository(session, LOCAL_TENANT)
        model = models.find(NAME, lock=True)
        assert model is not None
        assert models.history(model, limit=1)[0].reason == (
            "Version 1 is far from its fine-tune, with a KL of 3; this one has 0.01."
        )
        finish(session, push(session), 0.001)
        assert meaning(session) == 4, "which is not far"
        first = DeltaRepository(session, LOCAL_TENANT).resolve(f"{NAME}:1")
        models.move(model, "default", first, reason="Evaluated.", moved_by="key")
        finish(session, push(session), 0.001)
        assert meaning(session) == 1, "a person has decided"


@pytest.mark.parametrize(
    ("kls", "expected"),
    [
        ([0.01, 0.011], 2),  # within the rule's increase
        ([0.01, 0.02], 1),  # worse by more
        ([0.01, None], 1),  # not measured
        ([0.2, 0.04], 2),  # the first one does not meet the rule
        ([0.2, 0.3], None),
    ],
)
def test_a_rule_moves_the_default(
    database: Database, kls: list[float | None], expected: int | None
) -> None:
    with database.session_scope() as session:
        models = ModelRepository(session, LOCAL_TENANT)
        deltas = [push(session) for _ in kls]
        model = models.find(NAME, lock=True)
        assert model is not None
        models.set_rule(model, {"max_kl": 0.05, "max_increase": 0.002})
        for delta, kl in zip(deltas, kls, strict=True):
            finish(session, delta, kl)
        assert meaning(session) == expected


def test_a_rule_set_later_is_applied_at_once(database: Database) -> None:
    with database.session_scope() as session:
        for kl in (0.03, 0.01, 0.5):
            finish(session, push(session), kl)
        models = ModelRepository(session, LOCAL_TENANT)
        model = models.find(NAME, lock=True)
        assert model is not None
        models.set_rule(model, {"max_kl": 0.05, "max_increase": 0.0})
        assert meaning(session) == 2
        reasons = [move.reason for move in models.history(model, limit=9)]
    assert reasons == ["The rule: KL 0.01 is at most 0.03.", "The first ready version."]


def test_a_version_deleted_while_it_is_compressed_never_becomes_the_default(
    database: Database,
) -> None:
    with database.session_scope() as session:
        delta = push(session)
        DeltaRepository(session, LOCAL_TENANT).delete(delta)
    with database.session_scope() as session:
        stale = session.get_one(DeltaRow, delta.id)
        with pytest.raises(Cancelled):
            DeltaRepository(session, LOCAL_TENANT).set_result(
                stale, artifact_digest="a" * 64, artifact_bytes=1, report={}
            )
        assert meaning(session) is None
        assert TotalsRepository(session, LOCAL_TENANT).read().deltas == 0


def test_concurrent_moves_leave_a_gapless_history(database: Database) -> None:
    with database.session_scope() as session:
        ids = []
        for _ in range(3):
            delta = push(session)
            finish(session, delta, 0.1)
            ids.append(delta.id)

    def move(number: int) -> None:
        with database.session_scope() as session:
            models = ModelRepository(session, LOCAL_TENANT)
            model = models.find(NAME, lock=True)
            assert model is not None
            delta = DeltaRepository(session, LOCAL_TENANT).find(ids[number % 3])
            models.move(model, "prod", delta, reason=str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(move, range(16)))
    with database.read_scope() as session:
        moves = session.scalars(
            select(AliasMoveRow).where(AliasMoveRow.alias == "prod").order_by(AliasMoveRow.id)
        ).all()
        versions = [None, *(move.to_version for move in moves)]
        assert [move.from_version for move in moves] == versions[:-1]
        assert meaning(session, f"{NAME}@prod") == versions[-1]


def test_models_are_found_by_tags_and_beginnings_of_words(database: Database) -> None:
    with database.session_scope() as session:
        models = ModelRepository(session, LOCAL_TENANT)
        for name in ("maths/skills", "maths/proofs", "code/review"):
            finish(session, push(session, name), 0.1)
        model = models.find("maths/skills", lock=True)
        assert model is not None
        models.describe(model, "Rechnet *schriftlich*.", ["german", "school"])
        found = {
            query: [model.name for model in models.page(limit=9, **arguments)]
            for query, arguments in {
                "tag": {"tag": "german"},
                "text": {"text": "MATH pro"},
                "card": {"text": "schrift"},
                "both": {"text": "maths", "tag": "school"},
                "none": {"text": "maths code"},
            }.items()
        }
        assert found == {
            "tag": ["maths/skills"],
            "text": ["maths/proofs"],
            "card": ["maths/skills"],
            "both": ["maths/skills"],
            "none": [],
        }
        deltas = DeltaRepository(session, LOCAL_TENANT)
        for wanted in (DeltaFilter(tag="german"), DeltaFilter(text="schrift", name="maths/skills")):
            assert [d.name for d in deltas.page(limit=9, wanted=wanted)] == ["maths/skills"]
        assert [d.name for d in models.answering(limit=2, after="code/review")] == [
            "maths/proofs",
            "maths/skills",
        ]


class Names(RuleBasedStateMachine):
    """Pushes, moves and deletions of one name against a model of what it means."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.name = f"p/{id(self)}"
        self.session = Session(self.database.engine, expire_on_commit=False)
        self.deltas = DeltaRepository(self.session, LOCAL_TENANT)
        self.models = ModelRepository(self.session, LOCAL_TENANT)
        self.pushed = 0
        self.ready: dict[int, float] = {}
        self.running: set[int] = set()
        self.aliases: dict[str, int] = {}
        self.last_contender: int | None = None
        self.deleted: dict[int, float | None] = {}
        self.is_deleted = False

    def row(self, version: int) -> DeltaRow:
        row = self.deltas.resolve(f"{self.name}:{version}")
        assert row is not None
        return row

    @precondition(lambda self: not self.is_deleted)
    @rule()
    def push(self) -> None:
        self.pushed += 1
        assert push(self.session, self.name).version == self.pushed
        self.running.add(self.pushed)

    def offer(self, version: int) -> None:
        if "default" not in self.aliases:
            self.aliases["default"], self.last_contender = version, self.pushed
        elif self.last_contender is not None and version <= self.last_contender:
            better = self.ready[version] < self.ready[self.aliases["default"]]
            self.aliases["default"] = version if better else self.aliases["default"]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kl=st.floats(0, 1))
    def finish(self, data: Any, kl: float) -> None:
        version = data.draw(st.sampled_from(sorted(self.running)))
        finish(self.session, self.row(version), kl)
        self.running.remove(version)
        self.ready[version] = kl
        self.offer(version)

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), alias=st.sampled_from(["default", "prod", "test"]))
    def move(self, data: Any, alias: str) -> None:
        version = data.draw(st.sampled_from(sorted(self.ready)))
        model = self.models.find(self.name, lock=True)
        assert model is not None
        moved = self.models.move(model, alias, self.row(version), reason="by hand")
        assert moved == (self.aliases.get(alias) != version)
        self.aliases[alias] = version
        if alias == "default":
            self.last_contender = None

    @precondition(lambda self: self.ready or self.running)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        version = data.draw(st.sampled_from(sorted({*self.ready, *self.running})))
        row = self.row(version)
        named = [alias for alias, meant in self.aliases.items() if meant == version]
        if named and (named != ["default"] or len(self.ready) > 1):
            with pytest.raises(Conflict):
                self.deltas.delete(row)
            return
        self.deltas.delete(row)
        for alias in named:
            del self.aliases[alias]
        self.deleted[version] = self.ready.pop(version, None)
        self.running.discard(version)

    @precondition(lambda self: self.pushed and not self.is_deleted)
    @rule()
    def delete_model(self) -> None:
        model = self.models.find(self.name, lock=True)
        assert model is not None
        self.deltas.delete_model(model, deleted_by=None)
        self.ready, self.running, self.aliases = {}, set(), {}
        self.is_deleted = True

    @precondition(lambda self: self.is_deleted)
    @rule()
    def push_again(self) -> None:
        with pytest.raises(Conflict):
            push(self.session, self.name)

    @precondition(lambda self: self.deleted and not self.is_deleted)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        version = data.draw(st.sampled_from(sorted(self.deleted)))
        assert self.deltas.restore(f"{self.name}:{version}") is not None
        kl = self.deleted.pop(version)
        if kl is None:
            self.running.add(version)
        else:
            self.ready[version] = kl
            self.offer(version)

    @invariant()
    def names_mean_what_they_should(self) -> None:
        for version in range(1, self.pushed + 1):
            is_there = version in self.ready or version in self.running
            found = meaning(self.session, f"{self.name}:{version}")
            assert found == (version if is_there else None)
        for alias in ("default", "prod", "test"):
            assert meaning(self.session, f"{self.name}@{alias}") == self.aliases.get(alias)
        totals = TotalsRepository(self.session, LOCAL_TENANT).read()
        self.session.expire_all()
        assert totals.artifact_bytes == 10 * totals.deltas
        assert totals.deltas == len(self.ready)

    def teardown(self) -> None:
        self.session.rollback()
        self.session.close()


def test_names_over_pushes_moves_and_deletions(database: Database) -> None:
    machine = type("NamesHere", (Names,), {"database": database})
    machine.TestCase.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
    machine.TestCase("runTest").runTest()
