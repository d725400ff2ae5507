"""The base's product in Triton against float64, on a GPU or interpreted; and when it is taken."""

import pytest
import torch
import torch.nn.functional as F

from deltadock.kernels import dispatch
from deltadock.kernels.linear import linear, triton
from tests.kernels.linear.cases import CASES, DEVICE, FORMS, operands

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="no GPU; test_interpreter.py runs these in Triton's interpreter",
)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    CASES[name]()


def test_few_rows_take_the_kernel_on_cards_with_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "on_gpu", lambda _: True)
    taken = []
    monkeypatch.setattr(triton, "linear", lambda *arguments: taken.append(arguments))
    x, weight, bias = operands(triton.MOST_ROWS, (40, 256), torch.bfloat16)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr(triton, "form_of", lambda _: FORMS[0])
    linear(x, weight, bias)
    assert taken == [(x, weight, bias, FORMS[0])]
    many = torch.cat([x, x])
    for others in ((many, weight), (x[:, :252], weight[:, :252]), (x.float(), weight.float())):
        linear(*others, None)
    assert len(taken) == 1
