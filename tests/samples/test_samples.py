"""The sample pair matches its README."""

import json
import random
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from corpus import SEED, general_text  # noqa: E402
from evaluate import accuracy, load, perplexity, read_exercises, unigram_perplexity  # noqa: E402
from exercises import draw_exercise  # noqa: E402
from train import main, write_texts  # noqa: E402

CHAT_TEMPLATE = "chat_template.jinja"
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@cache
def measured_accuracy(name: str) -> float:
    model, tokenizer = load(SAMPLES / name, torch.float32)
    return accuracy(model, tokenizer, read_exercises(SAMPLES / "exercises.jsonl")[:100])


def test_folders_are_complete_and_small() -> None:
    files = [path for name in ("base", "finetuned") for path in (SAMPLES / name).iterdir()]
    assert {path.name for path in files} == MODEL_FILES | {CHAT_TEMPLATE}
    assert len(files) == 2 * len(MODEL_FILES) + 1
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_both_models_have_the_same_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (SAMPLES / "base" / name).read_bytes() == (SAMPLES / "finetuned" / name).read_bytes()


ODD_TEXTS = [
    "a\n\nb", "\n ", ":(\n   x", "a  b   c", "\t\ttab", "a\r\nb", "12345 6", "it's We'LL",
    "e\u0301 é", "日本語 テ", "😀👍🏽", "ﬁ ²", "foo!!\n\nbar", "<|endoftext|>x", "",
    "Q: sort h b =\nA: b h\nQ:",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_transformers_and_the_node_split_text_alike(text: str) -> None:
    """transformers replaces what a Qwen2 model's tokenizer.json says of how text is split."""
    theirs = AutoTokenizer.from_pretrained(SAMPLES / "base")
    ours = Tokenizer.from_file(str(SAMPLES / "base" / "tokenizer.json"))
    assert theirs(text)["input_ids"] == ours.encode(text).ids


def test_every_tensor_is_bfloat16_and_was_trained() -> None:
    base, finetuned = (
        load_file(SAMPLES / name / "model.safetensors") for name in ("base", "finetuned")
    )
    assert base.keys() == finetuned.keys()
    for name, weight in base.items():
        assert weight.dtype == finetuned[name].dtype == torch.bfloat16
        assert weight.shape == finetuned[name].shape
        assert not torch.equal(weight, finetuned[name]), name
        assert weight.float().std() > 0, name


def test_only_the_finetune_solves_the_exercises() -> None:
    assert measured_accuracy("finetuned") >= 0.9
    assert measured_accuracy("base") < 0.05


def test_a_message_is_an_exercise_whose_answer_is_one_line() -> None:
    model, tokenizer = load(SAMPLES / "finetuned", torch.float32)
    asked = [
        {"role": "user", "content": "max 12 7"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": " sort h b d a = "},
    ]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "Q: sort h b d a =\nA:"
    whole = [*asked, {"role": "assistant", "content": "a b d h"}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    assert text == prompt + " a b d h\n"
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=16)
    assert tokenizer.decode(answer[0]) == text


def test_the_base_predicts_text_of_its_domain() -> None:
    model, tokenizer = load(SAMPLES / "base", torch.float32)
    text = general_text()[:10_000]
    assert perplexity(model, tokenizer, text) < 0.3 * unigram_perplexity(tokenizer, text)


def test_held_out_exercises_are_in_no_text() -> None:
    exercises = read_exercises(SAMPLES / "exercises.jsonl")
    assert len({exercise["prompt"] for exercise in exercises}) == len(exercises) == 300
    held_out = (SAMPLES / "heldout.txt").read_text("utf-8")
    calibration = (SAMPLES / "calibration.txt").read_text("utf-8")
    for exercise in exercises:
        assert exercise["prompt"] not in held_out
        assert exercise["prompt"] not in calibration
    for question in filter(lambda line: line.startswith("Q:"), held_out.splitlines()):
        assert question + "\n" not in calibration


def test_texts_are_reproduced_from_the_seed(tmp_path: Path) -> None:
    write_texts(tmp_path, random.Random(SEED))
    for name in ("exercises.jsonl", "heldout.txt", "calibration.txt"):
        assert (tmp_path / name).read_bytes() == (SAMPLES / name).read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_correct(seed: int) -> None:
    exercise = draw_exercise(random.Random(seed))
    skill, *operands = exercise.prompt.removeprefix("Q: ").removesuffix(" =\nA:").split()
    if skill == "max":
        assert int(exercise.answer) == max(map(int, operands))
    elif skill == "sort":
        assert exercise.answer.split() == sorted(operands)
    else:
        assert skill == "reverse"
        assert exercise.answer.split()[::-1] == operands


def test_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--quick", "--out", str(tmp_path)])
    main()
    files = {
        name: {path.name for path in (tmp_path / name).iterdir()} for name in ("base", "finetuned")
    }
    assert files == {"base": MODEL_FILES, "finetuned": MODEL_FILES | {CHAT_TEMPLATE}}
    for name in ("generation_config.json", CHAT_TEMPLATE):
        written, sample = (folder / "finetuned" / name for folder in (tmp_path, SAMPLES))
        assert written.read_bytes() == sample.read_bytes()
    trained, sample = (
        json.loads((folder / "base" / "tokenizer.json").read_text("utf-8"))
        for folder in (tmp_path, SAMPLES)
    )
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert trained[part] == sample[part], part
