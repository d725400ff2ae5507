"""The node's engine: throughput with deltas, beside the bare base and plain transformers.

    python -m benchmarks.node [--rounds 5]

On the CPU: a random Llama of 31 million parameters in float32 answers eight prompts with 64 tokens
each, in alternation by (1) transformers' batched `generate`, (2) the engine on the base alone and
(3) the engine with each prompt on its own delta of one bit per weight. Throughput counts generated
tokens, prefill included. Ratios are of figures of the same round; their median is printed. Then
all prompts on one delta, packed and merged; and the time to the first token of a prompt that is in
the prefix cache, against one that is not.

    python -m benchmarks.node 7b

On a GPU, at Qwen2.5-7B's shape with random weights. First the engine's logits on two layers of that
width are compared with merged weights in plain transformers. Then: twelve requests on twelve deltas
in one batch against twelve full models one after another, and against the time to read the base
and the deltas at the bandwidth of a copy measured in the same run; 32 and 64 deltas resident and in
one batch; a cold delta's copy from page-locked host memory into a slot against a plain copy of as
many bytes; and the time to the first token when 500 deltas with 32 slots are requested with Zipf
popularity (they share storage in host memory; the engine, its scheduler and the slots are the
node's). It ends within nine minutes.

`--tiny` runs either on a small model, `7b --device cpu --tiny` without a GPU; the figures then mean
nothing. With TRITON_INTERPRET=1 the logits are those of the GPU's kernels in Triton's interpreter.
"""

import argparse
import asyncio
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any, Final
from unittest.mock import patch

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from benchmarks.harness import copy_rate, describe_machine, wall_seconds
from benchmarks.kernel import random_delta
from benchmarks.linear import form_named
from deltadock.inference.deltas.reading import HostDelta, merge_delta, place_delta, remove_delta
from deltadock.inference.deltas.slots import SlotManager
from deltadock.inference.engine.engine import Engine
from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.engine.sampling import SamplingParams
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.engine.sequence import Event
from deltadock.inference.engine.sequence import Sequence as EngineSequence
from deltadock.inference.model.families import FAMILIES
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.model.weight_deltas import WeightDelta, in_one_buffer
from deltadock.inference.prompts.tokenizer import TextStream, Tokenizer
from deltadock.kernels import dispatch
from deltadock.kernels.linear import triton as linear
from deltadock.kernels.svd_delta import PackedDelta, reference

LLAMA_31M: Final = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
TINY_LLAMA: Final = LLAMA_31M | {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
}  # fmt: skip
REQUESTS, TOKENS, PROMPT, LONG_PROMPT = 8, 64, 16, 768

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
"""Check the logits of the GPU's kernels in Triton's interpreter."""
LIMIT_SECONDS: Final = 500
"""No part of the GPU benchmark begins later than this."""


@dataclasses.dataclass(frozen=True)
class GpuWorkload:
    """The GPU benchmark's model and sizes.

    Attributes:
        shape: fields of the Qwen2 configuration.
        running: deltas, one sequence each, in the main batch.
        resident: numbers of deltas that are resident and decode together.
        prompt, tokens: tokens of a prompt and of an answer in the decode measurements.
        names, slots, arrivals, answer: deltas, slots, requests and tokens of an answer under
            Zipf's law.
        copied_bytes: of the copy that measures the bandwidth.
    """

    shape: dict[str, int]
    running: int = 12
    resident: tuple[int, ...] = (32, 64)
    prompt: int = 160
    tokens: int = 64
    names: int = 500
    slots: int = 32
    arrivals: int = 600
    answer: int = 32
    copied_bytes: int = 1 << 30


QWEN_7B: Final = GpuWorkload(
    {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 4096,
    }
)
TINY_QWEN: Final = GpuWorkload(
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
    },
    running=3,
    resident=(4, 6),
    prompt=20,
    tokens=6,
    names=20,
    slots=4,
    arrivals=30,
    answer=3,
    copied_bytes=1 << 20,
)


def random_model(family: str, device: str, dtype: torch.dtype, **shape: Any) -> Any:
    """A causal language model of transformers with random weights and no end-of-text token."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = FAMILIES[family].config_class(**shape, **ends)
    torch.manual_seed(0)
    with torch.device(device):
        return FAMILIES[family].model_class._from_config(config, dtype=dtype).eval()


def base_model(model: Any, limits: DeltaLimits) -> DeltaModel:
    """The node's model on the weights of `model`, whose modules it replaces."""
    return DeltaModel(model, limits)


