"""From text and images to the token sequences that the frozen MLLM reads.

Every use of IOMM is one conversation in the MLLM's own chat template, without a system prompt; the instruction comes
before the image, because the MLLM is causal. Loads tokenizer and image-processor files as InternVL3 repositories have
them, and needs no torchvision (transformers' own InternVLProcessor cannot be built without it).

This file imports transformers alone, because published checkpoints carry a copy of it.
"""

from typing import Any

from transformers import BatchFeature, ProcessorMixin


Conversation = list[dict[str, Any]]


def user_says(*parts: Any) -> Conversation:
    """One user turn made of texts (`str`) and images (anything else), in the order given."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


class IOMMProcessor(ProcessorMixin):
    r"""
    Builds the inputs of [`IOMMConditionEncoder`]. Five methods give a conversation for each use; [`~IOMMProcessor.encode`]
    turns a batch of them, mixed as you like, into tensors.

    Args:
        image_processor (`GotOcr2ImageProcessorPil`): Resizes an image to the one view that the MLLM reads.
        tokenizer (`PreTrainedTokenizerBase`): The MLLM's tokenizer, with InternVL's image tokens.
        image_seq_length (`int`, *optional*, defaults to 256): Image tokens of a view.
        text_template (`str`, *optional*): The wording around a caption; `{}` stands for it.
        unconditional_prompt (`str`, *optional*): What condition dropout and guidance put in place of an input.
        image_only_prompt (`str`, *optional*): The paper's fixed instruction `c_aux`, before the image.
        edit_template (`str`, *optional*): The wording around an editing instruction, before the reference image.
        chat_template (`str`, *optional*): The MLLM's chat template.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_processor
    >>> processor = tiny_processor()
    >>> batch = processor.encode([processor.text_to_image("a red circle"), processor.unconditional()])
    >>> sorted(batch.keys())
    ['attention_mask', 'input_ids']
    ```
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 256,
        text_template: str = "Generate an image: {}",
        unconditional_prompt: str = "Generate an image.",
        image_only_prompt: str = "Generate an image that is identical to the reference image:",
        edit_template: str = "Generate an image based on the reference image: {}",
        chat_template: str | None = None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        for name, template in (("text_template", text_template), ("edit_template", edit_template)):
            if template.count("{}") != 1:
                raise ValueError(f"{name} must hold '{{}}' once, in place of the user's text, got {template!r}.")
        self.image_seq_length = image_seq_length
        self.text_template = text_template
        self.unconditional_prompt = unconditional_prompt
        self.image_only_prompt = image_only_prompt
        self.edit_template = edit_template
        missing = {"start_image_token", "end_image_token", "context_image_token"} - set(tokenizer.special_tokens_map)
        if missing:
            raise ValueError(f"The tokenizer lacks InternVL's {sorted(missing)}; load it from an InternVL repository.")
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token

    def image_only(self, *images) -> Conversation:
        """Stage 1, and variations: the fixed instruction and the image itself, or several to vary together."""
        return user_says(self.image_only_prompt, *images)

    def text_to_image(self, caption: str) -> Conversation:
        """A caption to draw."""
        return user_says(self.text_template.replace("{}", caption))

    def edit(self, instruction: str, *images) -> Conversation:
        """An instruction, then the reference image or images that it speaks of."""
        return user_says(self.edit_template.replace("{}", instruction), *images)

    def unconditional(self) -> Conversation:
        """The other branch of classifier-free guidance."""
        return user_says(self.unconditional_prompt)

    def understand(self, question: str, *images) -> Conversation:
        """A question about an image, images first, as the MLLM itself was trained."""
        return user_says(*images, question)

    def encode(self, conversations: list[Conversation], see: bool = True) -> BatchFeature:
        r"""
        Tokenizes a batch of conversations, padded on the left. Special tokens that a user's text happens to contain are
        read as plain text.

        Args:
            conversations (`list`): From the methods above.
            see (`bool`, *optional*, defaults to `True`): Whether to make `pixel_values` of the images. Without, they only
                take their places, whatever they show, as where their vision tokens are known.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` of shape `(batch_size, length)` and, where there are
            images, `pixel_values` of shape `(num_images, 3, height, width)`.

        Raises:
            `ValueError`: an empty batch.
        """
        if not conversations:
            raise ValueError("encode() got no conversations.")
        untouched = {} if see else {"do_resize": False, "do_rescale": False, "do_normalize": False}
        batch = self.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
            # One view, whatever the repository says: its tokens are the patches that the method masks.
            processor_kwargs={"padding": True, "padding_side": "left", "crop_to_patches": False} | untouched,
        )
        if not see:
            batch.pop("pixel_values", None)
        return batch

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return f"{self.start_image_token}{self.image_token * self.image_seq_length}{self.end_image_token}"

    @property
    def image_token_ids(self) -> list[int]:
        names = (self.image_token, self.start_image_token, self.end_image_token)
        return self.tokenizer.convert_tokens_to_ids(list(names))

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_patches"]


__all__ = ["IOMMProcessor"]
