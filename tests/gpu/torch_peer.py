"""Times of PyTorch's attention on the shapes of bench.cu: lines "name microseconds".

Its keys and values lie in one piece for each sequence, where ours are read through a block table.
Medians of event times; before each run 256 MiB are read, so level 2 holds none of what is measured, and
nothing that must be written back first. A shape that torch cannot do is left out, and exits with 1.
"""

import statistics
import sys

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RUNS = 21


def tensor(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def microseconds(function):
    flush = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")
    runs = []
    for i in range(-3, RUNS):
        flush.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        if i >= 0:
            runs.append(begin.elapsed_time(end) * 1000)
    return statistics.median(runs)


def attention(sequences, queries, keys, mask):
    q = tensor(sequences, Q_HEADS, queries, HEAD_DIM)
    k = tensor(sequences, KV_HEADS, keys, HEAD_DIM)
    v = tensor(sequences, KV_HEADS, keys, HEAD_DIM)
    return microseconds(
        lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


def decode(sequences, tokens):
    # A group's heads as queries of one kv head: quicker than enable_gqa for a single token.
    group = Q_HEADS // KV_HEADS
    q = tensor(sequences, KV_HEADS, group, HEAD_DIM)
    k = tensor(sequences, KV_HEADS, tokens, HEAD_DIM)
    v = tensor(sequences, KV_HEADS, tokens, HEAD_DIM)
    grouped = microseconds(lambda: scaled_dot_product_attention(q, k, v))
    return min(grouped, attention(sequences, 1, tokens, None))


def report(name, function, *shape):
    try:
        print(name, function(*shape), flush=True)
        return True
    except RuntimeError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return False


def main():
    done = []
    with torch.inference_mode():
        for name, sequences, tokens in [("decode_1x4k", 1, 4096), ("decode_8x4k", 8, 4096),
                                        ("decode_32x4k", 32, 4096), ("decode_8x16k", 8, 16384),
                                        ("decode_8x32k", 8, 32768)]:
            done.append(report(name, decode, sequences, tokens))
        for name, cached, tokens in [("prefill_1k_over_7k", 7168, 1024), ("prefill_8k", 0, 8192)]:
            mask = causal_lower_right(tokens, cached + tokens)
            done.append(report(name, attention, 1, tokens, cached + tokens, mask))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
