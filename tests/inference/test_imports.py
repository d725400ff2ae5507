"""The engine imports only the libraries that the GPU benchmark has."""

import subprocess
import sys

BLOCKED = (
    "alembic", "boto3", "celery", "fastapi", "jinja2", "prometheus_client", "psycopg", "pydantic",
    "pydantic_settings", "pyscipopt", "redis", "sqlalchemy", "structlog", "uvicorn",
)  # fmt: skip


def test_the_engine_and_its_benchmark_need_few_libraries() -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); "
        "import deltadock.inference.engine.engine, deltadock.inference.deltas.reading; "
        "import benchmarks.node"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
