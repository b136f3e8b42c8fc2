"""Clean documents to a tokenizer and shards of token ids."""
