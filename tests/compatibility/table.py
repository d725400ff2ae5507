"""`python -m tests.compatibility.table` prints docs/compatibility.md."""

import sys

from deltadock.compression.families import CALIBRATED
from deltadock.model_target import SERVED
from tests.compatibility.cases import CASES

HEAD = """\
# What is taken, and what is refused

A folder is read as `from_pretrained` would read it: `model.safetensors`, else the shards that the
index names. A folder with `adapter_config.json` and `adapter_model.safetensors` and no model's
weights is an adapter. Of the other files only those count that a model needs to answer; the rest is
named and ignored. Base and fine-tune must be of one architecture.

Each line is a test in `tests/compatibility`: a tiny model is made, and what is taken must have the
logits of plain `transformers` or PEFT, merged, loaded by `load_delta` and, if its family is served,
from a node.
`python -m tests.compatibility.table` prints this page.

## Families

| `model_type` | compressed | served by a node |
|---|---|---|
"""

TAKEN = """
Others are compressed by `--method low-rank` or `bitdelta`, without a calibration text and without a
measured KL, or stored as they are by `--method exact`. Served or not, every delta can be merged
into its base.

## Taken

| trainer | what is given | how |
|---|---|---|
"""

REFUSED = """
## Refused

| trainer | what is given | error | what to do |
|---|---|---|---|
"""


def page() -> str:
    """The page in Markdown."""
    families = "".join(
        f"| {name} | {'language part' if family.vision else 'yes'} | "
        f"{'yes' if name in SERVED else 'no'} |\n"
        for name, family in CALIBRATED.items()
    )
    taken = "".join(
        f"| {case.trainer} | {case.given} | {case.note or 'as it is'} |\n"
        for case in CASES
        if case.error is None
    )
    refused = "".join(
        f"| {case.trainer} | {case.given} | `{case.error.code}` | {case.note} |\n"
        for case in CASES
        if case.error is not None
    )
    return f"{HEAD}{families}{TAKEN}{taken}{REFUSED}{refused}"


if __name__ == "__main__":
    sys.stdout.write(page())
