"""A tiny pair of checkpoints, and worker contexts on both databases."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.folder import scan_folder
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore
from deltadock.storage.repositories import (
    BaseRepository,
    CheckpointRepository,
    DeltaRepository,
    JobRepository,
    UploadRepository,
)
from deltadock.storage.tables import CheckpointRow, JobRow, UploadFileRow, UploadKind
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers.compress import Outcome, WorkerContext, compress_job, take_job


def take_and_compress(context: WorkerContext) -> Outcome | None:
    """As the task does; None if no job waits."""
    taken = take_job(context)
    return None if taken is None else compress_job(taken, context)


def job_files(context: WorkerContext) -> list[str]:
    """Names of this machine's folders of jobs."""
    return sorted(found.name for found in (context.settings.cache_folder / "attempts").glob("*"))


SAMPLES = Path(__file__).parents[2] / "samples"
THREADS = torch.get_num_threads()
"""As in a worker process: the order of sums, and so an artifact's bytes, may depend on it."""


@pytest.fixture(autouse=True)
def _threads_of_a_worker() -> None:
    torch.set_num_threads(THREADS)  # tests of other folders set their own


@dataclass(frozen=True)
class Pair:
    """Paths of a base, its fine-tune and a calibration text."""

    base: Path
    finetuned: Path
    calibration: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    pair = Pair(folder / "base", folder / "finetuned", folder / "calibration.txt")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=1536,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    model.save_pretrained(pair.base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(pair.finetuned)
    for target in (pair.base, pair.finetuned):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SAMPLES / "base" / name, target)
    pair.calibration.write_text((SAMPLES / "calibration.txt").read_text()[:8_000])
    return pair


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings with a migrated, empty database of either kind."""
    settings = Settings(home=tmp_path / "home", device="cpu")
    if request.param == "postgres":
        url = request.getfixturevalue("migrated_postgres")
        return settings.model_copy(update={"database_url": url})
    settings.home.mkdir()
    shutil.copy(request.getfixturevalue("migrated_file"), settings.home)
    return settings


@pytest.fixture
def context(settings: Settings) -> Iterator[WorkerContext]:
    context = WorkerContext.of(settings)
    context.blobs.prepare()
    yield context
    context.database.dispose()


@pytest.fixture
def submit(context: WorkerContext, pair: Pair) -> Callable[..., str]:
    """Stores a compression's inputs and rows as the api does; returns the job's id."""

    def submit(
        method: str = "exact",
        bits: float | None = None,
        finetuned: Path | None = None,
        sampled: bool = False,
    ) -> str:
        base = put_checkpoint(context.blobs, pair.base)
        tuned = put_checkpoint(context.blobs, finetuned or pair.finetuned)
        text = context.blobs.put_file(pair.calibration)
        with context.database.session_scope() as session:
            upload = UploadRepository(session, LOCAL_TENANT).add(UploadKind.CALIBRATION)
            file = UploadFileRow(path="calibration.txt", size=1, sha256=text, tensors=[])
            UploadRepository(session, LOCAL_TENANT).put_file(upload, file)
            upload.calibration_digest = text
            UploadRepository(session, LOCAL_TENANT).complete(upload)
            checkpoints = CheckpointRepository(session, LOCAL_TENANT)
            base_row, _ = BaseRepository(session, LOCAL_TENANT).add(
                "base", checkpoints.add(row_of(base))
            )
            delta = DeltaRepository(session, LOCAL_TENANT).add(
                name="project/model",
                base=base_row,
                checkpoint_digest=checkpoints.add(row_of(tuned)).digest,
                method=method,
                bits=bits,
                options={
                    "seed": 0,
                    "solver": "exact",
                    "goal": None if bits is None else {"kind": "bits", "value": bits},
                    "calibration": {
                        "sources": [
                            {"digest": text, "weight": 1.0},
                            *([{"digest": None, "weight": 3.0}] if sampled else ()),
                        ],
                        "tokens": 2048,
                        "length": 64,
                    },
                },
                fingerprint="0" * 64,
            )
            return delta.job.id

    return submit


@pytest.fixture
def look(context: WorkerContext) -> Callable[[str], JobRow]:
    """Returns the current row of a job."""

    def look(job_id: str) -> JobRow:
        with context.database.read_scope() as session:
            job = JobRepository(session, LOCAL_TENANT).find(job_id)
            assert job is not None
            return job

    return look


def put_checkpoint(blobs: BlobStore, folder: Path) -> CheckpointManifest:
    """Store a checkpoint folder as an upload does."""
    manifest = scan_folder(folder)
    for file in manifest.files:
        blobs.put_file(folder / file.path)
    assert blobs.put_bytes(manifest.to_json()) == manifest.digest
    return manifest


def row_of(manifest: CheckpointManifest) -> CheckpointRow:
    return CheckpointRow(
        digest=manifest.digest,
        weights_digest=manifest.weights_digest,
        model_type=manifest.config["model_type"],
        total_bytes=manifest.total_bytes,
    )


@pytest.fixture
def set_job(context: WorkerContext) -> Callable[..., None]:
    """Sets columns of a job's row, to simulate another process or elapsed time."""

    def set_job(job_id: str, **values: object) -> None:
        with context.database.session_scope() as session:
            job = JobRepository(session, LOCAL_TENANT).find(job_id)
            for name, value in values.items():
                setattr(job, name, value)

    return set_job
