"""`--worker-extension-cls deltadock_vllm.swap.DeltaSwap`: another delta in place of the served one.

Offline: `llm.collective_rpc("deltadock_swap", args=(delta,))`, then `llm.reset_prefix_cache()`. A
server has `PUT /v1/deltadock/delta` (`deltadock_vllm.endpoints`), which does both.
"""

import time
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model_loader

from deltadock.errors import DeltadockError, InvalidInput
from deltadock_vllm.loader import LOAD_FORMAT, SERVED, DeltadockLoader

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = init_logger("vllm.deltadock")


class DeltaSwap:
    """Methods that vLLM adds to its worker."""

    if TYPE_CHECKING:
        vllm_config: VllmConfig

        def get_model(self) -> nn.Module: ...
        def update_config(self, overrides: dict[str, Any]) -> None: ...
        def reload_weights(self) -> None: ...

    def deltadock_served(self) -> str | None:
        """The digest of the delta that is merged into this worker's weights; None: the base."""
        file = getattr(self.get_model(), SERVED)
        return None if file is None else str(file.digest)

    def deltadock_refusal(self, delta: str | None) -> dict[str, str] | None:
        """Why a delta cannot be served, as `code` and `message`; it is fetched if it can."""
        try:
            self._check(delta)
        except DeltadockError as error:
            return {"code": error.code, "message": error.message}
        return None

    def _check(self, delta: str | None) -> None:
        load_config = self.vllm_config.load_config
        if load_config.load_format != LOAD_FORMAT:
            raise InvalidInput(f"Deltas are swapped in an engine with --load-format {LOAD_FORMAT}.")
        loader = get_model_loader(load_config)
        if delta is not None and isinstance(loader, DeltadockLoader):
            loader.check(delta, self.vllm_config.model_config)

    def deltadock_swap(self, delta: str | None) -> float:
        """Load base plus delta in place of the weights; None: the base. Returns the seconds taken.

        No request may be running, and the prefix cache is to be reset afterwards.

        Raises:
            DeltadockError: the delta cannot be served; nothing has changed.
        """
        began = time.perf_counter()
        self._check(delta)
        extra = dict(self.vllm_config.load_config.model_loader_extra_config)
        before = extra.pop("delta", None)
        try:
            self._reload({**extra, "delta": delta})
        except Exception:
            log.exception("Loading %s failed; %s is loaded again.", delta, before or "the base")
            self._reload({**extra, "delta": before})
            raise
        return time.perf_counter() - began

    def _reload(self, extra: dict[str, Any]) -> None:
        self.update_config({"load_config": {"model_loader_extra_config": extra}})
        self.reload_weights()
        for module in self.get_model().modules():
            # A tied head is in no checkpoint, so that reloading passes it by: on a CPU its weight
            # has a packed copy, which would stay the old one.
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
