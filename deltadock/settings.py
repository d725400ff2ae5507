"""Settings of every process, read from the environment (`DELTADOCK_*`).

The embedded start and the production topology run the same code: only these differ.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One process's settings; every field is an environment variable `DELTADOCK_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="DELTADOCK_", extra="ignore")

    home: Path = Field(
        default=Path(".deltadock"),
        description="Folder for the embedded database, blobs and caches.",
    )
    database_url: str = Field(
        default="", description="SQLAlchemy URL; empty means SQLite in `home`."
    )
    broker_url: str = Field(
        default="redis://127.0.0.1:6379/0", description="Celery's broker (Redis protocol)."
    )

    blob_store: Literal["local", "s3"] = "local"
    s3_endpoint_url: str | None = None
    s3_bucket: str = "deltadock"
    s3_region: str = "us-east-1"
    s3_access_key_id: str | None = None
    s3_secret_access_key: SecretStr | None = None

    api_url: str | None = Field(
        default=None, description="The api that a node registers with; unset, it serves alone."
    )
    node_url: str | None = Field(
        default=None, description="Where the api finds a node; unset, its host's name and port."
    )
    node_secret: SecretStr | None = Field(
        default=None,
        description="What the api and its nodes know each other by; unset, both trust only "
        "this machine.",
    )
    node_heartbeat_seconds: float = Field(
        default=2.0,
        gt=0,
        description="A node tells the api of itself this often; silent for "
        "five times as long, it is gone.",
    )
    device: str = Field(
        default="auto", description="Torch device of workers and nodes: auto, cpu or cuda[:n]."
    )

    node_base: Path | None = Field(
        default=None,
        description="Folder of the base that a node serves; unset, it adopts what requests name.",
    )
    node_deltas: list[str] = Field(
        default=[], description="Artifact digests that a node with a `node_base` loads at start."
    )
    node_max_sequences: int = Field(default=16, ge=1, description="Sequences in a node's batch.")
    node_max_waiting: int = Field(
        default=64, ge=0, description="Sequences that may wait; more are answered with 429."
    )
    node_max_waiting_per_delta: int = Field(
        default=32, ge=0, description="How many of them may be of one delta."
    )
    node_cache_slots: int = Field(
        default=32,
        ge=1,
        description="Sequences whose keys and values a node keeps, for prompts that begin alike; "
        "`node_max_sequences` at least.",
    )
    node_max_deltas: int = Field(default=8, ge=1, description="Deltas in a node's slots at once.")
    node_factor_cache_bytes: int = Field(
        default=2**30,
        ge=0,
        description="Memory of a node for unpacked deltas; those beyond are unpacked at every use.",
    )
    node_merge: bool = Field(
        default=False,
        description="Whether a node merges the delta that takes three quarters of its traffic, in "
        "the memory of the base's linear layers once more.",
    )
    node_host_bytes: int = Field(
        default=8 * 2**30, ge=0, description="Deltas in a node's host memory, ready for a slot."
    )
    node_disk_bytes: int = Field(
        default=64 * 2**30, ge=0, description="Artifacts on a node's disk."
    )
    node_context_tokens: int = Field(
        default=4096, ge=2, description="Longest sequence of a node; the model's own limit if less."
    )
    node_pass_tokens: int = Field(
        default=512, ge=1, description="Tokens of a pass; longer prompts are taken in parts."
    )

    max_file_bytes: int = Field(default=100 * 2**30, description="Largest file of an upload.")
    lease_seconds: float = Field(
        default=60.0, description="A job whose worker is silent this long may be taken over."
    )
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @property
    def sqlalchemy_url(self) -> str:
        """The database URL, with the embedded SQLite file as its default."""
        return self.database_url or f"sqlite:///{self.home.resolve() / 'deltadock.db'}"

    @property
    def blob_folder(self) -> Path:
        """Folder of the local blob store."""
        return self.home / "blobs"

    @property
    def cache_folder(self) -> Path:
        """Folder for files that can be fetched again (bases, artifacts, work in progress)."""
        return self.home / "cache"

    @property
    def worker_alive(self) -> Path:
        """File that a worker touches when it is ready and then at every sweep, busy or not."""
        return self.cache_folder / "worker.alive"


@lru_cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
