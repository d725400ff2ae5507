"""Options that several commands take: the method, the goal, the calibration texts, the seed."""

from pathlib import Path
from typing import Annotated, Final

import typer

from deltadock import words
from deltadock.cli.server import complete_method
from deltadock.compression.options import Source, default_method
from deltadock.errors import InvalidInput

Home = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder for data, caches and logs; by default DELTADOCK_HOME, or .deltadock here.",
    ),
]

SAMPLED_WORD: Final = "sampled"
"""As a calibration source: text sampled from the fine-tune."""
GOALS: Final = "Goal, at most one of"
CALIBRATION: Final = "Calibration"

Method = Annotated[
    str | None,
    typer.Option(
        help="Compression method; `deltadock methods` lists them. By default "
        f"{default_method().name}, for a PEFT adapter {default_method(is_adapter=True).name}.",
        autocompletion=complete_method,
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Bits per compressed weight; 1.0 if no goal is given.",
        rich_help_panel=GOALS,
    ),
]
TargetBytes = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        parser=words.parse_size,
        help="Maximum size of the delta file, such as 400kB; a plain number is of bytes.",
        rich_help_panel=GOALS,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Minimum ratio of bf16 checkpoint bytes to delta bytes.", rich_help_panel=GOALS
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="Maximum KL to the fine-tune in nats per held-out token; finds the smallest delta.",
        rich_help_panel=GOALS,
    ),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        help="Minimum top-1 agreement, such as 0.98: the fraction of held-out tokens whose most "
        "likely next token is the fine-tune's; finds the smallest delta.",
        rich_help_panel=GOALS,
    ),
]


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 2**53:  # what JSON holds exactly
        raise typer.BadParameter("give a whole number from 0 to 2**53 - 1.")
    return seed


Seed = Annotated[int, typer.Option(callback=_check_seed, help="Of all that is random.")]


def parse_source(text: str) -> Source:
    """Parse `FILE`, `FILE:WEIGHT`, `sampled` or `sampled:WEIGHT`.

    Raises:
        typer.BadParameter: the file does not exist, or the weight is not a number.
    """
    for name, weight in ((text, "1"), text.rpartition(":")[::2]):
        if name == SAMPLED_WORD or (name and Path(name).is_file()):
            try:
                return Source(None if name == SAMPLED_WORD else Path(name), float(weight))
            except ValueError:
                break
    raise typer.BadParameter(
        f"{text!r} is neither a file nor FILE:WEIGHT nor {SAMPLED_WORD!r}",
        param_hint="--calibration",
    )


def check_file(out: Path) -> None:
    """Refuse `-`, which other programs take for standard output.

    Raises:
        InvalidInput: it is that.
    """
    if str(out) == "-":
        raise InvalidInput("A delta is written to a file, where it is verified: name one.")
