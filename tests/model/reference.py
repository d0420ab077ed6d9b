#!/usr/bin/python3
"""Writes and checks what the engine must compute: logits and greedy continuations.

    tests/model/reference.py           computes every model's reference.json again
    tests/model/reference.py --check   compares instead; exit code 1 if a file disagrees
    tests/model/reference.py --tiny    makes the two small random models anew first

Everything is float32 arithmetic on the weights of the files. reference.json holds

    bf16_difference  the largest difference of any logit below when the pass runs in bfloat16
    cases            a list of
      name           what the prompt is
      tokens         the prompt, a byte each
      rows           the positions whose logits follow, ascending
      logits         for each of them the logits of the next token, [vocab_size]
      continuation   the greedy continuation of the prompt; empty if none was computed
      margins        for each of its tokens, by how much its logit exceeds the second best
"""

import argparse
import json
import pathlib
import re
import sys

import torch

import corpus
import llama

FOLDER = pathlib.Path(__file__).resolve().parent
DEMO = FOLDER.parents[1] / "deploy" / "demo_document.txt"
# How the demo goes on after its document; the model finishes the sentence.
QUESTIONS = ('\n"I hope', '\n"And what', '\n"My dear Lizzy," said her father, "')
TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY_MODELS = {
    # Biases on q, k and v; tied embeddings; one K/V head.
    "tiny_qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        **TINY,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    # Scaled rotary frequencies, of which some are kept, some blended and some divided; an output
    # matrix of its own; heads wider than hidden_size / heads; F16 and F32 in one file.
    "tiny_llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        **TINY,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
}
DTYPES = {
    "tiny_qwen2": lambda name: torch.bfloat16,
    "tiny_llama3": lambda name: torch.float32 if re.search("embed|norm", name) else torch.float16,
}
CONTINUATION_TOKENS, DEMO_TOKENS = 48, 64
ROWS = 4  # The last rows of a prompt are kept.
CHECK_TOLERANCE = 2e-3  # Between two machines' float32 sums; a wrong formula is off by far more.


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.tiny:
        make_tiny_models()
    failures = 0
    for name in ("austen", *TINY_MODELS):
        path = FOLDER / name / "reference.json"
        if arguments.check:
            difference = check(llama.load(path.parent), json.loads(path.read_text()))
            failures += difference > CHECK_TOLERANCE
            print(f"{name}: largest difference {difference:.1e}, allowed {CHECK_TOLERANCE:.0e}")
        else:
            prompts = austen_prompts() if name == "austen" else tiny_prompts()
            write(path, compute(llama.load(path.parent), prompts))
    sys.exit(failures > 0)


def austen_prompts():
    """(name, prompt, length of the continuation): held-out text, then the demo's questions."""
    _, text = corpus.split()
    for start, tokens in ((0, 1), (0, 16), (3000, 65), (40000, 300), (80000, 1000)):
        yield f"{tokens} bytes of held-out text", text[start : start + tokens], CONTINUATION_TOKENS
    yield "2048 bytes of held-out text", text[120000:122048], 0
    for question in QUESTIONS:
        prompt = DEMO.read_bytes() + question.encode()
        yield f"the demo's document and {question.strip()}", prompt, DEMO_TOKENS


def tiny_prompts():
    generator = torch.Generator().manual_seed(3)
    for tokens in (1, 33, 200):
        prompt = torch.randint(256, (tokens,), generator=generator)
        yield f"{tokens} random bytes", bytes(prompt.tolist()), 16


def compute(model, prompts):
    cases, bf16_difference = [], 0.0
    for name, prompt, length in prompts:
        tokens = list(prompt)
        logits = last_logits(model, tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = last_logits(model, tokens)
        bf16_difference = max(bf16_difference, (rough - logits).abs().max().item())
        continuation, margins = continue_greedily(model, tokens, length)
        rows = list(range(len(tokens) - len(logits), len(tokens)))
        rounded = [[round(value, 4) for value in row] for row in logits.tolist()]
        cases.append({"name": name, "tokens": tokens, "rows": rows, "logits": rounded,
                      "continuation": continuation, "margins": margins})
    return {"bf16_difference": round(bf16_difference, 4), "cases": cases}


@torch.no_grad()
def check(model, reference):
    """The largest difference of a logit; infinite if a continuation differs."""
    difference = 0.0
    for case in reference["cases"]:
        # One pass over prompt and continuation: each token of it must be the best at its place.
        tokens, continuation = case["tokens"], case["continuation"]
        logits = model(torch.tensor([tokens + continuation]))[0]
        wanted = torch.tensor(case["logits"])
        difference = max(difference, (logits[case["rows"]] - wanted).abs().max().item())
        for i, (token, margin) in enumerate(zip(continuation, case["margins"])):
            best = logits[len(tokens) - 1 + i].argmax().item()
            if token != best and margin > CHECK_TOLERANCE:
                return float("inf")
    return difference


@torch.no_grad()
def last_logits(model, tokens):
    """[min(ROWS, tokens), vocab_size]"""
    return model(torch.tensor([tokens]))[0, -ROWS:].float()


def continue_greedily(model, tokens, length):
    """(the most likely next tokens, by how much each beats the second best)"""
    continuation, margins = [], []
    for _ in range(length):
        best = last_logits(model, tokens + continuation)[-1].topk(2)
        continuation.append(best.indices[0].item())
        margins.append(round((best.values[0] - best.values[1]).item(), 4))
    return continuation, margins


def make_tiny_models():
    for seed, (name, config) in enumerate(TINY_MODELS.items()):
        torch.manual_seed(seed)
        model = llama.Model(config)
        for part, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter)
            if "norm" in part:
                parameter.data = 1 + 0.2 * parameter.data
            elif "embed" in part:
                parameter.data *= 0.25  # Small, so that what the layers add decides.
            elif parameter.dim() == 2:
                parameter.data *= 1.5 * parameter.shape[1] ** -0.5
        llama.save(model, FOLDER / name, DTYPES[name])


def write(path, reference):
    """One case a line, to keep the file's changes readable."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in reference["cases"])
    difference = reference["bf16_difference"]
    path.write_text(f'{{"bf16_difference":{difference},"cases":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
