"""A causal language model run block by block, one block's weights in memory at a time.

The modelling code is `transformers`': the model is built on the meta device, and a block gets its
weights just before it runs. What a block is called with (rotary embeddings, masks) is learned by
running the model once with recorders in the blocks' place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compression.weights import TensorSource
from deltadock.errors import InvalidCheckpoint, UnsupportedModel

TOKENS_PER_STEP: Final = 4096
LOGITS_PER_STEP: Final = 1 << 24
MAX_BLOCKS: Final = 1024

Observer = Callable[[str, Tensor], None]
"""Called with a linear layer's full weight name and its input (tokens, h_in)."""


def _read_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot read this config.json (is its model_type known?): {error}"
        ) from error
    blocks = getattr(config, "num_hidden_layers", None)
    if not isinstance(blocks, int) or not 0 < blocks <= MAX_BLOCKS:
        raise UnsupportedModel(f"config.json names no number of decoder blocks up to {MAX_BLOCKS}.")
    return config


class _Recorder(nn.Module):
    """Stands in a block's place and remembers the keyword arguments it was called with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, Any] = {}
        # Some models read a block's attention type before they call it.
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        self.calls = kwargs
        return hidden


class BlockwiseModel:
    """The model in `folder`'s configuration, with weights taken from any source.

    Attributes:
        blocks: names of the decoder blocks, in order, such as `model.layers.0`.
        linears: weight names of each block's linear layers, in the order of the modules.
        embedding: weight name of the input embedding.
        head: weight name of the output head, or None where it is tied to the embedding.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Build the skeleton.

        Raises:
            UnsupportedModel: `transformers` has no causal language model of this type, or its
                blocks cannot be told.
        """
        config = _read_config(folder)
        try:
            with torch.device("meta"):
                self._model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        except Exception as error:
            # Whatever modelling code stumbles over in a config, the config is at fault.
            raise UnsupportedModel(
                f"transformers cannot build a causal language model from this config.json: {error}"
            ) from error
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.config = config
        self._model.to(self.dtype).eval()
        self._blocks_name = self._find_blocks()
        self._body_name = self._blocks_name.rpartition(".")[0]
        body = self._model.get_submodule(self._body_name)
        self._layers: nn.ModuleList = self._model.get_submodule(self._blocks_name)
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self.blocks = [f"{self._blocks_name}.{k}" for k in range(self.config.num_hidden_layers)]
        self.linears = {
            block: [
                f"{block}.{name}.weight"
                for name, module in self._model.get_submodule(block).named_modules()
                if isinstance(module, nn.Linear)
            ]
            for block in self.blocks
        }
        names = {id(module): name for name, module in self._model.named_modules()}
        self._embedding_name = names[id(body.get_input_embeddings())]
        self._head_name = names[id(self._model.get_output_embeddings())]
        self.embedding = f"{self._embedding_name}.weight"
        tied = bool(getattr(config, "tie_word_embeddings", False))
        self.head = None if tied else f"{self._head_name}.weight"
        self._restore_buffers()

    def _find_blocks(self) -> str:
        """Name of the list of decoder blocks."""
        count = getattr(self.config, "num_hidden_layers", None)
        for name, module in self._model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return str(name)
        raise UnsupportedModel(
            f"The decoder blocks of a {self.config.model_type!r} model cannot be told."
        )

    def _restore_buffers(self) -> None:
        """Rebuild modules whose buffers no checkpoint holds (rotary frequencies) off meta."""
        for name, module in list(self._model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                try:
                    rebuilt = type(module)(self.config)
                except TypeError as error:
                    raise UnsupportedModel(
                        f"{name} of a {self.config.model_type!r} model cannot be rebuilt."
                    ) from error
                self._model.set_submodule(name, rebuilt.to(self.device))

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Hold the checkpoint's tensors (name to shape) against what config.json describes.

        Raises:
            InvalidCheckpoint: naming the first tensor that is missing or of another shape.
        """
        for name, tensor in self._model.state_dict().items():
            found = shapes.get(name)
            if found is None and self.head is None and name == f"{self._head_name}.weight":
                continue
            if found is None or tuple(found) != tuple(tensor.shape):
                raise InvalidCheckpoint(
                    f"config.json describes {name!r} with shape {list(tensor.shape)}, but the "
                    f"weights have {'no such tensor' if found is None else list(found)}."
                )

    @contextmanager
    def _loaded(self, name: str, source: TensorSource) -> Iterator[nn.Module]:
        """The submodule `name` with its weights, which are dropped again on leaving."""
        module = self._model.get_submodule(name)
        skeleton = module.state_dict()
        weights = {key: self._weight(f"{name}.{key}", source) for key in skeleton}
        module.load_state_dict(weights, assign=True)
        try:
            yield module
        finally:
            module.load_state_dict(skeleton, assign=True)

    def _weight(self, name: str, source: TensorSource) -> Tensor:
        if name not in source and self.head is None and name == f"{self._head_name}.weight":
            name = self.embedding
        return source.tensor(name).to(self.device, self.dtype)

    @torch.inference_mode()
    def embed(self, tokens: Tensor, source: TensorSource) -> Tensor:
        """Input of the first block, (sequences, length, hidden), for `tokens` of equal lengths.

        Runs the model's own code up to the blocks, and remembers what it calls each with.
        """
        body = self._model.get_submodule(self._body_name)
        recorders = [_Recorder(block) for block in self._layers]
        captured: list[Tensor] = []
        recorders[0].register_forward_pre_hook(lambda _module, args: captured.append(args[0]))
        outside = [f"{self._body_name}.{name}" for name in self._outside_blocks()]
        self._model.set_submodule(self._blocks_name, nn.ModuleList(recorders))
        try:
            with ExitStack() as stack:
                for name in outside:
                    stack.enter_context(self._loaded(name, source))
                for batch in self._batches(tokens):
                    body(input_ids=batch.to(self.device), use_cache=False)
                    self._arguments[len(batch)] = [recorder.calls for recorder in recorders]
        finally:
            self._model.set_submodule(self._blocks_name, self._layers)
        return torch.cat(captured)

    def _outside_blocks(self) -> list[str]:
        """The body's children that have weights, its list of blocks apart."""
        body = self._model.get_submodule(self._body_name)
        return [
            name
            for name, module in body.named_children()
            if module is not self._layers and next(module.parameters(), None) is not None
        ]

    @staticmethod
    def _batches(values: Tensor) -> Sequence[Tensor]:
        """`values` (sequences, length, ...) cut along the sequences, a few thousand tokens each."""
        batches: Sequence[Tensor] = values.split(max(1, TOKENS_PER_STEP // values.shape[1]))
        return batches

    @torch.inference_mode()
    def run_block(
        self, index: int, hidden: Tensor, source: TensorSource, observe: Observer | None = None
    ) -> Tensor:
        """Outputs of block `index` for its inputs `hidden` (sequences, length, hidden).

        `observe` sees every linear layer's input on the way. Layers that share an input (q, k
        and v; gate and up) are reported one after another with the SAME tensor object.
        """
        name = self.blocks[index]
        outputs = []
        with self._loaded(name, source) as block:
            hooks = []
            if observe is not None:
                for weight in self.linears[name]:
                    module = self._model.get_submodule(weight.removesuffix(".weight"))
                    hooks.append(module.register_forward_pre_hook(_reporter(weight, observe)))
            for batch in self._batches(hidden):
                output = block(batch, **self._arguments[len(batch)][index])
                outputs.append(output[0] if isinstance(output, tuple) else output)
            for hook in hooks:
                hook.remove()
        return torch.cat(outputs)

    @torch.inference_mode()
    def final_hidden(self, hidden: Tensor, source: TensorSource) -> Tensor:
        """The last block's outputs after the final norm: the head's inputs."""
        for name in self._outside_blocks():
            if "norm" in name.lower():
                with self._loaded(f"{self._body_name}.{name}", source) as norm:
                    return torch.cat([norm(batch) for batch in self._batches(hidden)])
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, source: TensorSource) -> Iterator[Tensor]:
        """Logits of flat `hidden` (tokens, hidden): (tokens of a piece, vocabulary) float32."""
        with self._loaded(self._head_name, source) as head:
            for piece in hidden.split(max(1, LOGITS_PER_STEP // self.config.vocab_size)):
                yield head(piece).float()


def _reporter(weight: str, observe: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def report(_module: nn.Module, args: tuple[Any, ...]) -> None:
        observe(weight, args[0])

    return report
