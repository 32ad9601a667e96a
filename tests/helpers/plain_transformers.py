"""What a user of an exported folder does: transformers and nothing of this project. Started by test_export.py.

    python -I plain_transformers.py IMAGE QUESTION TOKENS FOLDER [FOLDER ...]

Answers the question about the image greedily, at most TOKENS tokens, in each folder's own dtype. Writes
FOLDER/answer.json (prompt_ids, text) and FOLDER/answer.tensors (logits of the prompt, f32[S, V], as safetensors).
"""

import json
import sys

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

image_path, question, tokens, *folders = sys.argv[1:]
torch.set_num_threads(1)
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # AutoProcessor would do both, but its video half needs torchvision.
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[Image.open(image_path)], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    cells = int(images["image_grid_thw"].prod()) // 4
    ids = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * cells), return_tensors="pt").input_ids
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long(),
        "pixel_values": images["pixel_values"].to(model.dtype),
        "image_grid_thw": images["image_grid_thw"],
    }
    with torch.no_grad():
        logits = model(**inputs).logits[0].float()
        answer = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)[0, ids.shape[1] :]
    with open(f"{folder}/answer.json", "w") as file:
        json.dump({"prompt_ids": ids[0].tolist(), "text": tokenizer.decode(answer, skip_special_tokens=True)}, file)
    save_file({"logits": logits.contiguous()}, f"{folder}/answer.tensors")
assert "pipeline" not in sys.modules
