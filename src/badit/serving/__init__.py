"""A trained run for tools that know nothing of badit: a plain LoRA, or a merged model."""
