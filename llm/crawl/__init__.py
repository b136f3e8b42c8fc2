"""From raw pages to clean documents and token shards: extract, filter, deduplicate, tokenise."""
