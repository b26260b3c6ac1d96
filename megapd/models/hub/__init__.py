"""Hugging Face in and out: the file layouts of transformers' models that megapd has itself."""

from megapd.models.hub.folder import load_hugging_face, save_hugging_face

__all__ = ["load_hugging_face", "save_hugging_face"]
