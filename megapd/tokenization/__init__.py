"""Tokenizers that there are: read from files, folders or the hub; what their ids mean, as a digest; and out to transformers."""

from megapd.tokenization.base import Tokenizer
from megapd.tokenization.folder import FILES, digests, open_tokenizer
from megapd.tokenization.roles import Roles, choose_roles

__all__ = ["FILES", "Roles", "Tokenizer", "choose_roles", "digests", "open_tokenizer"]
