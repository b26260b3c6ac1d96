"""megapd's losses under the names, signatures and conventions of other libraries: liger, torchtune, transformers, trl.

No module here imports the library that it stands in for. What cannot be honoured is refused by name, never ignored.
"""