def random_deltas(model: Any) -> dict[str, PackedDelta]:
    """A weight delta of one bit per weight for each linear layer of the model's blocks."""
    device = str(model.device)
    generator = torch.Generator(device).manual_seed(0)
    return {
        name: random_delta(h_out, h_in, device, generator)
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
        for h_out, h_in in [parameter.shape]
    }


def random_prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    """Uniformly random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (length,), generator=generator).tolist()


class _DotStream(TextStream):
    """A dot for every token: detokenization is not measured."""

    def __init__(self) -> None:
        self.stopped = False

    def push(self, token: int) -> str:
        return "."

    def finish(self) -> str:
        return ""


class TimedRequest:
    """One greedy answer of `tokens` tokens.

    Attributes:
        sent, first, ended: monotonic seconds of submission, first token and end.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        slot: int,
        queue_key: str,
        tokens: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_end` is called from the engine's thread."""
        self.sent = self.first = self.ended = 0.0
        self.error: Exception | None = None
        self.done = threading.Event()
        self._on_end = on_end
        self.sequence = EngineSequence(
            tokens=list(prompt),
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0),
            delta_slot=slot,
            queue_key=queue_key,
            end_ids=frozenset(),
            stream=_DotStream(),
            emit=self._receive,
        )

    def send(self, engine: Engine) -> None:
        """Submit the request."""
        self.sent = time.monotonic()
        engine.submit(self.sequence)

    def _receive(self, event: Event) -> None:
        now = time.monotonic()
        if event.tokens and not self.first:
            self.first = now
        if event.finish is not None:
            self.ended, self.error = now, event.error
            self.done.set()
            self._on_end()

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            Exception: the request's error.
        """
        self.done.wait()
        if self.error is not None:
            raise self.error


class DeltaEngine:
    """A running engine on a random model, with copies of one random delta in its slots."""

    def __init__(self, model: Any, limits: DeltaLimits, **options: int) -> None:
        """Replace the modules of `model` and start the engine; `options` are the engine's."""
        self.delta = random_deltas(model)
        self.delta_bytes = sum(delta.nbytes for delta in self.delta.values())
        self.model = base_model(model, limits)
        self.engine = Engine(self.model, **options)
        self.engine.start()
        self._vocabulary: int = model.config.vocab_size
        self._seeds = count(1)

    def install(self, deltas: int) -> None:
        """Put a copy of the delta, in its own memory, into each of the slots 1 to `deltas`."""
        for slot in range(1, deltas + 1):
            self.model.remove(slot)
            copies: Mapping[str, WeightDelta] = {
                name: dataclasses.replace(delta, words=delta.words.clone())
                for name, delta in self.delta.items()
            }
            self.model.install(slot, self.model.prepare(copies))

    def merge(self, slot: int) -> None:
        """Merge the slot's delta with the base's weights."""
        merge_delta(self.model, slot)

    def prompt(self, length: int) -> list[int]:
        """A random prompt, different from all before: the prefix cache holds none of it."""
        return random_prompt(length, next(self._seeds), self._vocabulary)

    def request(
        self, slot: int, prompt: int, tokens: int, queue_key: str = "", **options: Any
    ) -> TimedRequest:
        """A request with a new prompt of `prompt` tokens; by default each slot has its own key."""
        key = queue_key or f"slot {slot}"
        return TimedRequest(self.prompt(prompt), slot, key, tokens, **options)

    def run(self, requests: Sequence[TimedRequest]) -> float:
        """Send all requests at once and wait for all; returns the seconds it took."""
        start = time.monotonic()
        for request in requests:
            request.send(self.engine)
        for request in requests:
            request.wait()
        return time.monotonic() - start

    def step_seconds(self, slots: Iterable[int], prompt: int, tokens: int) -> float:
        """Seconds of a decode step with one sequence on each slot; the best of three runs."""
        slots = list(slots)
        best = float("inf")
        for _ in range(4):  # the first captures the CUDA graph
            requests = [self.request(slot, prompt, tokens) for slot in slots]
            self.run(requests)
            begin = max(request.first for request in requests)
            end = max(request.ended for request in requests)
            best = min(best, (end - begin) / (tokens - 1))
        return best

    def stop(self) -> None:
        """Stop the engine's thread."""
        self.engine.stop()


def llama_engine(shape: Mapping[str, int], deltas: int) -> DeltaEngine:
    """The CPU benchmark's engine with `deltas` deltas in its slots."""
    bench = DeltaEngine(
        random_model("llama", "cpu", torch.float32, **shape),
        DeltaLimits(slots=deltas + 1, rows=1024, cache_bytes=4 << 30),
        max_sequences=REQUESTS,
        context_tokens=1024,
        pass_tokens=1024,
        cache_slots=16,
    )
    bench.install(deltas)
    return bench


def generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Exactly `tokens` greedy tokens for prompts of equal length by transformers' `generate`."""
    inputs = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert outputs.shape[1] == inputs.shape[1] + tokens


def measure_cpu(shape: Mapping[str, int], rounds: int) -> None:
    """Throughput of transformers, of the base and of eight deltas; merged weights; prefix cache."""
    plain = random_model("llama", "cpu", torch.float32, **shape)
    bench = llama_engine(shape, REQUESTS)

    def transformers_rate() -> float:
        prompts = [bench.prompt(PROMPT) for _ in range(REQUESTS)]
        seconds = wall_seconds(partial(generate, plain, prompts, TOKENS), plain.device)
        return REQUESTS * TOKENS / seconds

    def engine_rate(slots: Iterable[int]) -> float:
        return REQUESTS * TOKENS / bench.run([bench.request(s, PROMPT, TOKENS) for s in slots])

    def first_token(prompt: Sequence[int]) -> float:
        request = TimedRequest(prompt, 1, "slot 1", 1)
        bench.run([request])
        return request.first - request.sent

    parameters = sum(tensor.numel() for tensor in plain.parameters())
    print(
        f"{describe_machine()}; {parameters / 1e6:.1f}M parameters, "
        f"{REQUESTS} requests x {TOKENS} tokens"
    )
    base, distinct, same = [0] * REQUESTS, range(1, REQUESTS + 1), [1] * REQUESTS
    results = [
        (transformers_rate(), engine_rate(base), engine_rate(distinct)) for _ in range(rounds + 1)
    ][1:]  # the first round starts threads, allocates buffers and unpacks deltas
    for of_plain, of_base, of_deltas in results:
        print(
            f"tokens/s: transformers {of_plain:6.0f}  base {of_base:6.0f}"
            f"  8 deltas {of_deltas:6.0f}"
        )
    to_plain = statistics.median(of_base / of_plain for of_plain, of_base, _ in results)
    to_base = statistics.median(of_deltas / of_base for _, of_base, of_deltas in results)
    print(f"base over transformers' batched generate: {to_plain:.2f}x")
    print(f"8 deltas over the base alone: {to_base:.1%}")
    engine_rate(same)
    packed = statistics.median(engine_rate(same) for _ in range(rounds))
    bench.merge(1)
    engine_rate(same)
    merged = statistics.median(engine_rate(same) for _ in range(rounds))
    print(f"one delta for all: packed {packed:.0f}, merged {merged:.0f} tokens/s")
    print(f"merged over packed: {merged / packed:.2f}x")
    prompts = [bench.prompt(LONG_PROMPT) for _ in range(rounds)]
    speedup = statistics.median(first_token(prompt) / first_token(prompt) for prompt in prompts)
    print(f"first token of a {LONG_PROMPT}-token prompt, computed over cached: {speedup:.1f}x")
    bench.stop()


class GpuBenchmark:
    """The engine at a workload's size, with one delta in host memory to load into slots."""

    def __init__(self, workload: GpuWorkload, model: Any) -> None:
        self.workload, self.device = workload, model.device
        self.base_bytes = sum(
            tensor.nbytes for name, tensor in model.named_parameters() if "embed" not in name
        )
        slots = max(workload.resident) + 1
        self.bench = DeltaEngine(
            model,
            DeltaLimits(slots=slots, rows=1024),
            max_sequences=slots - 1,
            context_tokens=256,
            pass_tokens=1024,
        )
        host = in_one_buffer(
            {name: delta.to("cpu") for name, delta in self.bench.delta.items()},
            pin_memory=self.device.type == "cuda",
        )
        tokenizer = Tokenizer({"tokenizer.json": FastTokenizer(models.BPE()).to_str()})
        self.host = HostDelta(host, tokenizer, self.bench.delta_bytes)

    def step_seconds(self, slots: Iterable[int]) -> float:
        """Seconds of a decode step with one sequence on each slot."""
        return self.bench.step_seconds(slots, self.workload.prompt, self.workload.tokens)

    def decode(self, plain_step: float, bandwidth: float) -> float:
        """Print a batch's step against full models in turn, and against the bytes that it reads.

        Returns its seconds.
        """
        running = self.workload.running
        self.bench.install(running)
        alone = self.step_seconds([0])
        together = self.step_seconds(range(1, running + 1))
        read = self.base_bytes + running * self.host.nbytes
        for name, seconds in (
            ("base alone", alone),
            (f"{running} deltas", together),
            ("plain transformers", plain_step),
        ):
            print(f"a decode step, {name}: {seconds * 1e3:.2f} ms")
        print(f"{running} deltas at once: {running / together:.0f} tokens/s")
        for name, seconds in (("plain transformers", plain_step), ("this engine", alone)):
            ratio = running * seconds / together
            print(f"over {running} full models in turn, each in {name}: {ratio:.1f}x")
        fraction = read / bandwidth / together
        print(
            f"of the roofline, {read / 1e9:.1f} GB at {bandwidth / 1e12:.2f} TB/s: {fraction:.1%}"
        )
        return together

    def hot_delta(self) -> None:
        """Print the step of a batch that is all on one delta, packed and merged."""
        slots = [1] * self.workload.running
        packed = self.step_seconds(slots)
        merge = wall_seconds(partial(self.bench.merge, 1), self.device)
        merged = self.step_seconds(slots)
        print(f"one delta for all: {packed * 1e3:.2f} ms a step, merged {merged * 1e3:.2f} ms")
        print(f"merged over packed: {packed / merged:.2f}x; merging took {merge:.1f} s")

    def cold_swap(self) -> None:
        """Print the time from host memory into a slot, against a plain copy of as many bytes."""
        size = self.host.nbytes
        source = torch.zeros(size, dtype=torch.uint8)
        if self.device.type == "cuda":
            source = source.pin_memory()
        rate = copy_rate(source, torch.empty(size, dtype=torch.uint8, device=self.device))
        times = []
        for _ in range(5):
            self.bench.model.remove(1)
            load = partial(place_delta, self.bench.model, 1, self.host)
            times.append(wall_seconds(load, self.device))
        swap = statistics.median(times)
        print(f"cold swap of {size / 1e6:.0f} MB: {swap * 1e3:.1f} ms")
        print(f"of a plain copy's {rate / 1e9:.1f} GB/s: {size / swap / rate:.1%}")

    def many_deltas(self) -> None:
        """Print the step of each number of resident deltas, all decoding."""
        for number in self.workload.resident:
            self.bench.install(number)
            seconds = self.step_seconds(range(1, number + 1))
            size = number * self.host.nbytes / 1e9
            print(f"{number} deltas resident, {size:.1f} GB: {seconds * 1e3:.2f} ms a step")

    async def first_tokens(self, rate: float) -> None:
        """Print times to the first token of `rate` requests per second, with Zipf popularity."""
        workload, traffic = self.workload, _Traffic(self)
        for slot in range(1, max(workload.resident) + 1):
            self.bench.model.remove(slot)
        generator = torch.Generator().manual_seed(0)
        popularity = 1 / torch.arange(1, workload.names + 1)
        names = torch.multinomial(
            popularity, workload.arrivals, replacement=True, generator=generator
        )
        gaps = torch.empty(workload.arrivals).exponential_(rate, generator=generator)
        tasks = []
        for name, gap in zip(names.tolist(), gaps.tolist(), strict=True):
            await asyncio.sleep(gap)
            tasks.append(asyncio.create_task(traffic.request(f"delta {name}")))
        await asyncio.gather(*tasks)
        hits = 1 - traffic.loads / workload.arrivals
        print(
            f"Zipf over {workload.names} deltas, {workload.slots} slots, {rate:.1f} requests/s: "
            f"{hits:.0%} found in a slot"
        )
        waits = sorted(traffic.waits)
        for quantile in (0.5, 0.99):
            seconds = waits[int(quantile * len(waits))]
            print(f"first token, p{quantile * 100:g}: {seconds * 1e3:.0f} ms")


class _Traffic:
    """Requests for named deltas, all with the same bytes, through the node's slot manager.

    Attributes:
        loads: deltas loaded into a slot.
        waits: seconds from a request's arrival to its first token.
    """

    def __init__(self, benchmark: GpuBenchmark) -> None:
        self._workload, self._bench = benchmark.workload, benchmark.bench
        self._host = benchmark.host
        self._loader = ThreadPoolExecutor(1)
        self._slots = SlotManager[None](self._workload.slots, fill=self._fill, clear=self._clear)
        self.loads = 0
        self.waits: list[float] = []

    async def _fill(self, slot: int, _: str) -> None:
        self.loads += 1
        await self._clear(slot)
        await self._in_loader(partial(place_delta, self._bench.model, slot, self._host))

    async def _clear(self, slot: int) -> None:
        await self._in_loader(partial(remove_delta, self._bench.model, slot))

    async def _in_loader(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._loader, call)

    async def request(self, name: str) -> None:
        """Serve one request from its arrival to its end."""
        arrival = time.monotonic()
        slot, _ = await self._slots.acquire(name)
        ended = asyncio.Event()
        on_end = partial(asyncio.get_running_loop().call_soon_threadsafe, ended.set)
        request = self._bench.request(
            slot, self._workload.prompt, self._workload.answer, name, on_end=on_end
        )
        request.send(self._bench.engine)
        await ended.wait()
        self._slots.release(name)
        request.wait()
        self.waits.append(request.first - arrival)


def check_logits(workload: GpuWorkload, device: str, dtype: torch.dtype) -> None:
    """Compare the engine's logits on a delta, and merged weights', with float32.

    Raises:
        SystemExit: the engine's error exceeds twice that of merged weights.
    """
    shape = workload.shape | {"num_hidden_layers": 2}
    merged = random_model("qwen2", device, dtype, **shape)
    other = random_model("qwen2", device, dtype, **shape)
    deltas = random_deltas(other)
    model = base_model(other, DeltaLimits(slots=2, rows=64))
    model.install(1, model.prepare(deltas))
    for name, delta in deltas.items():
        u, s, v, _ = reference.unpack(delta)
        parameter = merged.get_parameter(name)
        parameter.data = (parameter.float() + (u * s) @ v).to(dtype)
    tokens = random_prompt(16, 0, shape["vocab_size"])
    sequence = TimedRequest(tokens, 1, "delta", 1).sequence
    sequence.kv_slot = 0
    runner = ModelRunner(model, model.make_cache(1, 128), 1, static=True)
    inputs = torch.tensor([tokens], device=device)
    with torch.inference_mode():
        runner.logits([ScheduledChunk(sequence, 0, 15)])
        of_engine = runner.logits([ScheduledChunk(sequence, 15, 16)]).values[0]
        of_merged = merged(inputs).logits[0, -1].float()
        exact = merged.float()(inputs).logits[0, -1]
    engine, plain = (float((it - exact).norm() / exact.norm()) for it in (of_engine, of_merged))
    print(f"relative error of the logits: engine {engine:.1e}, merged weights {plain:.1e}")
    if not engine <= 2 * plain + 1e-5:
        raise SystemExit("The engine's logits are wrong; nothing is timed.")


def measure_gpu(workload: GpuWorkload, device: str) -> None:
    """Check, then measure everything that the time limit allows."""
    start = time.monotonic()
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    print(describe_machine(device))
    with patch.object(dispatch, "on_gpu", lambda _: True) if INTERPRETED else nullcontext():
        check_logits(workload, device, torch.bfloat16 if INTERPRETED else dtype)
    model = random_model("qwen2", device, dtype, **workload.shape)
    prompt = random_prompt(workload.prompt, 0, workload.shape["vocab_size"])
    generate(model, [prompt], 2)
    few, many = (
        wall_seconds(partial(generate, model, [prompt], tokens), model.device)
        for tokens in (2, 2 + workload.tokens)
    )
    plain_step = max((many - few) / workload.tokens, 1e-9)
    source = torch.empty(workload.copied_bytes, dtype=torch.uint8, device=device)
    bandwidth = 2 * copy_rate(source, torch.empty_like(source))
    del source
    benchmark = GpuBenchmark(workload, model)
    step = benchmark.decode(plain_step, bandwidth)
    benchmark.hot_delta()
    benchmark.cold_swap()
    if time.monotonic() - start < LIMIT_SECONDS:
        benchmark.many_deltas()
    if time.monotonic() - start < LIMIT_SECONDS:
        rate = workload.running / step / workload.answer / 2
        asyncio.run(benchmark.first_tokens(rate))
    benchmark.bench.stop()
    print(f"{time.monotonic() - start:.0f} s in all")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", choices=["31m", "7b"], default="31m")
    parser.add_argument("--rounds", type=int, default=5, help="of the 31m model")
    parser.add_argument("--device", default="cuda", help="of the 7b model")
    parser.add_argument("--tiny", action="store_true", help="a smoke run on a small model")
    parser.add_argument(
        "--form", type=form_named, help="of the base's products of the 7b model; else cuBLAS's"
    )
    options = parser.parse_args(arguments)
    if options.model == "7b":
        workload = TINY_QWEN if options.tiny else QWEN_7B
        if options.form is None:
            measure_gpu(workload, options.device)
        else:
            with patch.object(linear, "form_of", lambda _: options.form):
                measure_gpu(workload, options.device)
    else:
        measure_cpu(TINY_LLAMA if options.tiny else LLAMA_31M, options.rounds)


if __name__ == "__main__":
    main()
