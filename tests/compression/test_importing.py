"""What travels along with an imported adapter."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from deltadock.artifacts.export import merge
from deltadock.artifacts.reader import Artifact
from deltadock.compression.calibration.options import Source
from deltadock.compression.importing import import_delta
from deltadock.compression.model.weights import Checkpoint
from deltadock.compression.run import CompressOptions


def test_the_adapters_tokenizer_and_its_tokens(
    make_pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, _ = make_pair(tied=False)
    (base / "merges.txt").write_text("#version: 0.2\n")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    before = Checkpoint(base)
    tensors = {
        name: torch.cat([before.tensor(name), torch.ones(3, 64, dtype=torch.bfloat16)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    tensors["lm_head.weight"][0] += 1
    count = len(tensors["lm_head.weight"])
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none"}
    written = {
        "adapter_config.json": json.dumps(settings),
        "chat_template.jinja": "{{ messages }}",
        "tokenizer.model": b"\xff\xfe",
        "merges.txt": (base / "merges.txt").read_text(),
        "trainer_state.json": "{}",
        "README.md": "An adapter.",
    }
    for name, content in written.items():
        (adapter / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "a.delta"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 500)
    report = import_delta(
        base,
        adapter,
        out,
        CompressOptions(method="lora"),
        calibration=[Source(text)],
        progress=lambda _: None,
    )
    assert report.kl == 0.0
    assert report.kl_base is not None
    assert report.kl_base > 0
    with Artifact(out) as artifact:
        files, binary = artifact.files, artifact.binary_files
    assert files.keys() == {"chat_template.jinja", "config.json"}
    assert binary == {"tokenizer.model": b"\xff\xfe"}
    assert json.loads(files["config.json"] or "")["vocab_size"] == count
    merge(base, out, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
