"""A name, folder, GGUF file or Hub id → model, tokenizer and chat template, ready to run."""
