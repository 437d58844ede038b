"""Small networks of other libraries with random weights, built from configurations, for ``model_sweep``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Mapping[str, Any] | tuple[Any, ...]]

_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TOKENS = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_SMALL, **_TOKENS, "max_position_embeddings": 64}
_CAUSAL = {**_TEXT, "num_key_value_heads": 2, "use_cache": False}
_PATCHES = {**_SMALL, "image_size": 64, "patch_size": 16}
_WAVE = {
    **{**_SMALL, "vocab_size": 32, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)},
    **{"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}
_SEQ2SEQ = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "use_cache": False},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64},
    **_TOKENS,
}
_TOWERS = {
    "text_config": {**_TEXT, "projection_dim": 32},
    "vision_config": {**_PATCHES, "projection_dim": 32},
    "projection_dim": 32,
}


def _image(size: int = 64) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 200, (1, 16)), "attention_mask": torch.ones(1, 16, dtype=torch.int64)}


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 200, (1, 16))}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 2000)}


def _both() -> dict[str, Tensor]:
    return {**_tokens(), **_image()}


def _video() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 4, 3, 32, 32)}


_Inputs = Callable[[], dict[str, Tensor]]
# Name: model class, configuration options, inputs.
TRANSFORMERS: Mapping[str, tuple[str, Mapping[str, Any], _Inputs]] = {
    # vision
    "resnet": ("ResNetModel", {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2]}, _image),
    "regnet": (
        "RegNetModel",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16},
        _image,
    ),
    "convnext": ("ConvNextModel", {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2}, _image),
    "convnextv2": ("ConvNextV2Model", {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2}, _image),
    "mobilenet_v1": ("MobileNetV1Model", {"depth_multiplier": 0.5, "image_size": 64}, _image),
    "mobilenet_v2": ("MobileNetV2Model", {"depth_multiplier": 0.5, "image_size": 64}, _image),
    "efficientnet": (
        "EfficientNetModel",
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        _image,
    ),
    "bit": ("BitModel", {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 1], "num_groups": 8}, _image),
    "vit": ("ViTModel", _PATCHES, _image),
    "deit": ("DeiTModel", _PATCHES, _image),
    "beit": ("BeitModel", _PATCHES, _image),
    "data2vec_vision": ("Data2VecVisionModel", _PATCHES, _image),
    "dinov2": ("Dinov2Model", {**_PATCHES, "mlp_ratio": 2}, _image),
    "vit_msn": ("ViTMSNModel", _PATCHES, _image),
    "vit_hybrid_yolos": ("YolosModel", {**_PATCHES, "image_size": [64, 64], "num_detection_tokens": 10}, _image),
    "swin": (
        "SwinModel",
        {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _image,
    ),
    "swinv2": (
        "Swinv2Model",
        {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _image,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
            "decoder_hidden_size": 64,
        },
        _image,
    ),
    "pvt": (
        "PvtModel",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
        },
        _image,
    ),
    "pvt_v2": (
        "PvtV2Model",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
        },
        _image,
    ),
    "poolformer": ("PoolFormerModel", {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}, _image),
    "levit": (
        "LevitModel",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        _image,
    ),
    "cvt": ("CvtModel", {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}, _image),
    "mobilevit": (
        "MobileViTModel",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
        _image,
    ),
    "mobilevitv2": ("MobileViTV2Model", {"image_size": 64, "width_multiplier": 0.5}, _image),
    "focalnet": ("FocalNetModel", {"image_size": 64, "embed_dim": 32, "depths": [1, 1, 1, 1]}, _image),
    "hiera": (
        "HieraModel",
        {
            "image_size": [64, 64],
            "embed_dim": 32,
            "depths": [1, 1, 1],
            "num_heads": [1, 2, 4],
            "query_stride": [2, 2],
            "num_query_pool": 2,
            "masked_unit_size": [8, 8],
        },
        _image,
    ),
    "swiftformer": (
        "SwiftFormerModel",
        {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]},
        _image,
    ),
    "dpt": (
        "DPTForDepthEstimation",
        {
            **_PATCHES,
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
            "neck_hidden_sizes": [16, 32, 64, 64],
            "fusion_hidden_size": 32,
            "is_hybrid": False,
        },
        _image,
    ),
    "glpn": (
        "GLPNForDepthEstimation",
        {
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
            "decoder_hidden_size": 32,
        },
        _image,
    ),
    "swin2sr": (
        "Swin2SRForImageSuperResolution",
        {"image_size": 32, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        partial(_image, 32),
    ),
    "vitdet": ("VitDetModel", {**_SMALL, "image_size": 64, "patch_size": 16, "pretrain_image_size": 64}, _image),
    "videomae": ("VideoMAEModel", {**_SMALL, "image_size": 32, "patch_size": 8, "num_frames": 4}, _video),
    "timesformer": ("TimesformerModel", {**_SMALL, "image_size": 32, "patch_size": 8, "num_frames": 4}, _video),
    "detr": (
        "DetrModel",
        {
            **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "num_queries": 8},
            **{
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "decoder_ffn_dim": 128,
                "use_timm_backbone": False,
            },
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 32,
                "hidden_sizes": [32, 64],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            **{"use_pretrained_backbone": False, "backbone": None},
        },
        _image,
    ),
    # text
    "bert": ("BertModel", _TEXT, _tokens),
    "roberta": ("RobertaModel", {**_TEXT, "max_position_embeddings": 66}, _tokens),
    "xlm_roberta": ("XLMRobertaModel", {**_TEXT, "max_position_embeddings": 66}, _tokens),
    "distilbert": ("DistilBertModel", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, **_TOKENS}, _tokens),
    "albert": ("AlbertModel", {**_TEXT, "embedding_size": 32}, _tokens),
    "electra": ("ElectraModel", {**_TEXT, "embedding_size": 32}, _tokens),
    "mpnet": ("MPNetModel", {**_TEXT, "max_position_embeddings": 66}, _tokens),
    "deberta": ("DebertaModel", {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, _tokens),
    "deberta_v2": ("DebertaV2Model", {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, _tokens),
    "convbert": ("ConvBertModel", {**_TEXT, "embedding_size": 64}, _tokens),
    "squeezebert": ("SqueezeBertModel", {**_TEXT, "embedding_size": 64}, _tokens),
    "mobilebert": (
        "MobileBertModel",
        {**_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        _tokens,
    ),
    # with fewer landmarks than tokens it takes no mask in transformers 5.23, but tracing passes one
    "nystromformer": ("NystromformerModel", {**_TEXT, "segment_means_seq_len": 16, "num_landmarks": 16}, _ids),
    "fnet": ("FNetModel", {**_TEXT, "tpu_short_seq_length": 16}, _ids),
    "roformer": ("RoFormerModel", {**_TEXT, "embedding_size": 64}, _tokens),
    "luke": (
        "LukeModel",
        {**_TEXT, "entity_vocab_size": 10, "entity_emb_size": 32, "max_position_embeddings": 66},
        _tokens,
    ),
    "ernie": ("ErnieModel", _TEXT, _tokens),
    "camembert": ("CamembertModel", {**_TEXT, "max_position_embeddings": 66}, _tokens),
    "longformer": ("LongformerModel", {**_TEXT, "attention_window": 8, "max_position_embeddings": 66}, _tokens),
    "funnel": (
        "FunnelModel",
        {"vocab_size": 200, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128},
        _tokens,
    ),
    "modernbert": ("ModernBertModel", _TEXT, _tokens),
    # causal language models
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "use_cache": False, **_TOKENS},
        _tokens,
    ),
    "gpt_neo": (
        "GPTNeoModel",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "use_cache": False,
            **_TOKENS,
        },
        _tokens,
    ),
    "gpt_neox": ("GPTNeoXModel", {**_TEXT, "use_cache": False}, _tokens),
    "gptj": (
        "GPTJModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "use_cache": False, **_TOKENS},
        _tokens,
    ),
    "opt": (
        "OPTModel",
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 64,
            "use_cache": False,
            **_TOKENS,
        },
        _tokens,
    ),
    "bloom": ("BloomModel", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False, **_TOKENS}, _tokens),
    "llama": ("LlamaForCausalLM", _CAUSAL, _tokens),
    "mistral": ("MistralModel", _CAUSAL, _tokens),
    "qwen2": ("Qwen2Model", _CAUSAL, _tokens),
    "qwen3": ("Qwen3Model", {**_CAUSAL, "head_dim": 16}, _tokens),
    "gemma": ("GemmaModel", {**_CAUSAL, "head_dim": 16}, _tokens),
    "gemma2": ("Gemma2Model", {**_CAUSAL, "head_dim": 16}, _tokens),
    "phi": ("PhiModel", _CAUSAL, _tokens),
    "phi3": ("Phi3Model", _CAUSAL, _tokens),
    "stablelm": ("StableLmModel", _CAUSAL, _tokens),
    "falcon": ("FalconModel", {**_TEXT, "use_cache": False}, _tokens),
    "olmo": ("OlmoModel", _CAUSAL, _tokens),
    "mixtral": (
        "MixtralModel",
        {**_CAUSAL, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"},
        _tokens,
    ),
    "mamba": (
        "MambaModel",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False, **_TOKENS},
        _ids,
    ),
    # encoders of sequence-to-sequence models
    "t5": (
        "T5EncoderModel",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "vocab_size": 200,
        },
        _tokens,
    ),
    "bart": ("BartEncoder", _SEQ2SEQ, _tokens),
    "mbart": ("MBartEncoder", _SEQ2SEQ, _tokens),
    "pegasus": ("PegasusEncoder", _SEQ2SEQ, _tokens),
    "m2m_100": ("M2M100Encoder", _SEQ2SEQ, _tokens),
    "whisper": (
        "WhisperEncoder",
        {**_SEQ2SEQ, "max_source_positions": 32, "num_mel_bins": 16},
        lambda: {"input_features": torch.randn(1, 16, 64)},
    ),
    # audio
    "wav2vec2": ("Wav2Vec2Model", _WAVE, _wave),
    "hubert": ("HubertModel", _WAVE, _wave),
    "wavlm": ("WavLMModel", _WAVE, _wave),
    "data2vec_audio": ("Data2VecAudioModel", {**_WAVE, "num_conv_pos_embeddings": 2}, _wave),
    "unispeech": ("UniSpeechModel", _WAVE, _wave),
    "sew": ("SEWModel", {**_WAVE, "squeeze_factor": 2}, _wave),
    "ast": (
        "ASTModel",
        {**_SMALL, "patch_size": 16, "max_length": 64, "num_mel_bins": 32},
        lambda: {"input_values": torch.randn(1, 64, 32)},
    ),
    "encodec": (
        "EncodecModel",
        {
            "num_filters": 8,
            "hidden_size": 32,
            "codebook_dim": 32,
            "codebook_size": 16,
            "upsampling_ratios": [4, 2],
            "target_bandwidths": [24.0],
            "use_causal_conv": True,
            "pad_mode": "constant",
        },
        lambda: {"input_values": torch.randn(1, 1, 800)},
    ),
    # several modalities
    "clip_vision": ("CLIPVisionModel", _PATCHES, _image),
    "clip_text": ("CLIPTextModel", _TEXT, _tokens),
    "clip": ("CLIPModel", _TOWERS, _both),
    "siglip_vision": ("SiglipVisionModel", _PATCHES, _image),
    "siglip": ("SiglipModel", _TOWERS, _both),
    "altclip": ("AltCLIPModel", _TOWERS, _both),
    "vilt": ("ViltModel", {**_TEXT, "image_size": 64, "patch_size": 16}, _both),
    "blip_vision": ("BlipVisionModel", _PATCHES, _image),
    "groupvit": (
        "GroupViTVisionModel",
        {
            "image_size": 64,
            "patch_size": 16,
            "hidden_size": 64,
            "intermediate_size": 128,
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 0],
            "num_attention_heads": 4,
        },
        _image,
    ),
    "owlvit_vision": ("OwlViTVisionModel", _PATCHES, _image),
    "clipseg_vision": ("CLIPSegVisionModel", _PATCHES, _image),
    "visual_bert": (
        "VisualBertModel",
        {**_TEXT, "visual_embedding_dim": 32},
        lambda: {**_tokens(), "visual_embeds": torch.randn(1, 4, 32)},
    ),
}


def transformers() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Yield every entry of the table, whether or not this version of the library has it."""
    for name, (model, options, inputs) in TRANSFORMERS.items():
        yield name, partial(_from_config, model, options, inputs)


