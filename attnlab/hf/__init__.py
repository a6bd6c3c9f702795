"""Published checkpoints: those of Hugging Face's libraries become runs, and runs become such checkpoints.

    python -m attnlab.hf --source=DIRECTORY_OR_MODEL --workdir=runs/qwen3
    python -m attnlab.hf --workdir=runs/qwen3 --export=DIRECTORY

A model family is one file here: the names and shapes of its weights as ours, and back.
"""
