"""A decoder of the Llama family in plain torch, with Hugging Face's names for its configuration
and weights: RMSNorm, rotary embedding by halves, grouped-query attention, SwiGLU.

It serves as `LlamaForCausalLM`, with the `llama3` scaling of rotary frequencies or without, and as
`Qwen2ForCausalLM`, whose q, k and v projections have biases. It keeps no K/V: every forward pass
computes the whole sequence, so an engine that caches can be held to it.
"""

import json
import math
import pathlib

import torch
from torch import nn
from torch.nn import functional

import tensor_file


class Model(nn.Module):
    """Logits, float32 [batch, tokens, vocab_size], of token ids [batch, tokens]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config["tie_word_embeddings"]:
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, tokens):
        tied = self.config["tie_word_embeddings"]
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return functional.linear(self.model(tokens), head).float()


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])
        self.frequencies = rope_frequencies(config)

    def forward(self, tokens):
        hidden = self.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=hidden.device, dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies.to(hidden.device))
        rope = torch.cat([angles, angles], dim=-1)
        rope = (rope.cos(), rope.sin())
        for layer in self.layers:
            hidden = layer(hidden, rope)
        return self.norm(hidden)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, hidden, rope):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.head_dim = config["hidden_size"], head_dim(config)
        q_width = config["num_attention_heads"] * self.head_dim
        kv_width = config["num_key_value_heads"] * self.head_dim
        biased = config["model_type"] == "qwen2"
        self.q_proj = nn.Linear(width, q_width, bias=biased)
        self.k_proj = nn.Linear(width, kv_width, bias=biased)
        self.v_proj = nn.Linear(width, kv_width, bias=biased)
        self.o_proj = nn.Linear(q_width, width, bias=False)

    def forward(self, hidden, rope):
        q = rotate(self._heads(self.q_proj(hidden)), rope)
        k = rotate(self._heads(self.k_proj(hidden)), rope)
        v = self._heads(self.v_proj(hidden))
        # Query head h reads K/V head h // group.
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, projected):
        """[batch, tokens, heads * head_dim] as [batch, heads, tokens, head_dim]."""
        return projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden):
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class RmsNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden):
        scale = hidden.float().square().mean(-1, keepdim=True).add(self.epsilon).rsqrt()
        return hidden * scale.to(hidden.dtype) * self.weight.to(hidden.dtype)


def attend(q, k, v):
    """Causal softmax(q k / sqrt(head_dim)) v, all [batch, heads, tokens, head_dim]."""
    if hasattr(functional, "scaled_dot_product_attention"):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    # torch 1.13 has no fused form. 256 queries at a time keep the scores small enough for malloc
    # to reuse their memory, and skip most of the keys that lie in the future.
    parts = []
    for start in range(0, q.shape[2], 256):
        queries = q[:, :, start : start + 256]
        end = start + queries.shape[2]
        scores = queries @ k[:, :, :end].transpose(2, 3) / math.sqrt(q.shape[3])
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(start + 1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1).to(v.dtype)
        parts.append(weights @ v[:, :, :end])
    return torch.cat(parts, dim=2)


def rotate(x, rope):
    """Turns element i and element i + head_dim / 2 by the angle of their frequency."""
    cos, sin = (part.to(x.dtype) for part in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_frequencies(config):
    """Radians a token, [head_dim / 2]; with Llama 3's scaling if the configuration asks for it.

    Frequencies that turn more than `high_freq_factor` times within the original context stay,
    those below `low_freq_factor` are divided by `factor`, and between them both are blended.
    """
    width = head_dim(config)
    plain = config["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain
    assert scaling["rope_type"] == "llama3", scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling["factor"]


def save(model, folder, dtype_of):
    """Writes config.json and model.safetensors; `dtype_of` maps a weight's name to its dtype."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(dtype_of(name)) for name, tensor in model.state_dict().items()}
    tensor_file.write(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def load(folder):
    """The model of a folder, its weights widened to float32."""
    folder = pathlib.Path(folder)
    model = Model(json.loads((folder / "config.json").read_text()))
    weights = tensor_file.read(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()
