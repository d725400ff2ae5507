"""What is replaced or added in vLLM's classes, so that its adapters are deltas.

    LoRAModelRunnerMixin.load_lora_model   the manager of each rank
    WorkerBase.deltadock_load              added: ask a rank for a delta
    BaseServing._check_model               HTTP: a request's `model` to a loaded delta, or a refusal
    OnlineRenderer.preprocess_chat   HTTP: conversations in the delta's own chat template
    OpenAIServingModels.show_available_models   `/v1/models`
    AsyncLLM.add_request, LLMEngine.add_request   the same for callers in Python

Each is looked for at the start, with the parameters that are relied on.
"""

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from http import HTTPStatus
from typing import Any, Final

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.worker_base import WorkerBase

from deltadock.errors import DeltadockError, NotFound
from deltadock_vllm.many.manager import DeltaManager
from deltadock_vllm.many.names import (
    POLL_SECONDS,
    DeltaNames,
    Load,
    check_sampling,
    raise_refusal,
)

log = init_logger("vllm.deltadock")

HOOKS: Final[Mapping[tuple[type, str], tuple[str, ...]]] = {
    (LoRAModelRunnerMixin, "load_lora_model"): ("model", "vllm_config", "device"),
    (BaseServing, "_check_model"): ("request",),
    (BaseServing, "create_error_response"): ("message", "err_type", "status_code", "param"),
    (OnlineRenderer, "preprocess_chat"): ("default_template",),
    (OpenAIServingModels, "show_available_models"): (),
    (AsyncLLM, "add_request"): ("prompt", "params", "lora_request"),
    (LLMEngine, "add_request"): ("prompt", "params", "lora_request"),
    (LLMEngine, "collective_rpc"): ("method", "timeout", "args"),
    (AsyncLLM, "collective_rpc"): ("method", "timeout", "args"),
}
"""Methods of vLLM and the parameters that are used."""


def check_hooks(hooks: Mapping[tuple[type, str], tuple[str, ...]] = HOOKS) -> None:
    """Refuse a vLLM without these methods.

    Raises:
        RuntimeError: naming the first that is missing or has other parameters.
    """
    for (kind, name), parameters in hooks.items():
        method = getattr(kind, name, None)
        found = () if method is None else inspect.signature(method).parameters
        if method is None or not set(parameters) <= set(found):
            raise RuntimeError(
                f"deltadock-vllm cannot serve deltas by request: {kind.__name__}.{name} of this "
                "vLLM is not the method it knows. VLLM_PLUGINS='' runs without the plug-in."
            )


def install_hooks() -> None:
    """Replace and add the methods; again has no effect.

    Raises:
        RuntimeError: this vLLM lacks one.
    """
    if hasattr(WorkerBase, "deltadock_load"):
        return
    check_hooks()
    LoRAModelRunnerMixin.load_lora_model = _load_lora_model
    WorkerBase.deltadock_load = _worker_load
    BaseServing._check_model = _checking_model(BaseServing._check_model)
    OnlineRenderer.preprocess_chat = _rendering(OnlineRenderer.preprocess_chat)
    OpenAIServingModels.show_available_models = _listing(OpenAIServingModels.show_available_models)
    AsyncLLM.add_request = _adding_async(AsyncLLM.add_request)
    LLMEngine.add_request = _adding(LLMEngine.add_request)


# In the workers.


def _load_lora_model(
    self: Any, model: nn.Module, vllm_config: VllmConfig, device: torch.device
) -> nn.Module:
    """In the place of `LoRAModelRunnerMixin.load_lora_model`."""
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        # An embedding's rows are looked up by slot, between two graphs.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        if compilation.splitting_ops is not None:
            compilation.splitting_ops.append("deltadock::embedding")
    self.lora_manager = DeltaManager(model, vllm_config, torch.device(device))
    return model


def _worker_load(self: Any, key: int, path: str) -> dict[str, str]:
    """Added to the workers: `DeltaManager.load`."""
    return self.model_runner.lora_manager.load(key, path)  # type: ignore[no-any-return]


# In the front.


