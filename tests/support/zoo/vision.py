"""Small vision models of transformers, from their configurations; batch norm in evaluation mode."""

import torch

from zoo.case import make, register, to_ramp
from zoo.language import VOCABULARY, in_float64, pretrained, tokens

TRANSFORMER = dict(
    image_size=8,
    patch_size=4,
    num_channels=3,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
)
LABELS = dict(num_labels=5)


@in_float64
def logits_loss(model, pixels):
    return to_ramp(model(pixel_values=pixels).logits)


def classifier(name, size=8, n=3, **config):
    return make(pretrained(name, **config, **LABELS), logits_loss, torch.randn(n, 3, size, size))


def clip():
    """Both towers and the learned temperature: the images of a batch against five fixed texts."""
    text = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(max_position_embeddings=7, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = pretrained("CLIPModel", text_config=text, vision_config=TRANSFORMER, projection_dim=6)
    texts = tokens(5, 4)
    loss = lambda m, pixels: to_ramp(m(input_ids=texts.to(pixels.device), pixel_values=pixels).logits_per_image)  # noqa: E731
    return make(model, loss, torch.randn(3, 3, 8, 8))


VISION = {
    "vit": lambda: classifier("ViTForImageClassification", **TRANSFORMER),
    "vit_n_equals_t": lambda: classifier("ViTForImageClassification", n=5, **TRANSFORMER),
    "deit_eager": lambda: classifier("DeiTForImageClassification", **TRANSFORMER, attn_implementation="eager"),
    "beit_relative_bias": lambda: classifier(
        "BeitForImageClassification", **TRANSFORMER, use_relative_position_bias=True, layer_scale_init_value=0.5
    ),
    "dinov2": lambda: classifier("Dinov2ForImageClassification", **TRANSFORMER, mlp_ratio=2),
    "swin": lambda: classifier(
        "SwinForImageClassification",
        **dict(image_size=8, patch_size=1, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, mlp_ratio=2),
    ),
    "convnext": lambda: classifier(
        "ConvNextForImageClassification",
        **dict(size=16, num_stages=2, hidden_sizes=[6, 8], depths=[1, 2], layer_scale_init_value=0.5),
    ),
    "convnext_v2": lambda: classifier(
        "ConvNextV2ForImageClassification", size=16, num_stages=2, hidden_sizes=[6, 8], depths=[1, 1]
    ),
    "resnet_basic": lambda: classifier(
        "ResNetForImageClassification",
        **dict(size=12, embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic"),
    ),
    "resnet_bottleneck": lambda: classifier(
        "ResNetForImageClassification",
        **dict(size=12, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"),
    ),
    "mobilenet_v2": lambda: classifier(
        "MobileNetV2ForImageClassification",
        **dict(size=16, image_size=16, depth_multiplier=0.1, depth_divisible_by=4, min_depth=4),
    ),
    "segformer": lambda: classifier(
        "SegformerForImageClassification",
        **dict(size=16, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[6, 8]),
        **dict(patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
        decoder_hidden_size=8,
    ),
    "clip": clip,
}
for _name, _build in VISION.items():
    register(_name, _build)
