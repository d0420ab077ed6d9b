#!/usr/bin/python3
"""Trains the test suite's own language model, a small byte-level Llama, and writes it to austen/.

    tests/model/train.py [--steps N] [--state FILE]

Runs on a GPU if torch finds one, else on the CPU. With --state, training goes on from that file
if it exists and keeps it up to date; batches are drawn from the step's number, so an interrupted
run sees the same text as an uninterrupted one.
"""

import argparse
import math
import os
import pathlib
import time

import torch
from torch.nn import functional

import corpus
import llama
from muon import Muon

FOLDER = pathlib.Path(__file__).resolve().parent / "austen"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SEED = 1775
STEP_TOKENS = 4096
MATRIX_RATE, VECTOR_RATE = 0.016, 2.5e-3
WARMUP_STEPS = 60
DECAY_PART = 0.2  # The last part of all steps, in which the rates fall linearly to zero.
SAMPLE_PROMPTS = ("It was a dark evening, and ", '"My dear Emma," ')
SAMPLE_BYTES, SAMPLE_TEMPERATURE = 400, 0.6
REPORT_EVERY, EVALUATE_EVERY = 25, 200


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--state", type=pathlib.Path, help="checkpoint to go on from")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_text, held_out = (as_tensor(text) for text in corpus.split())
    trainer = Trainer(llama.Model(CONFIG).to(device), arguments.steps)
    if arguments.state and arguments.state.exists():
        trainer.restore(arguments.state)
    print(f"torch {torch.__version__} on {device}: {trainer.parameters:,} parameters, "
          f"{len(train_text):,} bytes to train on, {len(held_out):,} held out", flush=True)

    run(trainer, train_text, held_out, arguments.state)
    llama.save(trainer.model, FOLDER, lambda name: torch.bfloat16)
    describe(llama.load(FOLDER).to(device), train_text[:65536], held_out)


def run(trainer, train_text, held_out, state):
    """Takes the steps that are left, and tells how it goes."""
    began, first, total = time.monotonic(), trainer.step, 0.0
    while trainer.step < trainer.steps:
        total += trainer.advance(train_text)
        step = trainer.step
        if step % REPORT_EVERY == 0:
            speed = (step - first) * STEP_TOKENS / (time.monotonic() - began)
            loss = total / REPORT_EVERY
            print(f"step {step}: {loss:.4f} nats a byte, {speed:.0f} bytes/s", flush=True)
            total = 0.0
            if state:
                trainer.checkpoint(state)
        if step % EVALUATE_EVERY == 0:
            loss = evaluate(trainer.model, held_out[:32768], context=256)
            print(f"step {step}: held-out {loss:.4f} nats a byte at context 256", flush=True)


def describe(model, train_text, held_out):
    """Prints the losses of the weights as written, and what they write."""
    for name, text in (("training", train_text), ("held-out", held_out)):
        loss = evaluate(model, text, CONFIG["max_position_embeddings"])
        bits = loss / math.log(2)
        print(f"{name} loss of the weights written: {loss:.4f} nats, {bits:.4f} bits a byte")
    for prompt in SAMPLE_PROMPTS:
        print(f"\n{sample(model, prompt, SAMPLE_BYTES)}")


class Trainer:
    """The model, its optimizers and the number of steps taken of a schedule of `steps`."""

    def __init__(self, model, steps):
        self.model, self.steps, self.step = model, steps, 0
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        parts = list(model.named_parameters())
        matrices = [parameter for name, parameter in parts if name.endswith("_proj.weight")]
        others = [parameter for name, parameter in parts if not name.endswith("_proj.weight")]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        initialize(model)

    def advance(self, text):
        """Takes one step and returns its loss, in nats a byte."""
        context = context_at(self.step / self.steps)
        inputs, targets = draw(text, context, seed=SEED + self.step)
        # On a CPU, activations of few sequences at a time stay in its caches.
        device = next(self.model.parameters()).device
        rows = len(inputs) if device.type == "cuda" else max(1, 2048 // context)
        loss = 0.0
        for some, wanted in zip(inputs.split(rows), targets.split(rows)):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = self.model(some.to(device))
            part = functional.cross_entropy(logits.flatten(0, 1), wanted.to(device).flatten())
            part = part * len(some) / len(inputs)
            part.backward()
            loss += part.item()
        rate = rate_at(self.step, self.steps)
        self.muon.step(MATRIX_RATE * rate)
        for group in self.adam.param_groups:
            group["lr"] = VECTOR_RATE * rate
        self.adam.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.step += 1
        return loss

    def checkpoint(self, path):
        state = {"step": self.step, "model": self.model.state_dict(),
                 "adam": self.adam.state_dict(), "muon": self.muon.velocity}
        torch.save(state, f"{path}.new")
        os.replace(f"{path}.new", path)

    def restore(self, path):
        state = torch.load(path, map_location=next(self.model.parameters()).device)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.velocity = state["muon"]


def initialize(model):
    """Each layer adds nothing to the residual stream at first: its outputs start at zero."""
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    for name, parameter in model.model.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def rate_at(step, steps):
    """Warm-up, plateau, linear decay; a plateau lets one checkpoint end at any number of steps."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_PART * steps))


def context_at(progress):
    """Long contexts cost more and are needed only to settle the long range."""
    return 256 if progress < 1 - DECAY_PART else 512 if progress < 0.92 else 2048


def draw(text, context, seed):
    """Random stretches of the text, and each byte's successor: two [rows, context]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (STEP_TOKENS // context,), generator=generator)
    rows = torch.stack([text[start : start + context + 1] for start in starts.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def evaluate(model, text, context):
    """Mean loss over the text in stretches of `context`, in nats a byte."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(text) - 1, context):
        row = text[start : start + context + 1].long().to(device)
        logits = model(row[None, :-1])
        total += functional.cross_entropy(logits[0], row[1:], reduction="sum").item()
        count += len(row) - 1
    return total / count


@torch.no_grad()
def sample(model, prompt, length):
    """The prompt and `length` bytes drawn from the model at SAMPLE_TEMPERATURE."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(SEED)
    text = bytearray(prompt.encode())
    for _ in range(length):
        logits = model(torch.tensor([list(text)], device=device))[0, -1].cpu()
        weights = (logits / SAMPLE_TEMPERATURE).softmax(dim=0)
        text.append(torch.multinomial(weights, 1, generator=generator).item())
    return text.decode(errors="replace")


def as_tensor(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


if __name__ == "__main__":
    main()
