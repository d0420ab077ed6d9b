"""PyTorch's attention on the shapes of bench_kernels' decode, a pass for every line on stdin.

    torch_sdpa.py THREADS

Prints "no torch" and ends where there is none; else its version and the variant that was quickest
here; then, for each line it reads, the seconds of one decode step over all layers.

Variants: float32 and bfloat16; keys and values repeated for each query head, as models do for
groups, or the heads of a group passed as so many queries of one kv head, which reads every key once.
"""

import sys
import time

try:
    import torch
except ImportError:
    print("no torch", flush=True)
    sys.exit(0)

LAYERS, TOKENS, KV_HEADS, GROUP, DIM = 8, 4096, 8, 4, 128  # as in bench_kernels.cc
TRIAL_LAYERS = 3  # enough to leave a cache of 32 MiB


def attend(query, key, value):
    functional = torch.nn.functional
    if hasattr(functional, "scaled_dot_product_attention"):
        return functional.scaled_dot_product_attention(query, key, value)
    return functional._scaled_dot_product_attention(query, key, value)  # torch 1.13


def tensors(layers, dtype, grouped):
    heads, queries = (KV_HEADS, GROUP) if grouped else (KV_HEADS * GROUP, 1)
    query = torch.randn(1, heads, queries, DIM).to(dtype)
    shape = (1, heads, TOKENS, DIM)
    return query, [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
                   for _ in range(layers)]


def seconds(query, layers):
    start = time.monotonic()
    for key, value in layers:
        attend(query, key, value)
    return time.monotonic() - start


def trial(dtype, grouped):
    query, layers = tensors(TRIAL_LAYERS, dtype, grouped)
    seconds(query, layers)
    return min(seconds(query, layers) for _ in range(3))


def main():
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(1)
    variants = [(dtype, grouped) for dtype in (torch.float32, torch.bfloat16)
                for grouped in (True, False)]
    with torch.inference_mode():
        dtype, grouped = min(variants, key=lambda variant: trial(*variant))
        query, layers = tensors(LAYERS, dtype, grouped)
        seconds(query, layers)
        print(f"{torch.__version__}, {str(dtype).split('.')[-1]}, "
              f"{'grouped' if grouped else 'repeated'}", flush=True)
        for _ in sys.stdin:
            print(seconds(query, layers), flush=True)


if __name__ == "__main__":
    main()
