"""Which models are refused, by what their configuration and their layers say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from servers import run_python

from eval.tiny_model import TinyModel, build
from orbitflow_sglang.config import ConfigError


def model_config(**changed: Any) -> SimpleNamespace:
    """What ``check_model`` looks at, of a plain decoder."""
    from sglang.srt.configs.model_config import AttentionArch
    from transformers import LlamaConfig

    plain = LlamaConfig(architectures=["LlamaForCausalLM"])
    fine: dict[str, Any] = {
        "model_path": "/models/x",
        "attention_arch": AttentionArch.MHA,
        "hf_config": plain,
        "hf_text_config": plain,
        "is_hybrid_swa": False,
        "is_encoder_decoder": False,
        "is_multimodal": False,
        "is_generation": True,
        "head_dim": 64,
        "v_head_dim": 64,
        "is_draft_model": False,
        "linear_attn_registry_result": None,
    }
    return SimpleNamespace(**{**fine, **changed})


def test_a_plain_decoder_is_accepted(compat: ModuleType) -> None:
    compat.check_model(model_config())
    compat.check_model(model_config(hf_text_config=SimpleNamespace(layer_types=None)))
    compat.check_model(model_config(hf_text_config=SimpleNamespace()))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("multi-head latent attention", {"attention_arch": "MLA"}),
        ("state-space or linear-attention layers", {"attention_arch": "SSM"}),
        ("sliding-window attention", {"is_hybrid_swa": True}),
        (
            "sliding-window attention",
            {
                "hf_text_config": SimpleNamespace(
                    layer_types=["full_attention", "sliding_attention"]
                )
            },
        ),
        (
            "a cap on attention logits",
            {"hf_text_config": SimpleNamespace(attn_logit_softcapping=50.0)},
        ),
        ("an encoder and a decoder", {"is_encoder_decoder": True}),
        ("multimodal input", {"is_multimodal": True}),
        ("no text generation", {"is_generation": False}),
        ("values of another width than keys", {"v_head_dim": 32}),
    ],
)
def test_a_model_of_another_kind_is_refused_with_its_kind(
    compat: ModuleType, kind: str, changed: dict[str, Any]
) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    if arch := changed.get("attention_arch"):
        changed = {"attention_arch": AttentionArch[arch]}
    with pytest.raises(ConfigError) as caught:
        compat.check_model(model_config(**changed))
    assert str(caught.value) == (
        f"--enable-orbitflow does not support --model-path /models/x: it has {kind}, and only "
        "plain multi-head or grouped-query decoders are supported. "
        "Serve it without --enable-orbitflow"
    )


COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
REAL_CONFIGS: dict[str, dict[str, Any]] = {
    "multi-head latent attention": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    # SGLang gives this one its plain pool: only the layers say that there is a window.
    "sliding-window attention": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 16,
    },
    "state-space or linear-attention layers": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "head_dim": 16,
    },
}
MODEL_CONFIG = """
import sys
from sglang.srt.configs.model_config import ModelConfig
from orbitflow_sglang.engine.compat import check_model
for folder in sys.argv[1:]:
    try:
        check_model(ModelConfig(folder))
        print("RESULT accepted")
    except ValueError as error:
        print("RESULT", error)
"""


def test_real_configurations_are_told_apart(model: Path, tmp_path: Path) -> None:
    folders = []
    for i, fields in enumerate(REAL_CONFIGS.values()):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(COMMON | fields))
        folders.append(str(folder))
    plain = [str(build(TinyModel(style))) for style in ("qwen2", "qwen3")]
    run = run_python("-c", MODEL_CONFIG, *folders, str(model), *plain)
    results = re.findall(r"^RESULT (.*)$", run.stdout, re.MULTILINE)
    assert len(results) == len(folders) + 3, run.stderr[-4000:]
    for kind, result in zip(REAL_CONFIGS, results, strict=False):
        assert f"it has {kind}, and only plain" in result
    assert results[len(folders) :] == ["accepted"] * 3


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [({"sliding_window_size": 128}, "a sliding window"), ({"logit_cap": 30.0}, "a cap on logits")],
)
def test_a_loaded_model_whose_attention_is_not_plain_is_refused(
    compat: ModuleType, wrong: dict[str, Any], kind: str
) -> None:
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention

    def model(**more: Any) -> torch.nn.Module:
        attention = [
            RadixAttention(4, 64, 0.125, num_kv_heads=2, layer_id=i, **(more if i else {}))
            for i in range(2)
        ]
        return torch.nn.ModuleList(attention)

    compat.check_layers(model())
    with pytest.raises(ConfigError, match=f"its attention has {kind}. Serve it without"):
        compat.check_layers(model(**wrong))
