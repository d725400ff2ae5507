"""A job imports an uploaded PEFT adapter as a delta of its scaled product."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltadock.artifacts.checkpoint import ADAPTER_TYPE, CheckpointManifest, FileInspector, assemble
from deltadock.artifacts.reader import Artifact
from deltadock.storage.blobs import BlobStore
from deltadock.storage.repositories import CheckpointRepository, DeltaRepository
from deltadock.storage.tables import JobRow, JobState
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers.compress import Outcome, WorkerContext
from tests.workers.conftest import Pair, job_files, row_of, take_and_compress

LAYER = "model.layers.1.mlp.up_proj"


def store(blobs: BlobStore, folder: Path) -> CheckpointManifest:
    """Store an adapter's files as an upload does."""
    files, tensors = [], []
    for path in folder.iterdir():
        inspector = FileInspector(path.name)
        inspector.update(path.read_bytes())
        file, found = inspector.finish()
        files.append(file)
        tensors += found
        blobs.put_file(path)
    manifest = assemble(files, tensors, None, (folder / "adapter_config.json").read_bytes())
    assert manifest.config["model_type"] == ADAPTER_TYPE
    blobs.put_bytes(manifest.to_json())
    return manifest


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_job_imports_an_adapter(
    context: WorkerContext,
    pair: Pair,
    submit: Callable[..., str],
    look: Callable[[str], JobRow],
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    a, b = torch.randn(4, 32), torch.randn(64, 4)
    save_file(
        {
            f"base_model.model.{LAYER}.lora_A.weight": a,
            f"base_model.model.{LAYER}.lora_B.weight": b,
        },
        adapter / "adapter_model.safetensors",
    )
    job_id = submit("lora")
    with context.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(look(job_id).delta_id)
        assert delta is not None
        row = CheckpointRepository(session, LOCAL_TENANT).add(row_of(store(context.blobs, adapter)))
        delta.checkpoint_digest = row.digest
    assert take_and_compress(context) is Outcome.READY
    assert look(job_id).state is JobState.READY, look(job_id).error_message
    with context.database.read_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(look(job_id).delta_id)
        assert delta is not None
        report = DeltaRepository(session, LOCAL_TENANT).report(delta.id)
    assert report is not None
    assert report["kl"] == 0.0
    assert report["kl_base"] > 0
    with Artifact(context.settings.blob_folder / "blobs" / str(delta.artifact_digest)) as artifact:
        factors = artifact.factors(f"{LAYER}.weight")
        found = torch.tensor(factors.u) * torch.tensor(factors.s) @ torch.tensor(factors.v)
    torch.testing.assert_close(found.double(), 3.0 * b.double() @ a.double(), rtol=1e-5, atol=1e-4)
    assert job_files(context) == []
