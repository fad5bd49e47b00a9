"""GPT-2 in PyTorch, and decoding by Hugging Face's transformers, for comparison. Both packages are optional.

The training step uses the fast options of PyTorch 2: bfloat16 autocast, `F.scaled_dot_product_attention`, `torch.compile`,
fused AdamW, and a vocabulary padded to 50,304. Each row has one document. PyTorch chooses the attention kernel (`sdpa`), or
cuDNN is set (`cudnn`).
"""

import contextlib
import functools
import importlib
from time import perf_counter
from typing import Any

import numpy as np
from device_report import Report, Skip, seconds_of
from device_step import GPT2, TINY, Shape, random_ids, speed


def optional(name: str) -> Any:
    """A package, if it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"no {name}: {error}") from error


def device_name(torch: Any) -> str:
    """CUDA, where there is some."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def waiter(torch: Any) -> Any:
    """A function that waits for all that was started."""
    return torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)


# ---- Training --------------------------------------------------------------------------------------------------------


def run_steps(report: Report) -> None:
    """Whole rows, in the order of what a comparison needs most, each with its ratio."""
    for rows in (2,) if report.tiny else (32, 64, 16):
        for attention in ("sdpa", "cudnn"):
            work = functools.partial(measure_step, report, rows, attention)
            report.run(f"torch {attention} {rows}", work, needs=30, rows=rows)
            report.run(f"ratio {attention} {rows}", functools.partial(compare, report, rows, attention), rows=rows)


def compare(report: Report, rows: int, attention: str) -> dict[str, Any]:
    """This project's tokens a second over PyTorch's, for whole rows and for packed ones, of which PyTorch has whole ones."""
    speeds = {line["part"]: line["tokens_per_s"] for line in report.lines("step") if "tokens_per_s" in line}
    theirs = speeds.get(f"torch {attention} {rows}")
    ours = {name: speeds[part] for name in ("whole", "packed") if (part := f"{name} {rows}") in speeds}
    if not ours or not theirs:
        raise Skip("nothing to compare with" if ours else f"no step of {rows} rows")
    return {f"{name}_over_torch": round(value / theirs, 3) for name, value in ours.items()}


def measure_step(report: Report, rows: int, attention: str) -> dict[str, Any]:
    """Time a training step."""
    torch, shape = optional("torch"), TINY if report.tiny else GPT2
    device = device_name(torch)
    if attention == "cudnn" and device == "cpu":
        raise Skip("cuDNN is for GPUs")
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("high")
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, optimizer = make_model(torch, shape, device)
    ids = random_ids(rows * (shape.length + 1), shape.vocab_size).reshape(rows, shape.length + 1)
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (ids[:, :-1], ids[:, 1:]))
    run = model if report.tiny else torch.compile(model, dynamic=False)

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16), choose_attention(attention):
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    start = perf_counter()
    first_loss = float(step().detach())
    first_seconds, wait = perf_counter() - start, waiter(torch)

    def timed() -> Any:
        step()
        return wait

    seconds, rounds = seconds_of(timed, calls=1 if report.tiny else 6)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        **speed(shape, rows, seconds, torch.cuda.get_device_name() if device == "cuda" else device),
        "rounds_ms": [round(1e3 * t, 3) for t in rounds],
        "first_loss": round(first_loss, 4),
        "first_step_s": round(first_seconds, 1),
        "peak_gb": None if peak is None else round(peak / 1e9, 2),
    }


def choose_attention(name: str) -> Any:
    """PyTorch's choice, or cuDNN alone."""
    if name == "sdpa":
        return contextlib.nullcontext()
    attention = importlib.import_module("torch.nn.attention")
    return attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION)


def make_model(torch: Any, shape: Shape, device: str) -> tuple[Any, Any]:
    """The model and its optimizer; parameters are float32, matrices alone decay."""
    model = gpt2_class(torch)(shape).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=device == "cuda")


@functools.cache
def gpt2_class(torch: Any) -> Any:
    """The module's class; a base that may not be installed is named here only."""
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        """Attention and a feed-forward layer, each after its norm."""

        def __init__(self, shape: Shape) -> None:
            super().__init__()
            width, self.heads = shape.width, shape.heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            rows, length, width = x.shape
            parts = self.qkv(self.norm1(x)).split(width, dim=2)
            query, key, value = (p.view(rows, length, self.heads, -1).transpose(1, 2) for p in parts)
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT2(nn.Module):
        """The loss of a batch; the head is the table of tokens."""

        def __init__(self, shape: Shape) -> None:
            super().__init__()
            padded = -(-shape.vocab_size // 128) * 128
            self.tokens, self.positions = nn.Embedding(padded, shape.width), nn.Embedding(shape.length, shape.width)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
            self.norm = nn.LayerNorm(shape.width)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, inputs: Any, targets: Any) -> Any:
            x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.tokens.weight)
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return GPT2


# ---- Decoding --------------------------------------------------------------------------------------------------------


def run_decode(report: Report) -> None:
    """Hugging Face's `generate`, greedy, with its default cache; then the ratios."""
    sizes = (2,) if report.tiny else (1, 8, 64)
    for rows in sizes:
        report.run(f"hugging face {rows}", functools.partial(measure_decode, report, rows), needs=15, rows=rows)
    for rows in sizes:
        report.run(f"ratio {rows}", functools.partial(compare_decode, report, rows), rows=rows)


def compare_decode(report: Report, rows: int) -> dict[str, Any]:
    """This project's tokens a second over Hugging Face's."""
    speeds = {line["part"]: line["tokens_per_s"] for line in report.lines("decode") if "tokens_per_s" in line}
    parts = (f"ours {rows}", f"hugging face {rows}")
    if missing := [part for part in parts if part not in speeds]:
        raise Skip(f"no {missing[0]}")
    return {"ours_over_hugging_face": round(speeds[parts[0]] / speeds[parts[1]], 2)}


@functools.cache
def hugging_face_model(shape: Shape) -> Any:
    """GPT-2 in bfloat16 with random parameters."""
    torch, transformers = optional("torch"), optional("transformers")
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config).to(device_name(torch), torch.bfloat16).eval()


def measure_decode(report: Report, rows: int) -> dict[str, Any]:
    """Tokens a second of reading 32 tokens and generating others."""
    torch, shape, new = optional("torch"), TINY if report.tiny else GPT2, 16 if report.tiny else 256
    model = hugging_face_model(shape)
    prompts = random_ids(rows * 32, shape.vocab_size).reshape(rows, 32)
    tokens, wait = torch.from_numpy(prompts).to(model.device), waiter(torch)

    def generate() -> Any:
        with torch.inference_mode():
            mask = torch.ones_like(tokens)
            out = model.generate(tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        if out.shape[1] != 32 + new:
            raise AssertionError(f"generated {out.shape[1] - 32} tokens, not {new}")
        return wait

    seconds, rounds = seconds_of(generate, calls=1, rounds=2)
    return {"tokens_per_s": round(rows * new / seconds, 1), "rounds_ms": [round(1e3 * t, 1) for t in rounds]}
