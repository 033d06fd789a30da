"""The embedded tiny model: seeded random weights and a tokenizer of its own.

Nothing is downloaded. The tokenizer is a byte-level BPE trained on the Python
standard library's own text; the weights are normal with standard deviation 0.05
(``lm_head`` 0.15, untied), which gives varied greedy output with a wide gap
between the two best tokens: SGLang's own ``load_format=dummy`` repeats one token
and so would hide errors.

``python -m eval.tiny_model`` prints the model's folder as its last line.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"
RECIPE = 1  # part of the folder's name: raise it when the output changes
VOCAB_SIZE = 2048
END_TOKEN = "<|end|>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}" + ASSISTANT_TOKEN + "{% else %}"
    "" + USER_TOKEN + "{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT_TOKEN + "{% endif %}"
)
# Enough English and code for a small vocabulary; present in every CPython.
TRAINING_MODULES = ("argparse", "ast", "datetime", "decimal", "inspect", "logging", "mailbox",
                    "pickle", "socket", "statistics", "subprocess", "tarfile", "threading",
                    "typing", "unittest.mock", "zipfile")  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    """What identifies a tiny model; equal values give equal files on one Python."""

    style: str = "llama"  # llama, qwen2 or qwen3
    layers: int = 8
    hidden_size: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 65536
    seed: int = 0

    def folder(self) -> Path:
        key = json.dumps([RECIPE, VOCAB_SIZE, asdict(self)], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        return CACHE / f"{self.style}-{self.layers}l-{digest}"


def build(model: TinyModel, weights: bool = True) -> Path:
    """Write the model unless it is there already; returns its folder.

    Without ``weights`` it is for a server that makes its own (``--load-format dummy``).
    """
    target = model.folder() if weights else model.folder().with_suffix(".dummy")
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_tokenizer(partial, model)
        (partial / "config.json").write_text(json.dumps(_config(model), indent=1))
        if weights:
            _write_weights(partial, model)
        partial.chmod(0o755)  # readable for the user of an image too
        for file in partial.iterdir():
            file.chmod(0o644)
        os.rename(partial, target)
    except OSError:
        if not target.is_dir():  # not lost to a twin that built the same model
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _config(model: TinyModel) -> dict[str, object]:
    architecture = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }[model.style]
    return {
        "architectures": [architecture],
        "model_type": model.style,
        "hidden_size": model.hidden_size,
        "intermediate_size": 2 * model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def _write_tokenizer(folder: Path, model: TinyModel) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_TOKEN, USER_TOKEN, ASSISTANT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_source_of, TRAINING_MODULES), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END_TOKEN,
                "pad_token": END_TOKEN,
                "model_max_length": model.context,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=1,
        )
    )


def _source_of(module: str) -> str:
    """Whether it is a file or, from another version of Python on, a folder."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _write_weights(folder: Path, model: TinyModel) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(model.seed)

    def normal(*shape: int, std: float = 0.05) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    hidden, inner = model.hidden_size, 2 * model.hidden_size
    widths = {
        "q_proj": model.heads * model.head_dim,
        "k_proj": model.kv_heads * model.head_dim,
        "v_proj": model.kv_heads * model.head_dim,
    }
    tensors = {
        "model.embed_tokens.weight": normal(VOCAB_SIZE, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(VOCAB_SIZE, hidden, std=0.15),
    }
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        for name, width in widths.items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = normal(width, hidden)
            if model.style == "qwen2":
                tensors[f"{prefix}.self_attn.{name}.bias"] = normal(width)
        if model.style == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{prefix}.self_attn.{name}.weight"] = torch.ones(model.head_dim)
        tensors |= {
            f"{prefix}.self_attn.o_proj.weight": normal(hidden, widths["q_proj"]),
            f"{prefix}.mlp.gate_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": normal(hidden, inner),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--style", choices=["llama", "qwen2", "qwen3"], default=TinyModel.style)
    parser.add_argument("--layers", type=int, default=TinyModel.layers)
    args = parser.parse_args()
    print(build(TinyModel(style=args.style, layers=args.layers)))


if __name__ == "__main__":
    main()
