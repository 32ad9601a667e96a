"""The special tokens that a tokenizer must have: those of Qwen's VL family, under names that say what each is for."""

END_OF_TEXT = "<|endoftext|>"
MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
"""Qwen's special tokens that the pipeline needs, in Qwen's order."""
