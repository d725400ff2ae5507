"""One running api for all tests of the client."""

from collections.abc import Iterator

import pytest

from deltadock.client.blocking import Client
from tests.client.support import Service, running_service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service"), redis_url) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url, service.key) as client:
        yield client
