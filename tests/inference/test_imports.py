"""The engine imports only the libraries that the GPU benchmark has, vLLM's plug-in no engine."""

import subprocess
import sys

BLOCKED = (
    "alembic", "boto3", "celery", "fastapi", "jinja2", "prometheus_client", "psycopg", "pydantic",
    "pydantic_settings", "pyscipopt", "redis", "sqlalchemy", "structlog", "uvicorn",
)  # fmt: skip


def test_readers_the_engine_and_its_benchmark_need_few_libraries() -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); "
        "import deltadock.inference.deltas.tensors; "
        "assert not {'deltadock.inference.model.model', 'transformers'} & set(sys.modules); "
        "import deltadock.inference.engine.engine, deltadock.inference.deltas.reading; "
        "import benchmarks.node"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