def _names(owner: Any, config: VllmConfig) -> DeltaNames:
    found: DeltaNames | None = getattr(owner, "_deltadock_names", None)
    if found is None:
        found = owner._deltadock_names = DeltaNames(config)
    return found


def _loader(engine: Any) -> Load:
    async def load(key: int, path: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = await engine.collective_rpc(
            "deltadock_load", args=(key, path)
        )
        return found

    return load


TEMPLATE: Final = ContextVar[str | None]("TEMPLATE", default=None)
"""The chat template of the delta that the request in this context is for; None: the engine's."""


def _checking_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        engine = getattr(self.models, "engine_client", None)
        config = getattr(engine, "vllm_config", None)
        name = request.model
        TEMPLATE.set(None)
        if config is None or config.lora_config is None or self._is_model_supported(name):
            return await original(self, request)
        names = _names(engine, config)
        try:
            check_sampling(request)
            delta, template = await names.find(name, _loader(engine))
            self.models.lora_requests[name] = delta
            TEMPLATE.set(template)
        except DeltadockError as error:
            # For other refusals the name stays, which requests that were checked may yet look up.
            if isinstance(error, NotFound):
                self.models.lora_requests.pop(name, None)
            return self.create_error_response(
                error.message, error.code, HTTPStatus(error.status), "model"
            )
        return None

    return check_model


def _rendering(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def preprocess_chat(self: Any, *args: Any, **more: Any) -> Any:
        template = TEMPLATE.get()
        if template is None:
            return await original(self, *args, **more)
        call = inspect.signature(original).bind(self, *args, **more)
        call.arguments["default_template"] = template
        return await original(*call.args, **call.kwargs)

    return preprocess_chat


def _listing(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def show_available_models(self: Any) -> Any:
        found = await original(self)
        config = getattr(self.engine_client, "vllm_config", None)
        if config is None or config.lora_config is None:
            return found
        shown = {card.id for card in found.data}
        base = self.base_model_paths[0].name
        found.data += [
            ModelCard(id=name, parent=base)
            for name in await _names(self.engine_client, config).listed()
            if name not in shown
        ]
        return found

    return show_available_models


def _adding_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def add_request(self: Any, *args: Any, **more: Any) -> Any:
        asked = _asked(original, self, args, more)
        if asked is not None:
            request, params = asked
            names = _names(self, self.vllm_config)
            try:
                check_sampling(params)
                if not names.is_loaded(request.lora_int_id):
                    if not names.is_known(request):
                        await asyncio.to_thread(names.check_path, request.lora_path)
                    await names.ensure(request, _loader(self))
            except DeltadockError as error:
                raise _vllm_error(error) from error
        return await original(self, *args, **more)

    return add_request


def _adding(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add_request(self: Any, *args: Any, **more: Any) -> Any:
        asked = _asked(original, self, args, more)
        if asked is not None:
            request, params = asked
            try:
                check_sampling(params)
                _ensure(self, request)
            except DeltadockError as error:
                raise _vllm_error(error) from error
        return original(self, *args, **more)

    return add_request


def _ensure(engine: Any, request: LoRARequest) -> None:
    """As `DeltaNames.ensure`, without an event loop."""
    names = _names(engine, engine.vllm_config)
    key = request.lora_int_id
    if not names.is_loaded(key):
        names.check_path(request.lora_path)
        while True:
            states = engine.collective_rpc("deltadock_load", args=(key, request.lora_path))
            raise_refusal(states)
            if all(state["state"] == "ready" for state in states):
                break
            time.sleep(POLL_SECONDS)
    names.note_loaded(key)


def _asked(
    original: Callable[..., Any], engine: Any, args: Any, more: Any
) -> tuple[LoRARequest, Any] | None:
    """The adapter and the sampling parameters of a call of `add_request`, if it has an adapter."""
    if engine.vllm_config.lora_config is None:
        return None
    call = inspect.signature(original).bind(engine, *args, **more).arguments
    request = call.get("lora_request") or getattr(call["prompt"], "lora_request", None)
    return None if request is None else (request, call["params"])


def _vllm_error(error: DeltadockError) -> Any:
    kind = VLLMNotFoundError if isinstance(error, NotFound) else VLLMValidationError
    return kind(error.message)
