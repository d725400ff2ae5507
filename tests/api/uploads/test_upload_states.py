"""Random orders of everything that can happen to an upload, against a simple model of it."""

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from hypothesis.stateful import run_state_machine_as_test as run

from deltadock.api.uploads import assembly, service
from deltadock.api.uploads.completion import Completer
from deltadock.artifacts.checkpoint import FileEntry
from deltadock.errors import Conflict, DeltadockError, HashMismatch, NotFound
from deltadock.settings import Settings
from deltadock.storage.blobs import parts
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.blobs.port import sha256_of
from deltadock.storage.database import Database
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import UploadKind, UploadRow, UploadState
from deltadock.storage.tenancy import LOCAL_TENANT
from tests.api.support import CONFIG, sha256, weights

PART = 1 << 20
WEIGHTS = weights(rows=80_000)
COUNT = 3
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MIN_PART_BYTES", PART)


class Uploads(RuleBasedStateMachine):
    """One upload of a config and of weights in three parts; the model says what may happen."""

    database_file: Path

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        shutil.copy(self.database_file, self.home)
        configured = Settings(home=self.home, lease_seconds=60)
        self.database = Database(configured.sqlalchemy_url)
        self.blobs = LocalBlobStore(self.home / "blobs")
        self.blobs.prepare()
        self.completers = [Completer(self.database, self.blobs, configured) for _ in range(2)]
        self.state = UploadState.OPEN
        self.config = False
        self.weights = False
        self.arrived: dict[int, bool] = {}
        """Whether each part that is here has the announced bytes."""
        self.sealed = False
        with self.database.session_scope() as session:
            files = [
                FileEntry("config.json", len(CONFIG), sha256(CONFIG)),
                FileEntry(FILE, len(WEIGHTS), sha256(WEIGHTS)),
            ]
            self.id = service.create_upload(
                session, self.blobs, LOCAL_TENANT, UploadKind.CHECKPOINT, files
            ).id

    def teardown(self) -> None:
        for completer in self.completers:
            completer.close()
        self.database.dispose()
        shutil.rmtree(self.home)

    @property
    def refusal(self) -> type[DeltadockError]:
        """What a request gets that the upload's state does not allow."""
        return NotFound if self.state is UploadState.ABORTED else Conflict

    def row(self) -> UploadRow:
        with self.database.read_scope() as session:
            row = UploadRepository(session, LOCAL_TENANT).find(self.id)
            assert row is not None
            return row

    @initialize(wrong=st.sampled_from([None, None, 1, 3]), sent=st.sampled_from([1, 3, 4, 4, 4]))
    def begin(self, wrong: int | None, sent: int) -> None:
        """Most runs begin far on, so that what comes after completing is reached."""
        for number in range(1, min(sent, COUNT) + 1):
            self.send_part(number, number != wrong, True)
        self.store_config()
        if sent > COUNT:
            self.complete()

    @rule()
    def store_config(self) -> None:
        digest = self.blobs.put_bytes(CONFIG)

        def record() -> None:
            with self.database.session_scope() as session:
                entry = FileEntry("config.json", len(CONFIG), digest)
                service.record_file(session, self.blobs, LOCAL_TENANT, self.id, entry, [])

        if self.state is UploadState.OPEN:
            record()
            self.config = True
        else:
            with pytest.raises(self.refusal):
                record()

    @rule(number=st.integers(1, COUNT), right=st.booleans(), whole=st.booleans())
    def send_part(self, number: int, right: bool, whole: bool) -> None:
        part = bytearray(WEIGHTS[(number - 1) * PART : number * PART])
        if not right:
            part[-1] ^= 1

        def send() -> None:
            _, file = service.parts_of(self.database, self.blobs, LOCAL_TENANT, self.id, FILE)
            with file.writer(number) as writer:
                writer.write(part if whole else part[:1000])
                writer.commit()

        if self.state is not UploadState.OPEN or self.weights or self.sealed:
            with pytest.raises(self.refusal):
                send()
        elif whole:
            send()
            self.arrived[number] = right
        else:
            with pytest.raises(Conflict):
                send()
            self.arrived.pop(number, None)

    @rule()
    def complete(self) -> None:
        def ask() -> None:
            upload, assembled = self.row(), None
            if upload.state is UploadState.OPEN:
                service.check_arrived(self.blobs, upload)
                if service.is_all_stored(upload):
                    with self.database.read_scope() as session:
                        assembled = assembly.assemble_upload(session, self.blobs, upload)
            with self.database.session_scope() as session:
                service.complete_upload(session, self.blobs, LOCAL_TENANT, self.id, assembled)

        here = self.config and (self.weights or len(self.arrived) == COUNT)
        gone = self.state in {UploadState.ABORTED, UploadState.DROPPED}
        if gone or (self.state is UploadState.OPEN and not here):
            with pytest.raises(self.refusal):
                ask()
            return
        ask()
        if self.state is UploadState.OPEN:
            self.state = UploadState.COMPLETE if self.weights else UploadState.COMPLETING

    @rule(process=st.integers(0, 1))
    def work(self, process: int) -> None:
        """A process does what is to be done, if anything."""
        self.completers[process].run(self.id)
        if self.state is not UploadState.COMPLETING:
            return
        if all(self.arrived.values()):
            self.state, self.weights = UploadState.COMPLETE, True
            return
        self.state, self.arrived = UploadState.OPEN, {}
        reason = self.row().error
        assert reason is not None
        assert (reason["code"], reason["file"]) == (HashMismatch.code, FILE)

    @precondition(lambda self: self.state is UploadState.COMPLETING)
    @rule()
    def crash_while_hashing(self) -> None:
        """A process seals the file and dies; its lease expires."""
        with self.database.session_scope() as session:
            uploads = UploadRepository(session, LOCAL_TENANT)
            row = uploads.acquire(self.id, "dead", 0.0)
        assert row is not None
        token = next(file.parts_token for file in row.files if file.path == FILE)
        assert token is not None
        self.blobs.parted(self.id, token, len(WEIGHTS), PART).seal()

    @rule(sure=st.integers(0, 9))
    def abort(self, sure: int) -> None:
        if sure:  # rarely, since nothing happens afterwards
            return

        def stop() -> None:
            with self.database.session_scope() as session:
                service.delete_upload(session, LOCAL_TENANT, self.id, timedelta())
            service.drop_parts(self.blobs, self.id)

        if self.state in {UploadState.DROPPED, UploadState.ABORTED}:
            with pytest.raises(self.refusal):
                stop()
        elif self.state is UploadState.COMPLETE:
            stop()
            self.state = UploadState.DROPPED
        else:
            stop()
            self.state = UploadState.ABORTED

    @invariant()
    def agrees_with_the_model(self) -> None:
        row = self.row()
        assert row.state is self.state
        if self.state not in {UploadState.OPEN, UploadState.COMPLETING}:
            assert self.id not in self.blobs.parted_uploads()
        if self.state is UploadState.ABORTED:
            return
        assert {file.path: file.stored for file in row.files} == {
            "config.json": self.config,
            FILE: self.weights,
        }
        done = self.state in {UploadState.COMPLETE, UploadState.DROPPED}
        assert (row.checkpoint is not None) == done
        for path in (self.home / "blobs" / "blobs").iterdir():
            assert sha256_of(path) == path.name
        if self.state is UploadState.OPEN and not self.weights and self.arrived:
            _, file = service.parts_of(self.database, self.blobs, LOCAL_TENANT, self.id, FILE)
            assert file.arrived() == self.arrived.keys()


def test_an_upload_in_any_order(migrated_file: Path) -> None:
    Uploads.database_file = migrated_file
    run(
        Uploads,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