def _from_config(model: str, options: Mapping[str, Any], inputs: _Inputs) -> Built:
    library = importlib.import_module("transformers")
    kind = getattr(library, model, None)
    if kind is None:  # the library does not export the names of encoders
        stem = model.removesuffix("Encoder")
        place = f"transformers.models.{_folder(stem)}.modeling_{_folder(stem)}"
        kind = getattr(importlib.import_module(place), model)
    config = kind.config_class(**options)
    return kind(config).eval(), inputs()


def _folder(stem: str) -> str:
    return {"MBart": "mbart", "M2M100": "m2m_100"}.get(stem, stem.lower())


def torchvision() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Yield all classification models of torchvision, if it imports."""
    models = importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        size = 299 if name.startswith("inception") else 224
        yield name, partial(_of_images, models.get_model, name, size)


def timm() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Yield all classification models of timm, if it imports."""
    library = importlib.import_module("timm")
    for name in library.list_models():
        yield name, partial(_from_timm, name)


def _of_images(get: Callable[[str], nn.Module], name: str, size: int) -> Built:
    return get(name), (torch.randn(1, 3, size, size),)


def _from_timm(name: str) -> Built:
    model = importlib.import_module("timm").create_model(name)
    return model, (torch.randn(1, *model.default_cfg["input_size"]),)


ZOOS = {"transformers": transformers, "torchvision": torchvision, "timm": timm}
