"""The embedded data set: drawn driving scenes, their words, tokenizer and scores."""
