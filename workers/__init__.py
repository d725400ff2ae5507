"""The Celery app and its tasks: compression jobs and the sweeper that re-sends lost ones."""
