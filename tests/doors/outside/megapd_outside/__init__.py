"""A task, a model, a schedule policy and a callback for megapd, as another package brings them."""
