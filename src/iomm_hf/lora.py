"""LoRA for the pipeline: small matrices beside its weights that change how it draws, kept in a safetensors file of their own.

Reading and writing that file lives here; several at once, scales, fusing and unloading are diffusers' own (`LoraBaseMixin`).
Keys of the generator begin with `transformer.`, those of adapter and connector with `text_encoder.`; the frozen MLLM has
none, so it answers as before whatever is loaded.

This file imports diffusers and, when a LoRA is used, peft alone, because published checkpoints carry a copy of it.
"""

import os
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import (  # the parts that diffusers' own pipelines build their loaders of
    LORA_WEIGHT_NAME_SAFE,
    LoraBaseMixin,
    _fetch_state_dict,
    _load_lora_into_text_encoder,
)
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import unscale_lora_layers


# What a LoRA may change; the MLLM inside `text_encoder` is not among it.
KEY_PREFIXES = ("transformer.", "text_encoder.adapter.", "text_encoder.connector.")


class IOMMLoraLoaderMixin(LoraBaseMixin):
    r"""
    Gives [`IOMMPipeline`] its LoRA methods. Inherited as they are: `set_adapters`, `get_active_adapters`,
    `get_list_adapters`, `delete_adapters`, `disable_lora`, `enable_lora`, `unload_lora_weights`, `set_lora_device`.

    Example:

    ```python
    >>> from tempfile import TemporaryDirectory
    >>> from peft import LoraConfig
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> pipe = tiny_pipeline()
    >>> pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]), "style")
    >>> with TemporaryDirectory() as folder:
    ...     pipe.save_lora_weights(folder, **pipe.lora_layers("style"))
    ...     pipe.load_lora_weights(folder, adapter_name="copy")
    >>> pipe.set_adapters(["style", "copy"], [0.5, 0.5])
    >>> pipe.get_active_adapters()
    ['style', 'copy']
    >>> pipe.unload_lora_weights()
    ```
    """

    _lora_loadable_modules = ["transformer", "text_encoder"]

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        proxies: dict[str, str] | None = None,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        r"""
        The weights of a LoRA file.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): A Hub id, a folder, a file, or weights.
            weight_name (`str`, *optional*): The file in that repository or folder. Defaults to
                `pytorch_lora_weights.safetensors`.
            return_lora_metadata (`bool`, *optional*, defaults to `False`): Also returns what the file says of ranks and
                targets, or `None`.
            cache_dir, force_download, proxies, local_files_only, token, revision, subfolder: As everywhere on the Hub.

        Returns:
            `dict[str, torch.Tensor]`, or a tuple of it and the metadata.

        Raises:
            `OSError`: no such file.
            `ValueError`: it is no safetensors file, or holds something else than a LoRA of this pipeline.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            if weight_name is None and not Path(source).is_file():
                weight_name = LORA_WEIGHT_NAME_SAFE
            if not str(weight_name or source).endswith(".safetensors"):
                raise ValueError(f"LoRAs are read from safetensors files alone, got {str(weight_name or source)!r}.")
        state_dict, metadata = _fetch_state_dict(
            source,
            weight_name=weight_name,
            use_safetensors=True,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
            proxies=proxies,
            token=token,
            revision=revision,
            subfolder=subfolder,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
        )
        foreign = [key for key in state_dict if not key.startswith(KEY_PREFIXES) or ".lora_" not in key]
        if foreign or not state_dict:
            raise ValueError(
                f"This is no LoRA of an IOMM pipeline: its keys begin with {', '.join(KEY_PREFIXES)} and contain"
                f" `.lora_`, but {foreign[:3] or 'there are none'} here. LoRAs of other programs must be converted first."
            )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ):
        r"""
        Loads a LoRA beside those that are there already, and makes it the only active one; [`set_adapters`] mixes several.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): A Hub id, a folder, a file, or weights.
            adapter_name (`str`, *optional*): Its name here. Defaults to the first free one of `default_0`, `default_1`, ...
            hotswap (`bool`, *optional*, defaults to `False`): Puts it in the place of `adapter_name`, which spares a
                compiled generator another compilation. Not for LoRAs of adapter or connector.
            kwargs: See [`lora_state_dict`].

        Raises:
            `ImportError`: peft is missing.
            `OSError`: no such file.
            `ValueError`: the name is taken, or the file holds no LoRA that fits this pipeline.
        """
        if not USE_PEFT_BACKEND:
            raise ImportError("LoRAs need peft. Install it with `pip install peft`.")
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        taken = {name for names in self.get_list_adapters().values() for name in names}
        if adapter_name is None:
            adapter_name = next(name for name in map("default_{}".format, count()) if name not in taken)
        elif adapter_name in taken and not hotswap:
            raise ValueError(f"The name {adapter_name!r} is taken; those in use are {sorted(taken)}.")

        from peft.tuners.tuners_utils import BaseTunerLayer

        models = [
            model for model in (getattr(self, name) for name in self._lora_loadable_modules) if model is not None
        ]
        layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        active = [(layer, list(layer.active_adapters)) for layer in layers]
        try:
            self._load_into_parts(state_dict, metadata, adapter_name, hotswap)
            # Otherwise a part that this LoRA leaves alone would keep another one active.
            self.set_adapters([adapter_name])
        except (RuntimeError, ValueError, KeyError) as error:  # of peft and torch, for other widths and layers
            if adapter_name not in taken:
                self.delete_adapters([adapter_name])  # what is there of it is half random
                for layer, names in active:
                    layer.set_adapter(names)
            raise ValueError(f"This LoRA does not fit the pipeline and was not loaded: {error}") from error

    def _load_into_parts(self, state_dict: dict[str, torch.Tensor], metadata: Any, adapter_name: str, hotswap: bool):
        for component in self._lora_loadable_modules:
            prefix = f"{component}."
            if not any(key.startswith(prefix) for key in state_dict):
                continue
            model = getattr(self, component)
            if model is None:
                raise ValueError(f"This LoRA changes the {component}, but the pipeline has none.")
            if component == "text_encoder":
                _load_lora_into_text_encoder(
                    state_dict,
                    network_alphas=None,
                    text_encoder=model,
                    adapter_name=adapter_name,
                    _pipeline=self,
                    hotswap=hotswap,
                    metadata=metadata,
                )
            else:
                model.load_lora_adapter(
                    state_dict,
                    prefix=component,
                    hotswap=hotswap,
                    adapter_name=adapter_name,
                    metadata=metadata,
                    low_cpu_mem_usage=not hotswap,  # does not draw weights, from the global generator, to throw them away
                    _pipeline=self,
                )

    def lora_layers(self, adapter_name: str = "default") -> dict[str, Any]:
        r"""
        What [`save_lora_weights`] writes of a LoRA that is loaded or being trained.

        Args:
            adapter_name (`str`, *optional*, defaults to `"default"`): Which.

        Returns:
            `dict`, the arguments of [`save_lora_weights`] beside the folder.

        Raises:
            `ValueError`: no LoRA of that name.
        """
        from peft import get_peft_model_state_dict

        layers: dict[str, Any] = {}
        loaded = self.get_list_adapters()
        for component, names in loaded.items():
            if adapter_name not in names:
                continue
            model = getattr(self, component)
            config = model.peft_config[adapter_name].to_dict()
            # Sets have another order in every process, and a path on this machine is nobody's business.
            config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
            layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name=adapter_name)
            layers[f"{component}_lora_adapter_metadata"] = config | {"base_model_name_or_path": None}
        if not layers:
            raise ValueError(f"There is no LoRA named {adapter_name!r}; loaded are {loaded}.")
        return layers

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        text_encoder_lora_layers: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
    ):
        r"""
        Writes a LoRA, and nothing else, to a safetensors file.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            transformer_lora_layers (`dict[str, torch.Tensor]`, *optional*): The generator's, from [`lora_layers`] or from
                peft's `get_peft_model_state_dict`.
            text_encoder_lora_layers (`dict[str, torch.Tensor]`, *optional*): Those of adapter and connector.
            is_main_process (`bool`, *optional*, defaults to `True`): `False` on other ranks, which write nothing.
            weight_name (`str`, *optional*): The file. Defaults to `pytorch_lora_weights.safetensors`.
            transformer_lora_adapter_metadata, text_encoder_lora_adapter_metadata (`dict`, *optional*): peft's settings;
                without them loading takes alpha for the rank.

        Raises:
            `ValueError`: no layers were given.
        """
        layers = {"transformer": transformer_lora_layers, "text_encoder": text_encoder_lora_layers}
        metadata = {
            "transformer": transformer_lora_adapter_metadata,
            "text_encoder": text_encoder_lora_adapter_metadata,
        }
        given = {component: weights for component, weights in layers.items() if weights}
        if not given:
            raise ValueError("Give `transformer_lora_layers` or `text_encoder_lora_layers`; there is nothing to save.")
        if is_main_process:
            cls._save_lora_weights(
                save_directory, given, {component: metadata[component] for component in given}, weight_name=weight_name
            )

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ):
        r"""
        Adds LoRAs to the weights themselves, so that drawing costs what it cost without; [`unload_lora_weights`] then frees
        their memory.

        Args:
            components (`list[str]`, *optional*): Parts to fuse. Defaults to all, `["transformer", "text_encoder"]`.
            lora_scale (`float`, *optional*, defaults to 1.0): Multiplies the scales of [`set_adapters`].
            safe_fusing (`bool`, *optional*, defaults to `False`): Refuses weights that would not be finite.
            adapter_names (`list[str]`, *optional*): Which LoRAs. Defaults to the active ones.

        Raises:
            `ValueError`: an unknown part, or weights that are not finite.
        """
        components = components or self._lora_loadable_modules
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names)
        self._fused_scales = getattr(self, "_fused_scales", {}) | dict.fromkeys(components, lora_scale)

    def unfuse_lora(self, components: list[str] | None = None):
        r"""
        Takes fused LoRAs out of the weights again; they are as loaded as before [`fuse_lora`], scales included.

        Args:
            components (`list[str]`, *optional*): Parts to restore. Defaults to all.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        components = components or self._lora_loadable_modules
        parts = {component: getattr(self, component) for component in components}
        fused = {
            component: model
            for component, model in parts.items()
            if model is not None
            and any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in model.modules())
        }
        super().unfuse_lora(components)
        for component, model in fused.items():  # diffusers would leave their layers scaled
            unscale_lora_layers(model, self._fused_scales[component])
