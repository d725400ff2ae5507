"""Settings of all processes, read from the environment (`DELTADOCK_*`).

The embedded start and production run the same code; only their settings differ.
"""

from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from deltadock.errors import InvalidInput, NotFound

KEEP_ALIVE_SECONDS: Final = 75
"""How long api and nodes keep idle connections: longer than clients and proxies do, so that none
sends a request on a connection that is just being closed."""
RETENTION_PATTERN: Final = r"^(keep|ready|[0-9]{1,5})$"


class Settings(BaseSettings):
    """One process's settings; each field is read from the variable `DELTADOCK_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="DELTADOCK_", extra="ignore")

    home: Path = Field(
        default=Path(".deltadock"),
        description="Folder for the embedded database, blobs and caches.",
    )
    database_url: str = Field(
        default="",
        description="SQLAlchemy URL, such as `postgresql+psycopg://...` in production; empty, "
        "SQLite in the home.",
    )
    broker_url: str = Field(
        default="redis://127.0.0.1:6379/0", description="Celery's broker (Redis protocol)."
    )

    blob_store: Literal["local", "s3"] = Field(
        default="local", description="`local`, a folder in the home, or `s3`."
    )
    s3_endpoint_url: str | None = Field(
        default=None, description="S3 server; unset, AWS's endpoint of `s3_region`."
    )
    s3_public_url: str | None = Field(
        default=None,
        description="URL at which clients reach the S3 server. Downloads are redirected there; "
        "unset, the api streams them.",
    )
    s3_bucket: str = Field(default="deltadock", description="Bucket for blobs.")
    s3_region: str = Field(default="us-east-1", description="Region of the S3 server.")
    s3_access_key_id: str | None = Field(
        default=None, description="Credentials of the S3 server; unset, those that boto3 finds."
    )
    s3_secret_access_key: SecretStr | None = Field(
        default=None, description="As `s3_access_key_id`."
    )

    api_url: str | None = Field(
        default=None,
        description="The api that a node registers with (unset, it runs standalone), and that the "
        "command and `deltadock.Client` talk to.",
    )
    node_url: str | None = Field(
        default=None,
        description="URL at which the api reaches the node; unset, its host name and port.",
    )
    api_processes: int = Field(
        default=1,
        ge=1,
        description="Processes of the api that `deltadock up` starts behind its port.",
    )
    key_secret: SecretStr | None = Field(
        default=None,
        description="Secret under which API keys are stored and sessions are signed; unset, that "
        "of the home, made at the first start. The same for all processes of the api; another one "
        "revokes every key.",
    )
    node_secret: SecretStr | None = Field(
        default=None,
        description="Secret shared by the api and its nodes; unset, both accept only requests "
        "from this machine.",
    )
    node_heartbeat_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Interval of a node's heartbeats; its registration expires after five "
        "intervals without one.",
    )
    device: str = Field(
        default="auto", description="Torch device of workers and nodes: auto, cpu or cuda[:n]."
    )

    node_base: Path | None = Field(
        default=None,
        description="Folder of the base that a node serves; unset, it loads whichever base "
        "requests name.",
    )
    node_deltas: dict[str, str] = Field(
        default={},
        description="JSON object of the artifact digests that a node with a `node_base` loads at "
        "start, by the names under which it offers them.",
    )
    node_max_sequences: int = Field(
        default=16, ge=1, description="Maximum sequences in a node's batch."
    )
    node_max_waiting: int = Field(
        default=64, ge=0, description="Maximum waiting sequences; further ones get a 429."
    )
    node_max_waiting_per_delta: int = Field(
        default=32, ge=0, description="Maximum waiting sequences of one delta."
    )
    node_cache_slots: int = Field(
        default=32,
        ge=1,
        description="Slots of a node's KV cache, running sequences and cached prefixes; at least "
        "`node_max_sequences`.",
    )
    node_max_deltas: int = Field(default=8, ge=1, description="Delta slots on a node's device.")
    node_factor_cache_bytes: int = Field(
        default=2**30,
        ge=0,
        description="Memory of a node for unpacked tensors, on a GPU those that its kernels cannot "
        "read packed; others are unpacked at every use. "
        "A CPU needs a further eighth of a delta's unpacked size per row of the batch.",
    )
    node_merge: bool = Field(
        default=False,
        description="Whether a node merges the delta that gets three quarters of its traffic; this "
        "takes the memory of the base's linear layers a second time.",
    )
    node_host_bytes: int = Field(
        default=8 * 2**30, ge=0, description="Host memory of a node for deltas outside its slots."
    )
    node_disk_bytes: int = Field(
        default=64 * 2**30, ge=0, description="Disk space of a node for artifacts."
    )
    node_context_tokens: int = Field(
        default=4096, ge=2, description="Maximum sequence length; at most the model's own limit."
    )
    node_pass_tokens: int = Field(
        default=512, ge=1, description="Tokens per forward pass; longer prompts are chunked."
    )

    webhook_private_addresses: bool = Field(
        default=False,
        description="Whether webhooks may have addresses inside networks, such as 10.0.0.1.",
    )
    retention: str = Field(
        default="keep",
        pattern=RETENTION_PATTERN,
        description="What becomes of an uploaded fine-tune once its delta is ready, in projects "
        "without a rule: keep, ready (drop it), or days after which it is dropped.",
    )
    calibration_days: int | None = Field(
        default=None,
        ge=0,
        description="Days after which uploaded calibration texts are dropped; unset, never.",
    )
    undo_days: float = Field(
        default=7.0,
        ge=0,
        description="Days in which a deleted delta can be restored, a failed job continue after "
        "its last finished block, and an uploaded checkpoint become a base or a delta.",
    )
    collect_seconds: float = Field(
        default=3600.0, gt=0, description="Interval at which workers collect unneeded bytes."
    )
    checkpoint_cache_bytes: int = Field(
        default=256 * 2**30,
        ge=0,
        description="Disk space of a worker or node for bases; the least recently used ones that "
        "are not in use make room.",
    )
    max_file_bytes: int = Field(default=100 * 2**30, description="Maximum size of an upload file.")
    import_sources: list[str] = Field(
        default=[],
        description="JSON list of places that uploads may be imported from, with all below them: "
        "file:///folder on the api's machine, s3://bucket/prefix, hf://org or hf://.",
    )
    upload_ttl: float = Field(
        default=24 * 3600.0,
        gt=0,
        description="Seconds without activity after which an unfinished upload is aborted and its "
        "parts are removed.",
    )
    lease_seconds: float = Field(
        default=30.0,
        description="Lease on a job: not renewed for so long, another worker may acquire it.",
    )
    worker_metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port of a worker's metrics; unset, it serves none. Each worker of a machine "
        "needs its own.",
    )
    worker_metrics_host: str = Field(
        default="127.0.0.1", description="Address of a worker's metrics, which need no key."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="URL of an OpenTelemetry collector (OTLP over HTTP) that traces are sent to; "
        "unset, there are none.",
    )
    log_format: Literal["json", "console"] = Field(
        default="json", description="Form of the log, which goes to stderr."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Lowest level that is logged."
    )

    @property
    def sqlalchemy_url(self) -> str:
        """The database URL; by default the SQLite file in `home`."""
        return self.database_url or f"sqlite:///{self.database_file}"

    @property
    def database_file(self) -> Path:
        """The SQLite file in the home."""
        return self.home.resolve() / "deltadock.db"

    @property
    def blob_folder(self) -> Path:
        """Folder of the local blob store."""
        return self.home / "blobs"

    @property
    def cache_folder(self) -> Path:
        """Folder for files that can be fetched again (bases, artifacts, jobs' files)."""
        return self.home / "cache"

    @property
    def worker_alive(self) -> Path:
        """File that a worker touches when ready and at every sweep, for health checks."""
        return self.cache_folder / "worker.alive"


def read_settings() -> Settings:
    """Read the environment.

    Raises:
        InvalidInput: a variable has a wrong value; the message does not show it.
    """
    try:
        return Settings()
    except ValidationError as error:
        prefix = str(Settings.model_config.get("env_prefix"))
        faults = (
            f"{prefix}{'.'.join(map(str, fault['loc'])).upper()}: {fault['msg']}."
            for fault in error.errors(include_url=False, include_input=False)
        )
        raise InvalidInput(f"Wrong settings: {' '.join(faults)}") from None
    except SettingsError as error:  # no JSON, where a variable is a list or a mapping
        raise InvalidInput(f"Wrong settings: {error}.") from None


@lru_cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return read_settings()


def settings_in(home: Path | None) -> Settings:
    """The settings of this process, in another home if one is named."""
    settings = get_settings()
    return settings if home is None else settings.model_copy(update={"home": home})


def deployed_in(home: Path | None) -> Settings:
    """As `settings_in`, of a Deltadock that is there already.

    Raises:
        NotFound: the database is a file in the home, and there is none.
    """
    settings = settings_in(home)
    if not settings.database_url and not settings.database_file.is_file():
        raise NotFound(
            f"There is no Deltadock in {settings.home}. Name its folder with --home, or its "
            "database with DELTADOCK_DATABASE_URL; `deltadock up` starts a new one."
        )
    return settings
