"""The manifests are valid, strictly, by Kubernetes' own schemas."""

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from integrations.vllm.tests.engine import ROOT

MANIFESTS = sorted((ROOT / "integrations/vllm/kubernetes").glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_their_schemas(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
